"""The demo's language is correct, its test part is held out, and its base is an ordinary model."""

import json
import os
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.demo import __main__ as quickstart
from jaxtune.demo import lexicon, prepare
from jaxtune.demo.games import GAMES, documents
from jaxtune.demo.grammar import (
    Phrase,
    Place,
    Sentence,
    english,
    esperanto,
    is_held_out_pair,
    sentences,
)


def word(table, english_word: str, **wanted):
    """The one entry of a table with this English and these other fields."""
    found = [
        entry
        for entry in table
        if getattr(entry, "english", None) == english_word
        and all(value in getattr(entry, name) for name, value in wanted.items())
    ]
    assert len(found) == 1
    return found[0]


def noun(english_word: str):
    return word(lexicon.NOUNS, english_word)


def verb(english_word: str):
    return word(lexicon.VERBS, english_word)


def pronoun(english_word: str):
    return word(lexicon.PRONOUNS, english_word)


def phrase(determiner: str, adjective: str, english_noun: str, *, plural: bool = False) -> Phrase:
    """`determiner` is the singular one, or the plural one of those that have no singular."""
    article = next(d for d in lexicon.DETERMINERS if determiner in (d.singular, d.plural))
    kind = noun(english_noun).kind
    quality = word(lexicon.ADJECTIVES, adjective, kinds=kind) if adjective else None
    return Phrase(article, quality, noun(english_noun), plural)


BIRDS = phrase("the", "red", "bird", plural=True)
PAIRS = [
    (
        Sentence(BIRDS, "present", "statement", verb("sing")),
        "The red birds sing.",
        "La ruĝaj birdoj kantas.",
    ),
    (
        Sentence(
            pronoun("she"), "past", "statement", verb("eat"), object=phrase("a", "sweet", "apple")
        ),
        "She ate a sweet apple.",
        "Ŝi manĝis dolĉan pomon.",
    ),
    (
        Sentence(
            phrase("a", "old", "elephant"),
            "present",
            "statement",
            verb("watch"),
            object=phrase("my", "old", "shoe", plural=True),
        ),
        "An old elephant watches my old shoes.",
        "Maljuna elefanto rigardas miajn malnovajn ŝuojn.",
    ),
    (
        Sentence(pronoun("I"), "past", "negation", verb("see"), object=pronoun("they")),
        "I did not see them.",
        "Mi ne vidis ilin.",
    ),
    (
        Sentence(
            phrase("my", "", "brother"),
            "future",
            "question",
            verb("buy"),
            object=phrase("three", "dirty", "knife", plural=True),
            time=word(lexicon.TIMES["future"], "tomorrow"),
        ),
        "Will my brother buy three dirty knives tomorrow?",
        "Ĉu mia frato aĉetos tri malpurajn tranĉilojn morgaŭ?",
    ),
    (
        Sentence(
            phrase("this", "brave", "monk"),
            "present",
            "question",
            verb("wait"),
            place=Place(
                word(lexicon.PREPOSITIONS, "behind"), phrase("that", "big", "city", plural=True)
            ),
        ),
        "Does this brave monk wait behind those big cities?",
        "Ĉu ĉi tiu kuraĝa monaĥo atendas malantaŭ tiuj grandaj urboj?",
    ),
    (
        Sentence(
            phrase("this", "", "woman", plural=True),
            "past",
            "statement",
            verb("choose"),
            object=phrase("this", "blue", "hat", plural=True),
            time=word(lexicon.TIMES["past"], "long ago"),
        ),
        "These women chose these blue hats long ago.",
        "Ĉi tiuj virinoj elektis ĉi tiujn bluajn ĉapelojn antaŭ longe.",
    ),
    (
        Sentence(
            phrase("our", "", "child", plural=True),
            "past",
            "negation",
            quality=word(lexicon.ADJECTIVES, "unhappy"),
        ),
        "Our children were not unhappy.",
        "Niaj infanoj ne estis malfeliĉaj.",
    ),
    (
        Sentence(pronoun("I"), "present", "statement", quality=word(lexicon.ADJECTIVES, "tired")),
        "I am tired.",
        "Mi estas laca.",
    ),
    (
        Sentence(pronoun("they"), "future", "negation", quality=word(lexicon.ADJECTIVES, "rich")),
        "They will not be rich.",
        "Ili ne estos riĉaj.",
    ),
    (
        Sentence(
            phrase("the", "", "mouse", plural=True),
            "present",
            "statement",
            verb("swim"),
            manner=word(lexicon.MANNERS, "quietly"),
            time=word(lexicon.TIMES["present"], "every day"),
        ),
        "The mice swim quietly every day.",
        "La musoj naĝas mallaŭte ĉiutage.",
    ),
    (
        Sentence(
            phrase("many", "", "boy", plural=True),
            "past",
            "statement",
            verb("carry"),
            object=phrase("your", "heavy", "box"),
        ),
        "Many boys carried your heavy box.",
        "Multaj knaboj portis vian pezan skatolon.",
    ),
]


