"""The phrasebook: sizes, disjointness, one German sentence an English one, and German by the grammar book."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys

import pytest

from jaxlm.data import phrasebook
from jaxlm.data.phrasebook import HELD_OUT, PATTERNS, Dice, draw_pairs, generate
from jaxlm.data.phrasebook import lexicon as lex
from jaxlm.data.phrasebook.grammar import (
    ACC,
    CLOCK,
    DAT,
    HE,
    ME,
    NOM,
    SHE,
    THOU,
    YOU,
    Clause,
    Complement,
    german_number,
    number,
    ordinal,
    phrase,
    to_place,
    year,
)


@pytest.fixture(scope="module")
def book():
    return generate()


def digest(book):
    return hashlib.sha256(repr(book).encode()).hexdigest()


def test_sizes_and_disjoint_on_both_sides(book):
    assert list(book) == ["train", "valid", "test"]
    assert len(book["train"]) >= 50_000 and len(book["valid"]) == len(book["test"]) == HELD_OUT
    pairs = [pair for split in book.values() for pair in split]
    for side in (0, 1):
        assert len({pair[side] for pair in pairs}) == len(pairs)


def test_same_seed_same_bytes_whatever_the_hash_seed(book):
    code = "import hashlib; from jaxlm.data.phrasebook import generate as g; "
    code += "print(hashlib.sha256(repr(g()).encode()).hexdigest())"
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest(book)


def test_another_seed_gives_other_pairs(monkeypatch):
    monkeypatch.setattr(phrasebook, "PATTERNS", PATTERNS[:1])
    assert draw_pairs(0) == draw_pairs(0) != draw_pairs(1)


def test_every_english_sentence_has_one_german_one(book):
    """Over twice as many draws as a phrasebook holds, and between patterns too."""
    dice, german = Dice(123), {en: de for split in book.values() for en, de in split}
    for pattern in PATTERNS:
        for _ in range(pattern.share):
            en, de = pattern.draw(dice)
            assert german.setdefault(en, de) == de, en


def test_every_family_is_in_every_split(book):
    """The splits are samples of all patterns: each has clocks, prices, questions, subordinate and relative clauses."""
    for split in book.values():
        english = " ".join(en for en, _ in split)
        for cue in (
            "o'clock",
            "euros",
            "Please",
            "because",
            "If ",
            "who ",
            "Good morning",
            "minus",
            "turn left",
            "than",
        ):
            assert cue in english


def test_held_out_sentences_are_new_combinations_of_known_words(book):
    english = {split: [en for en, _ in pairs] for split, pairs in book.items()}
    seen = {word for en in english["train"] for word in en.split()}
    assert sum(not set(en.split()) <= seen for en in english["test"]) <= 10  # a fronted or final word, first time there
    five = {tuple(words[i : i + 5]) for words in map(str.split, english["train"]) for i in range(len(words) - 4)}
    new = sum(
        any(tuple(words[i : i + 5]) not in five for i in range(len(words) - 4))
        for words in map(str.split, english["test"])
    )
    assert new > HELD_OUT / 2  # most have five words in a row that training never had


def test_text_is_clean(book):
    for split in book.values():
        for pair in split:
            for text in pair:
                assert re.fullmatch(r"[A-ZÄÖÜ][A-Za-zÄÖÜäöüß'\-,.?! ]*[.?!]", text), text
                assert "  " not in text and " ." not in text and " ," not in text
            assert pair[0][-1] == pair[1][-1]


def test_lengths(book):
    lengths = sorted(len(en.split()) for en, _ in book["train"])
    assert 7 < sum(lengths) / len(lengths) < 11 and lengths[len(lengths) // 20] >= 4 and lengths[-1] <= 24


@pytest.mark.parametrize(
    ("n", "german"),
    [(1, "eins"), (16, "sechzehn"), (17, "siebzehn"), (21, "einundzwanzig"), (30, "dreißig"), (66, "sechsundsechzig"),
     (100, "einhundert"), (101, "einhunderteins"), (777, "siebenhundertsiebenundsiebzig")],
)  # fmt: skip
def test_german_numbers(n, german):
    assert german_number(n) == german


def test_numbers_are_distinct_and_dates_and_years_read_right():
    for side in (0, 1):
        assert len({number(n)[side] for n in range(1000)}) == 1000
    assert number(342)[0] == "three hundred and forty-two"
    assert [ordinal(n) for n in (1, 3, 7, 12, 20, 31)] == [
        ("first", "erst"), ("third", "dritt"), ("seventh", "siebt"), ("twelfth", "zwölft"), ("twentieth", "zwanzigst"),
        ("thirty-first", "einunddreißigst"),
    ]  # fmt: skip
    assert year(1945) == ("nineteen forty-five", "neunzehnhundertfünfundvierzig")


def test_clock_counts_the_half_hour_towards_the_next():
    times = dict(CLOCK)
    assert times["half past two"] == "halb drei" and times["half past twelve"] == "halb eins"
    assert times["a quarter past seven"] == "Viertel nach sieben" and times["ten to one"] == "zehn vor eins"
    assert times["one o'clock"] == "ein Uhr"


BY_NAME = {n.en: n for kind in (lex.THINGS, lex.CLOTHES, lex.FOOD, lex.PEOPLE, lex.FAMILY) for n in kind.nouns}


@pytest.mark.parametrize(
    ("determiner", "adjective", "noun", "cases"),
    [
        ("the", "old", "table", ("der alte Tisch", "den alten Tisch", "dem alten Tisch")),
        ("the", "red", "bag", ("die rote Tasche", "die rote Tasche", "der roten Tasche")),
        ("the", None, "book", ("das Buch", "das Buch", "dem Buch")),
        ("a", "expensive", "coat", ("ein teurer Mantel", "einen teuren Mantel", "einem teuren Mantel")),
        ("a", "new", "bag", ("eine neue Tasche", "eine neue Tasche", "einer neuen Tasche")),
        ("our", "old", "car", ("unser altes Auto", "unser altes Auto", "unserem alten Auto")),
        ("this", "big", "egg", ("dieses große Ei", "dieses große Ei", "diesem großen Ei")),
        ("no", None, "hat", ("kein Hut", "keinen Hut", "keinem Hut")),
        ("the", None, "neighbour", ("der Nachbar", "den Nachbarn", "dem Nachbarn")),
        ("thy", None, "sister", ("deine Schwester", "deine Schwester", "deiner Schwester")),
    ],
)
def test_declension(determiner, adjective, noun, cases):
    assert phrase(determiner, BY_NAME[noun], adjective and lex.ADJECTIVES[adjective]).de == cases


def test_counted_nouns_take_the_plural_and_the_strong_ending():
    chairs = phrase("", BY_NAME["chair"], lex.ADJECTIVES["old"], 21)
    assert chairs.en == "twenty-one old chairs"
    assert chairs.de[ACC] == "einundzwanzig alte Stühle" and chairs.de[DAT] == "einundzwanzig alten Stühlen"
    assert phrase("a", BY_NAME["orange"]).en == "an orange"


@pytest.mark.parametrize(
    ("english", "plurals"),
    [
        ("apple", ("apples", "Äpfel")),
        ("bicycle", ("bicycles", "Fahrräder")),
        ("pizza", ("pizzas", "Pizzen")),
        ("scarf", ("scarves", "Schals")),
        ("dress", ("dresses", "Kleider")),
        ("child", ("children", "Kinder")),
        ("saleswoman", ("saleswomen", "Verkäuferinnen")),
        ("daughter", ("daughters", "Töchter")),
    ],
)
def test_plurals(english, plurals):
    assert (BY_NAME[english].en_plural, BY_NAME[english].de_plural) == plurals


def test_umlaut_of_a_diphthong_is_on_its_first_letter():
    assert lex.german_plural("Rathaus", "¨er") == "Rathäuser"


def test_conjugation_of_strong_and_separable_verbs():
    assert lex.verb("h read/read lesen/liest gelesen").forms == ("lese", "liest", "liest", "lesen", "lesen")
    assert lex.verb("o invite/invited ein|laden/lädt eingeladen").forms[:3] == ("lade", "lädst", "lädt")
    assert lex.verb("h work/worked arbeiten gearbeitet").forms[:3] == ("arbeite", "arbeitest", "arbeitet")
    assert lex.verb("a see/saw sehen/sieht gesehen").forms[1] == "siehst"


CALL = lex.verb("h call/called an|rufen angerufen")
GO = lex.verb("h go/went gehen +gegangen")
HIM = Complement("him", early="ihn")


def test_word_order():
    """The verb is second, the rest of it last; at the end of a subordinate clause they meet."""
    today, yesterday = ("today", "heute"), ("yesterday", "gestern")
    now = Clause(SHE, CALL, "present", HIM, today)
    assert now.plain() == ("she calls him today", "sie ruft ihn heute an")
    assert now.fronted() == ("today she calls him", "heute ruft sie ihn an")
    assert now.final() == ("she calls him today", "sie ihn heute anruft")
    past = Clause(SHE, CALL, "past", HIM, yesterday)
    assert past.plain()[1] == "sie hat ihn gestern angerufen"
    assert past.final()[1] == "sie ihn gestern angerufen hat"
    assert past.question() == ("did she call him yesterday", "hat sie ihn gestern angerufen")
    assert Clause(YOU, CALL, "can", HIM).question() == ("can you call him", "können Sie ihn anrufen")
    assert Clause(THOU, CALL, "want", HIM).question() == ("do you want to call him", "willst du ihn anrufen")
    assert Clause(HE, CALL, "future", HIM, negative=True).plain()[0] == "he will not call him"
    assert Clause(ME, GO, "past").plain()[1] == "ich bin gegangen"  # motion: the perfect with sein


def test_where_takes_the_dative_and_where_to_the_accusative():
    places = {place.noun.en: place for place in lex.PLACES}
    assert to_place(places["cinema"])[1] == "ins Kino" and to_place(places["park"])[1] == "in den Park"
    assert to_place(places["station"])[1] == "zum Bahnhof" and to_place(places["bakery"])[1] == "zur Bäckerei"
    assert phrase("the", places["cinema"].noun).de[NOM] == "das Kino"


ARTICLES = {"m": "der den dem", "f": "die der", "n": "das dem"}


def test_no_article_of_a_wrong_gender(book):
    """Every "article (adjective) noun" fits the gender that the lexicon gives the noun (not so a relative pronoun)."""
    kinds = [kind for kind in vars(lex).values() if isinstance(kind, lex.Kind)]
    gender = {noun.de: noun.gender for kind in kinds for noun in kind.nouns}
    plural = {noun.de_plural for kind in kinds for noun in kind.nouns}
    singular = {noun: g for noun, g in gender.items() if noun not in plural}
    checked = 0
    for _, de in book["train"] + book["test"]:
        for article, noun in re.findall(r"(?<!, )\b([Dd](?:er|ie|as|en|em))(?: [a-zäöüß]+)? ([A-ZÄÖÜ]\w+)", de):
            if noun in singular:
                checked += 1
                assert article.lower() in ARTICLES[singular[noun]].split(), de
    assert checked > 5_000
