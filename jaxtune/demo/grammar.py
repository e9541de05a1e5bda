"""English sentences and their exact Esperanto translations, rendered from one structure.

A `Sentence` is drawn once and rendered twice. Esperanto grammar as in the Fundamento (1905): plural
-j and accusative -n on nouns and whatever agrees with them, -as / -is / -os for the three tenses,
"ne" before the verb, "ĉu" before a question.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jaxtune.demo import lexicon
from jaxtune.demo.lexicon import Adjective, Adverb, Determiner, Noun, Pronoun, Verb

Tense = Literal["present", "past", "future"]
Mood = Literal["statement", "negation", "question"]
Part = Literal["train", "test"]

_PRONOUNS = list(lexicon.PRONOUNS)
_ENDINGS = {"present": "as", "past": "is", "future": "os"}
_HELD_OUT_EVERY = 8  # one adjective-noun pair, and one noun-verb pair, in this many


@dataclass(frozen=True)
class Phrase:
    """A noun with what stands before it: "my two red birds" has no adjective order to learn."""

    determiner: Determiner
    adjective: Adjective | None
    noun: Noun
    plural: bool


@dataclass(frozen=True)
class Place:
    preposition: Adverb
    phrase: Phrase


@dataclass(frozen=True)
class Sentence:
    """Either `verb` with its objects, or "to be" with `quality` ("The house is old.")."""

    subject: Phrase | Pronoun
    tense: Tense
    mood: Mood
    verb: Verb | None = None
    quality: Adjective | None = None
    object: Phrase | Pronoun | None = None
    manner: Adverb | None = None
    place: Place | None = None
    time: Adverb | None = None


# ---- English


def english(s: Sentence) -> str:
    """The sentence in English, with its capital and its full stop or question mark."""
    helper, verb = _english_verb(s)
    subject = _english_noun(s.subject, "subject")
    words = [helper, subject] if s.mood == "question" else [subject, helper]
    words += ["not"] if s.mood == "negation" else []
    words += [verb, s.quality.english if s.quality else ""]
    words += [_english_noun(s.object, "object") if s.object else ""]
    words += [s.manner.english if s.manner else ""]
    if s.place:
        words += [s.place.preposition.english, _english_noun(s.place.phrase, "object")]
    words += [s.time.english if s.time else ""]
    return _punctuate(words, s.mood)


def _english_verb(s: Sentence) -> tuple[str, str]:
    """The helping verb and the verb: ("did", "sing"), ("", "sang"), ("was", "")."""
    person = s.subject.english if isinstance(s.subject, Pronoun) else ""
    plural = _is_plural(s.subject) or person == "you"
    he_form = not plural and person != "I"
    if s.verb is None:
        if s.tense == "future":
            return "will", "be"
        if s.tense == "past":
            return ("were" if plural else "was"), ""
        return ("is" if he_form else "are" if plural else "am"), ""
    if s.tense == "future":
        return "will", s.verb.english
    if s.mood == "statement":
        if s.tense == "past":
            return "", s.verb.past
        return "", lexicon.with_s(s.verb.english) if he_form else s.verb.english
    return ("did" if s.tense == "past" else "does" if he_form else "do"), s.verb.english


def _english_noun(n: Phrase | Pronoun, role: Literal["subject", "object"]) -> str:
    if isinstance(n, Pronoun):
        return n.english if role == "subject" else n.object
    determiner = n.determiner.plural if n.plural else n.determiner.singular
    noun = n.noun.plural if n.plural else n.noun.english
    words = [determiner, n.adjective.english if n.adjective else "", noun]
    text = " ".join(word for word in words if word)
    if determiner == "a" and text[2] in "aeiou":
        return f"an{text[1:]}"
    return text


# ---- Esperanto


def esperanto(s: Sentence) -> str:
    """The sentence in Esperanto, word for word what a textbook would write."""
    words = ["ĉu"] if s.mood == "question" else []
    words += [_esperanto_noun(s.subject)]
    words += ["ne"] if s.mood == "negation" else []
    root = s.verb.esperanto[:-1] if s.verb else "est"
    words += [root + _ENDINGS[s.tense]]
    if s.quality:
        words += [_inflect(s.quality.esperanto, plural=_is_plural(s.subject))]
    words += [_esperanto_noun(s.object, accusative=True) if s.object else ""]
    words += [s.manner.esperanto if s.manner else ""]
    if s.place:
        words += [s.place.preposition.esperanto, _esperanto_noun(s.place.phrase)]
    words += [s.time.esperanto if s.time else ""]
    return _punctuate(words, s.mood)


def _esperanto_noun(n: Phrase | Pronoun, *, accusative: bool = False) -> str:
    if isinstance(n, Pronoun):
        return _inflect(n.esperanto, accusative=accusative)
    determiner = n.determiner.esperanto
    if n.determiner.inflects:
        determiner = _inflect(determiner, plural=n.plural, accusative=accusative)
    words = [determiner]
    words += [_inflect(n.adjective.esperanto, n.plural, accusative) if n.adjective else ""]
    words += [_inflect(n.noun.esperanto, n.plural, accusative)]
    return " ".join(word for word in words if word)


def _inflect(word: str, plural: bool = False, accusative: bool = False) -> str:
    return word + "j" * plural + "n" * accusative


# ---- both


def _is_plural(n: Phrase | Pronoun) -> bool:
    return n.number == "plural" if isinstance(n, Pronoun) else n.plural


def _punctuate(words: list[str], mood: Mood) -> str:
    text = " ".join(word for word in words if word)
    return text[0].upper() + text[1:] + ("?" if mood == "question" else ".")


# ---- drawing


def sentences(part: Part, seed: int) -> Iterator[Sentence]:
    """Endless random sentences of one part, a function of (part, seed).

    Certain pairs of adjective and noun, and of subject and verb, never occur in "train"; every
    sentence of "test" has at least one of them. So the two cannot share a sentence, and a test
    sentence takes grammar, not memory.
    """
    rng = random.Random(f"{part}-{seed}")
    while True:
        sentence = _draw(rng)
        if _is_held_out(sentence) == (part == "test"):
            yield sentence


def _is_held_out(s: Sentence) -> bool:
    phrases = [
        p for p in (s.subject, s.object, s.place and s.place.phrase) if isinstance(p, Phrase)
    ]
    pairs = [(p.adjective, p.noun) for p in phrases if p.adjective]
    if isinstance(s.subject, Phrase):
        pairs += [(w, s.subject.noun) for w in (s.quality, s.verb) if w]
    return any(is_held_out_pair(word, noun) for word, noun in pairs)


def is_held_out_pair(word: Adjective | Verb, noun: Noun) -> bool:
    """Diagonals of the table of words by nouns: each word loses an equal share of its partners."""
    words = lexicon.ADJECTIVES if isinstance(word, Adjective) else lexicon.VERBS
    return (words.index(word) + lexicon.NOUNS.index(noun)) % _HELD_OUT_EVERY == 0


def _draw(rng: random.Random) -> Sentence:
    tense: Tense = rng.choice(("present", "past", "future"))
    mood: Mood = rng.choice(("statement", "statement", "statement", "negation", "question"))
    time = rng.choice(lexicon.TIMES[tense]) if rng.random() < 0.25 else None
    if rng.random() < 0.2:
        subject = _draw_noun(rng, lexicon.ANY, [p for p in _PRONOUNS if p.number != "either"])
        qualities = [a for a in lexicon.ADJECTIVES if _kind(subject) in a.kinds]
        return Sentence(subject, tense, mood, quality=rng.choice(qualities), time=time)
    verb = rng.choice(lexicon.VERBS)
    subject = _draw_noun(rng, verb.subjects, _PRONOUNS)
    if verb.objects:
        persons = _possible_objects(subject) if "person" in verb.objects else []
        target = _draw_noun(rng, verb.objects, persons)
        return Sentence(subject, tense, mood, verb, object=target, time=time)
    manner = rng.choice(lexicon.MANNERS) if verb.manner and rng.random() < 0.4 else None
    place = None
    if not manner and rng.random() < 0.5:
        place = Place(rng.choice(lexicon.PREPOSITIONS), _draw_phrase(rng, ("place",)))
    return Sentence(subject, tense, mood, verb, manner=manner, place=place, time=time)


def _possible_objects(subject: Phrase | Pronoun) -> list[Pronoun]:
    """Not "I see me" nor "we see me": those want a reflexive in one language or in both."""
    if isinstance(subject, Phrase):
        return _PRONOUNS
    clash = {"I": "Iwe", "we": "Iwe"}.get(subject.english, subject.english)
    return [p for p in _PRONOUNS if p.english not in clash]


def _kind(n: Phrase | Pronoun) -> str:
    return n.noun.kind if isinstance(n, Phrase) else "person"


def _draw_noun(
    rng: random.Random, kinds: tuple[str, ...], pronouns: list[Pronoun]
) -> Phrase | Pronoun:
    if pronouns and rng.random() < 0.2:
        return rng.choice(pronouns)
    return _draw_phrase(rng, kinds)


def _draw_phrase(rng: random.Random, kinds: tuple[str, ...]) -> Phrase:
    noun = rng.choice([n for n in lexicon.NOUNS if n.kind in kinds])
    plural = rng.random() < 0.5
    allowed = [d for d in lexicon.DETERMINERS if (d.plural if plural else d.singular) is not None]
    determiner = allowed[0] if rng.random() < 0.4 else rng.choice(allowed)
    adjective = None
    if rng.random() < 0.5:
        adjective = rng.choice([a for a in lexicon.ADJECTIVES if noun.kind in a.kinds])
    return Phrase(determiner, adjective, noun, plural)