@pytest.mark.parametrize(("sentence", "in_english", "in_esperanto"), PAIRS)
def test_sentences_as_a_textbook_has_them(sentence, in_english, in_esperanto):
    assert english(sentence) == in_english
    assert esperanto(sentence) == in_esperanto


def test_lexicon_is_a_dictionary_of_esperanto():
    alphabet = "abcĉdefgĝhĥijĵklmnoprsŝtuŭvz"
    tables = {"o": lexicon.NOUNS, "a": lexicon.ADJECTIVES, "i": lexicon.VERBS}
    words = [entry.esperanto for table in tables.values() for entry in table]
    for ending, table in tables.items():
        assert all(entry.esperanto.endswith(ending) for entry in table)
    assert set("".join(words)) <= set(alphabet)
    assert set("ĉĝĥĵŝŭ") <= set("".join(words))
    assert len({w[:-1] for w in words}) == len(words)  # no root stands for two words


def test_no_english_form_means_two_things():
    forms = [form for n in lexicon.NOUNS for form in (n.english, n.plural)]
    forms += [form for v in lexicon.VERBS for form in (v.english, v.past)]
    forms += [lexicon.with_s(v.english) for v in lexicon.VERBS]
    forms += {a.english for a in lexicon.ADJECTIVES}
    assert len(set(forms)) == len(forms)
    old = [a for a in lexicon.ADJECTIVES if a.english == "old"]
    assert [a.esperanto for a in old] == ["maljuna", "malnova"]
    assert not set(old[0].kinds) & set(old[1].kinds)


def test_every_translation_is_exact_both_ways():
    drawn = list(islice(sentences("train", 1), 20_000))
    to_esperanto = {english(s): esperanto(s) for s in drawn}
    assert all(to_esperanto[english(s)] == esperanto(s) for s in drawn)
    assert len(set(to_esperanto.values())) == len(to_esperanto)
    # 20,000 draws that rarely meet come from millions of sentences (the birthday problem)
    assert len(to_esperanto) > 19_000


def test_test_sentences_are_held_out():
    train = list(islice(sentences("train", 0), 20_000))
    test = list(islice(sentences("test", 0), 2_000))
    assert not {english(s) for s in train} & {english(s) for s in test}
    assert not {esperanto(s) for s in train} & {esperanto(s) for s in test}
    seen = set().union(*map(pairs_of, train))
    assert not any(is_held_out_pair(*pair) for pair in seen)
    assert all(pairs_of(s) - seen for s in test)  # each holds a pair that training never showed


def test_training_shows_every_word():
    shown = {w for s in islice(sentences("train", 0), 20_000) for pair in pairs_of(s) for w in pair}
    assert {*lexicon.NOUNS, *lexicon.ADJECTIVES, *lexicon.VERBS} <= shown


def pairs_of(s: Sentence) -> set:
    """Pairs of a word and the noun it goes with, as the split defines them."""
    places = [s.subject, s.object, s.place.phrase if s.place else None]
    phrases = [p for p in places if isinstance(p, Phrase)]
    pairs = {(p.adjective, p.noun) for p in phrases if p.adjective}
    if isinstance(s.subject, Phrase):
        pairs |= {(w, s.subject.noun) for w in (s.verb, s.quality) if w}
    return pairs


@given(st.integers(0, 2**32), st.sampled_from(["train", "test"]))
def test_drawing_is_a_function_of_part_and_seed(seed, part):
    first, again, other = (
        [english(s) for s in islice(sentences(part, n), 20)] for n in (seed, seed, seed + 1)
    )
    assert first == again != other


@given(st.integers(0, 2**32))
def test_agreement(seed):
    """An object and its adjective both take -n, and -j together or not at all."""
    for s in islice(sentences("train", seed), 20):
        assert re.fullmatch(r"[A-ZĈĜĤĴŜŬ][a-zĉĝĥĵŝŭ ]*[.?]", esperanto(s))
        if isinstance(s.object, Phrase) and s.object.adjective:
            ending = "jn" if s.object.plural else "n"
            adjective, noun_ = s.object.adjective.esperanto, s.object.noun.esperanto
            assert f" {adjective}{ending} {noun_}{ending}" in esperanto(s)


