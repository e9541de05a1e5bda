"""The words of the demo: English, its irregular forms, and Esperanto.

Each entry reads `english[/irregular] esperanto`; the irregular form is a plural for nouns and a
past for verbs. Nouns and adjectives carry their dictionary ending (-o, -a), verbs their infinitive
(-i). Words that are ambiguous in English alone ("put": one form for present and past) are left out,
so every sentence has one exact translation.
"""

from dataclasses import dataclass

LIVING = ("person", "animal")
GOODS = ("food", "text", "thing")
THINGS = (*GOODS, "place")
ANY = (*LIVING, *THINGS)


@dataclass(frozen=True)
class Noun:
    english: str
    plural: str
    esperanto: str
    kind: str


@dataclass(frozen=True)
class Adjective:
    english: str
    esperanto: str
    kinds: tuple[str, ...]  # of nouns it goes with


@dataclass(frozen=True)
class Verb:
    english: str
    past: str
    esperanto: str
    subjects: tuple[str, ...]  # kinds of nouns that can do it
    objects: tuple[str, ...] = ()  # kinds it can be done to; none is intransitive
    manner: bool = False  # whether it goes with an adverb such as "slowly"


@dataclass(frozen=True)
class Determiner:
    singular: str | None  # None: has no singular
    plural: str | None
    esperanto: str
    inflects: bool  # takes -j and -n


@dataclass(frozen=True)
class Pronoun:
    english: str
    object: str
    esperanto: str
    number: str  # "singular", "plural", or "either": no adjective can agree with "you"


@dataclass(frozen=True)
class Adverb:
    english: str
    esperanto: str


def with_s(word: str) -> str:
    """bird -> birds, box -> boxes, city -> cities: plurals of nouns and he-forms of verbs."""
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


