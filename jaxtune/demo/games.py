"""What the base has read: English sentences, each followed by itself in another form.

Games with sentences and letters are all in English, yet they need what translating needs: looking
back, keeping step with the words read, and writing a word piece by piece. An adapter then has a
language to learn, not attention.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

from jaxtune.demo.grammar import Mood, Sentence, Tense, english, sentences


def documents(seed: int) -> Iterator[str]:
    """Endless texts such as "In the past: The birds sing. The birds sang.", from the train part."""
    rng = random.Random(seed)
    for sentence in sentences("train", seed):
        name, answer = rng.choice(GAMES)(sentence, rng)
        yield f"{name}: {english(sentence)} {answer}"


def _again(s: Sentence, _: random.Random) -> tuple[str, str]:
    return "Again", english(s)


def _in_another_tense(s: Sentence, rng: random.Random) -> tuple[str, str]:
    tense = rng.choice([tense for tense in get_args(Tense) if tense != s.tense])
    return f"In the {tense}", english(replace(s, tense=tense, time=None))


def _in_another_mood(s: Sentence, rng: random.Random) -> tuple[str, str]:
    mood = rng.choice([mood for mood in get_args(Mood) if mood != s.mood])
    return f"As a {mood}", english(replace(s, mood=mood))


def _backwards(s: Sentence, _: random.Random) -> tuple[str, str]:
    return "Backwards", _each_word(s, lambda word: word[::-1])


def _pig_latin(s: Sentence, _: random.Random) -> tuple[str, str]:
    """Consonants before the first vowel go to the end, and "ay" behind them: bird -> irdbay."""
    return "In Pig Latin", _each_word(s, lambda w: re.sub("^([^aeiou]*)(.*)", r"\2\1ay", w))


def _each_word(s: Sentence, change: Callable[[str], str]) -> str:
    return re.sub("[a-z]+", lambda word: change(word[0]), english(s).lower())


GAMES = (_again, _in_another_tense, _in_another_mood, _backwards, _pig_latin)