def test_the_base_reads_only_english_of_the_train_part():
    texts = list(islice(documents(0), 2_000))
    test = {english(s) for s in islice(sentences("test", 0), 5_000)}
    assert not any(letter in text for text in texts for letter in "ĉĝĥĵŝŭ")
    assert not {part for text in texts for part in re.findall(r"[A-Z][^.?:]*[.?]", text)} & test


def test_games_with_a_sentence():
    birds = Sentence(BIRDS, "present", "statement", verb("sing"))
    rng = random.Random(0)
    played = [game(birds, rng) for game in GAMES for _ in range(9)]
    assert set(played) == {
        ("Again", "The red birds sing."),
        ("In the past", "The red birds sang."),
        ("In the future", "The red birds will sing."),
        ("As a negation", "The red birds do not sing."),
        ("As a question", "Do the red birds sing?"),
        ("Backwards", "eht der sdrib gnis."),
        ("In Pig Latin", "ethay edray irdsbay ingsay."),
    }


def test_data_files(tmp_path: Path):
    prepare.write_data(tmp_path, seed=3, train_rows=50, test_rows=20)
    train, test = (
        [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text("utf-8").splitlines()]
        for part in ("train", "test")
    )
    assert (len(train), len(test)) == (50, 20)
    prompts = (tmp_path / "test.txt").read_text("utf-8").splitlines()
    assert prompts == [row["prompt"] for row in test]
    assert all(set(row) == {"prompt", "completion"} for row in train + test)
    first = next(sentences("train", 3))
    assert train[0] == {
        "prompt": f"In Esperanto: {english(first)}",
        "completion": f" {esperanto(first)}",
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    prepare.write_tokenizer(folder)
    prepare.write_random_llama(folder)
    return folder


def test_tokenizer_gives_back_what_it_read(start: Path):
    import sentencepiece
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(start / "tokenizer.model"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    texts = [text for s in islice(sentences("test", 5), 300) for text in (english(s), esperanto(s))]
    for text in [*texts, "two  spaces\nand a line", " «ĥoro» 12+3 "]:
        ids = tokenizer.encode(text)
        assert ids == [1, *pieces.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert not any("ĉ" in piece for piece in tokenizer.get_vocab())


def test_prompt_and_completion_are_cut_alike_together_and_apart(start: Path):
    from jaxtune.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(start))
    for s in islice(sentences("test", 5), 100):
        prompt, completion = prepare.prompt(english(s)), f" {esperanto(s)}"
        apart = tokenizer.encode(prompt) + tokenizer.encode(completion, add_special_tokens=False)
        assert apart == tokenizer.encode(prompt + completion)


def test_base_is_an_ordinary_hugging_face_model(tmp_path: Path):
    """Two steps of pretraining: the folder loads, and its weights have moved."""
    import jaxtune

    prepare.build_base(tmp_path / "base", steps=2)
    tokens = np.array([[1, 300, 400, 500]], np.int32)
    logits_BTV = jaxtune.load_model(str(tmp_path / "base"))(tokens)
    random_BTV = jaxtune.load_model(str(tmp_path / "pretraining" / "random"))(tokens)
    assert logits_BTV.shape == (1, 4, 1024)
    assert np.abs(logits_BTV - random_BTV).max() > 1e-3
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_report_scores_before_and_after(capsys: pytest.CaptureFixture[str]):
    rows = [
        {"prompt": "In Esperanto: I sing.", "completion": " Mi kantas."},
        {"prompt": "In Esperanto: He sang.", "completion": " Li kantis."},
    ]
    texts = {
        "base": ["I sing.", "He sang."],
        "tuned": ["Mi kantas.", "Li kantos."],
        "exported": ["Mi kantas.", "Li kantas."],
    }
    quickstart._report({"loss_before": 10.0, "loss_after": 0.25}, rows, texts)
    lines = [
        " ".join(re.findall(r"[\w.()%]+", line)) for line in capsys.readouterr().err.split("\n")
    ]
    assert "loss (nats a token) 10.000 0.250" in lines
    assert "exact match (%) 0.0 50.0" in lines
    assert "He sang. Li kantis. He sang. Li kantos." in lines
    assert "the exported model translates 1 of 2 the same way" in lines


def test_quickstart_elsewhere_says_where_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert quickstart.main() == 2
    assert "cd to jaxtune's repository" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_quickstart_learns_to_translate(tmp_path: Path):
    """The whole of it, as a person runs it: most held-out sentences come out right."""
    (tmp_path / "configs").symlink_to(Path(__file__).parents[1] / "configs")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxtune.demo"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"exact match \(%\)\W+0\.0\W+([\d.]+)", done.stderr)
    assert found
    assert float(found[1]) > 80
    assert "translates 200 of 200 the same way" in done.stderr