def _with_ed(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ied"
    return f"{word}d" if word.endswith("e") else f"{word}ed"


def _entries(table: str) -> list[tuple[str, str, str]]:
    """`"man/men viro, dog hundo"` -> [("man", "men", "viro"), ("dog", "", "hundo")]."""
    entries = []
    for entry in table.split(","):
        english, esperanto = entry.split()
        word, _, irregular = english.partition("/")
        entries.append((word, irregular, esperanto))
    return entries


_NOUNS = {
    "person": """
        man/men viro, woman/women virino, boy knabo, girl knabino, child/children infano,
        friend amiko, teacher instruisto, doctor kuracisto, king reĝo, queen reĝino, monk monaĥo,
        mother patrino, father patro, brother frato, sister fratino, guest gasto""",
    "animal": """
        dog hundo, cat kato, bird birdo, horse ĉevalo, mouse/mice muso, lion leono, bear urso,
        fox vulpo, frog rano, goat kapro, wolf/wolves lupo, elephant elefanto""",
    "food": "apple pomo, egg ovo, cake kuko, pear piro, cherry ĉerizo, potato terpomo",
    "text": "book libro, letter letero, newspaper ĵurnalo, poem poemo, story rakonto",
    "thing": """
        chair seĝo, key ŝlosilo, ship ŝipo, hat ĉapelo, shoe ŝuo, lamp lampo, cup taso,
        knife/knives tranĉilo, clock horloĝo, flower floro, ball pilko, box skatolo""",
    "place": """
        garden ĝardeno, house domo, school lernejo, city urbo, forest arbaro, room ĉambro,
        kitchen kuirejo, village vilaĝo, park parko, castle kastelo""",
}

_ADJECTIVES = {
    ANY: "good bona, bad malbona, big granda, small malgranda, beautiful bela, ugly malbela",
    LIVING: """
        young juna, old maljuna, strong forta, weak malforta, happy feliĉa, unhappy malfeliĉa,
        wise saĝa, foolish malsaĝa, tired laca, brave kuraĝa""",
    ("person",): "rich riĉa, poor malriĉa",
    ("animal", "thing"): "white blanka, black nigra, red ruĝa, green verda, blue blua, brown bruna",
    THINGS: "new nova, old malnova",
    ("food",): "fresh freŝa, sweet dolĉa",
    ("thing",): "clean pura, dirty malpura, heavy peza, light malpeza",
}

_VERBS: dict[tuple[tuple[str, ...], tuple[str, ...], bool], str] = {
    (LIVING, (), True): """
        sing/sang kanti, run/ran kuri, swim/swam naĝi, dance danci, play ludi, jump salti""",
    (("person",), (), True): "work labori, speak/spoke paroli, laugh ridi, shout krii",
    (LIVING, (), False): "sleep/slept dormi, wait atendi, rest ripozi, sit/sat sidi",
    (("person",), (), False): "smile rideti, cry plori",
    (LIVING, ANY, False): """
        see/saw vidi, hear/heard aŭdi, find/found trovi, love ami, watch rigardi, seek/sought serĉi,
        remember memori, forget/forgot forgesi""",
    (("person",), ANY, False): "draw/drew desegni, choose/chose elekti, like ŝati, need bezoni",
    (LIVING, LIVING, False): "follow sekvi, wake/woke veki",
    (("person",), LIVING, False): "greet saluti, meet/met renkonti",
    (LIVING, GOODS, False): "carry porti, lose/lost perdi, hide/hid kaŝi",
    (("person",), GOODS, False): "buy/bought aĉeti, sell/sold vendi, touch tuŝi",
    (LIVING, ("food",), False): "eat/ate manĝi",
    (("person",), ("text",), False): "write/wrote skribi",
    (("person",), ("place",), False): "visit viziti",
}

NOUNS = tuple(
    Noun(word, irregular or with_s(word), esperanto, kind)
    for kind, table in _NOUNS.items()
    for word, irregular, esperanto in _entries(table)
)
ADJECTIVES = tuple(
    Adjective(word, esperanto, kinds)
    for kinds, table in _ADJECTIVES.items()
    for word, _, esperanto in _entries(table)
)
VERBS = tuple(
    Verb(word, irregular or _with_ed(word), esperanto, subjects, objects, manner)
    for (subjects, objects, manner), table in _VERBS.items()
    for word, irregular, esperanto in _entries(table)
)
DETERMINERS = (
    Determiner("the", "the", "la", inflects=False),
    Determiner("a", "", "", inflects=False),
    Determiner("my", "my", "mia", inflects=True),
    Determiner("your", "your", "via", inflects=True),
    Determiner("our", "our", "nia", inflects=True),
    Determiner("this", "these", "ĉi tiu", inflects=True),
    Determiner("that", "those", "tiu", inflects=True),
    Determiner(None, "two", "du", inflects=False),
    Determiner(None, "three", "tri", inflects=False),
    Determiner(None, "many", "multa", inflects=True),
)
PRONOUNS = (
    Pronoun("I", "me", "mi", "singular"),
    Pronoun("you", "you", "vi", "either"),
    Pronoun("he", "him", "li", "singular"),
    Pronoun("she", "her", "ŝi", "singular"),
    Pronoun("we", "us", "ni", "plural"),
    Pronoun("they", "them", "ili", "plural"),
)
MANNERS = (
    Adverb("quickly", "rapide"),
    Adverb("slowly", "malrapide"),
    Adverb("well", "bone"),
    Adverb("badly", "malbone"),
    Adverb("loudly", "laŭte"),
    Adverb("quietly", "mallaŭte"),
)
PREPOSITIONS = (
    Adverb("in", "en"),
    Adverb("near", "apud"),
    Adverb("behind", "malantaŭ"),
)
TIMES = {
    "present": (Adverb("today", "hodiaŭ"), Adverb("often", "ofte"), Adverb("every day", "ĉiutage")),
    "past": (Adverb("yesterday", "hieraŭ"), Adverb("long ago", "antaŭ longe")),
    "future": (Adverb("tomorrow", "morgaŭ"), Adverb("soon", "baldaŭ")),
}
