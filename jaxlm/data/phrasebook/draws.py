"""Random choices: who does what to whom, and when. ``event`` draws a whole clause, which patterns put into
sentences."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from jaxlm.data.phrasebook import lexicon as lex
from jaxlm.data.phrasebook.grammar import (
    CLOCK,
    DATES,
    HE,
    ME,
    SHE,
    THEY,
    THOU,
    WE,
    YOU,
    Clause,
    Complement,
    Pair,
    Phrase,
    at_place,
    number,
    phrase,
    to_place,
    words,
)

T = TypeVar("T")


class Dice:
    """The only source of random numbers: ``random.Random(seed).random()``, whose stream Python promises never to
    change."""

    def __init__(self, seed: int) -> None:
        self.roll = random.Random(seed).random

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, all equally likely."""
        return items[int(self.roll() * len(items))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.roll() < probability

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self.roll() * (high - low + 1))


def sentence(en: str, de: str, mark: str = ".") -> Pair:
    """Both sides with a capital letter and a closing mark."""
    return en[0].upper() + en[1:] + mark, de[0].upper() + de[1:] + mark


@dataclass(frozen=True)
class Pattern:
    """A function that draws one pair, the family it belongs to, and how many pairs of it a phrasebook has."""

    family: str
    share: int
    draw: Callable[[Dice], Pair]


PATTERNS: list[Pattern] = []  # in the order of the source


def pattern(family: str, share: int) -> Callable[[Callable[[Dice], Pair]], Callable[[Dice], Pair]]:
    """A decorator that adds a function to ``PATTERNS``."""

    def enter(draw: Callable[[Dice], Pair]) -> Callable[[Dice], Pair]:
        PATTERNS.append(Pattern(family, share, draw))
        return draw

    return enter


# ---- Who and what ----


@cache
def named(name: str) -> Phrase:
    """A person called by the first name."""
    return Phrase(name, (name, name, name), 2, "f" if name in lex.WOMEN else "m")


PRONOUNS = (ME, HE, SHE, WE, THEY)
NAMES = (*lex.WOMEN, *lex.MEN)
OWNERS = ("my", "his", "her", "our")


def own(subject: Phrase) -> str:
    """The determiner for something that belongs to the subject; "the" where a possessive would be unclear."""
    if subject is YOU or subject is THOU:
        return "your" if subject is YOU else "thy"
    if subject is ME or subject is WE:
        return "my" if subject is ME else "our"
    return {"f": "her", "m": "his"}.get(subject.gender, "the") if subject.person == 2 else "the"


def described(dice: Dice, kind: lex.Kind, determiner: str, often: float = 0.45) -> Phrase:
    """A noun of this kind, often with an adjective."""
    return phrase(determiner, dice.pick(kind.nouns), dice.pick(kind.adjectives) if dice.chance(often) else None)


def kin(dice: Dice) -> Phrase:
    """A person who is named or related: Anna, my brother."""
    if dice.chance(0.4):
        return named(dice.pick(NAMES))
    return phrase(dice.pick(OWNERS), dice.pick(lex.FAMILY.nouns))


def person(dice: Dice) -> Phrase:
    """A person that is not a pronoun."""
    return kin(dice) if dice.chance(0.7) else described(dice, lex.PEOPLE, "the", 0.3)


def anybody(dice: Dice) -> Phrase:
    """A subject: a pronoun or a person."""
    return dice.pick(PRONOUNS) if dice.chance(0.55) else person(dice)


def somebody_else(dice: Dice, subject: Phrase) -> Phrase:
    """A person other than the subject, as an object: "he visits him", never "I visit me" or "they visit them"."""
    while True:
        other = dice.pick(PRONOUNS) if dice.chance(0.35) else person(dice)
        reflexive = other.person == subject.person == 4 or {other.person, subject.person} <= {0, 3}
        if other.en != subject.en and not reflexive:
            return other


def drink(dice: Dice) -> Phrase:
    """A cup of tea, two bottles of water."""
    liquid = dice.pick(lex.DRINKS.nouns)
    hot = liquid.en in ("coffee", "tea")
    vessel = phrase("a", lex.CUP if hot else dice.pick((lex.GLASS, lex.BOTTLE)), None, dice.pick((1, 1, 1, 2, 3, 4)))
    nom, acc, dat = (f"{case} {liquid.de}" for case in vessel.de)
    return Phrase(f"{vessel.en} of {liquid.en}", (nom, acc, dat), vessel.person, vessel.gender)


def thing(dice: Dice, kind: lex.Kind, subject: Phrase) -> Phrase:
    """Something that the subject acts on."""
    if kind is lex.DRINKS and dice.chance(0.6):
        return drink(dice)
    if kind is lex.DRINKS:
        return described(dice, kind, dice.pick(("the", "")))
    if dice.chance(0.1):
        adjective = dice.pick(kind.adjectives) if dice.chance(0.45) else None
        return phrase("", dice.pick(kind.nouns), adjective, dice.between(2, 12))
    return described(dice, kind, dice.pick(("a", "a", "a", "the", "the", "this", own(subject))))


# ---- Events: a clause with everything chosen ----

Deed = tuple[lex.Verb, Complement, bool]  # the bool: whether the complement carries a German negation

MODALS = ("can", "must", "should", "want", "would like")
PAST = ("past", "could", "had to", "wanted")
TENSES_OF = {  # by the style of the verb
    "h": ("present", "progressive", "past", "past", "future", *MODALS, *PAST),
    "o": ("progressive", "past", "past", "future", *MODALS, *PAST),
    "s": ("present", "present", "past", "future"),
    "a": ("past",),
}


def coming(dice: Dice) -> Pair:
    """A time in the future: a day, a date or an hour."""
    roll = dice.roll()
    if roll < 0.7:
        return dice.pick(lex.FUTURE_TIMES)
    if roll < 0.85:
        en, de = dice.pick(DATES)
        return f"on the {en}", "am " + de % "en"
    en, de = dice.pick(CLOCK)
    return f"at {en}", f"um {de}"


def tense_and_time(
    dice: Dice, verb: lex.Verb, tenses: Sequence[str] | None = None, negative: bool = False
) -> tuple[str, Pair]:
    """A tense that suits the verb (one of ``tenses`` if that is given and possible), and an adverb of time for it.

    Present and past always have an adverb, because "I read" alone could be either.
    """
    known = TENSES_OF[verb.style]
    tense = dice.pick(
        [t for t in known if (tenses is None or t in tenses) and not (negative and t == "must")] or ["past"]
    )
    if tense == "present":
        return tense, dice.pick(lex.PRESENT_TIMES if verb.style == "s" else lex.HABITUAL)
    if tense == "progressive":
        return tense, ("", "gerade") if dice.chance(0.4) else dice.pick(lex.PRESENT_TIMES)
    if tense in PAST:
        return tense, dice.pick(lex.PAST_TIMES)
    return tense, coming(dice) if dice.chance(0.65) else ("", "")


def act(dice: Dice, subject: Phrase) -> Deed:
    """Somebody does something to a thing."""
    kind, verbs = dice.pick(lex.ACTS)
    if not dice.chance(0.12):
        en, de = thing(dice, kind, subject).acc
        return dice.pick(verbs), Complement(en, late=de), False
    determiner = "the" if kind is lex.DRINKS else dice.pick(("no", "no", "the", "this", own(subject)))
    en, de = described(dice, kind, determiner).acc
    return dice.pick(verbs), Complement(en, late=de) if determiner == "no" else Complement(en, de, "nicht"), True


def meeting(dice: Dice, subject: Phrase) -> Deed:
    """Somebody does something to a person (accusative) or for one (dative)."""
    other = somebody_else(dice, subject)
    if dice.chance(0.3):
        verb, (en, de) = dice.pick(lex.FAVOURS), other.dat
    else:
        verb, (en, de) = dice.pick(lex.MEETINGS), other.acc
    negative = dice.chance(0.1)
    early = negative or other in PRONOUNS
    return verb, Complement(en, de if early else "", words("" if early else de, "nicht" if negative else "")), negative


def gift(dice: Dice, subject: Phrase) -> Deed:
    """Somebody gives a person (dative) a thing (accusative)."""
    other, what = somebody_else(dice, subject), thing(dice, lex.BELONGINGS, subject)
    return dice.pick(lex.GIFTS), Complement(words(other.dat[0], what.acc[0]), other.dat[1], what.acc[1]), False


def trip(dice: Dice, _: Phrase) -> Deed:
    """Somebody goes somewhere or is somewhere."""
    roll = dice.roll()
    if roll < 0.5:
        verb, (en, de) = dice.pick(lex.TRIPS), to_place(dice.pick(lex.PLACES))
    elif roll < 0.8:
        verb, (en, de) = dice.pick(lex.STAYS), at_place(dice.pick(lex.PLACES))
    else:
        city, stadt = dice.pick(lex.CITIES + lex.COUNTRIES)
        verb, (en, de) = dice.pick(lex.JOURNEYS), (f"to {city}", f"nach {stadt}")
    return verb, Complement(en, late=de), False


DEEDS = (act, act, act, act, meeting, meeting, gift, trip)


def event(
    dice: Dice,
    subject: Phrase | None = None,
    tenses: Sequence[str] | None = None,
    deeds: Sequence[Callable[[Dice, Phrase], Deed]] = DEEDS,
) -> Clause:
    """A clause about somebody doing something, in one of these tenses (any that sounds natural if None)."""
    subject = subject or anybody(dice)
    while True:
        verb, complement, negative = dice.pick(deeds)(dice, subject)
        if tenses is None or not set(tenses).isdisjoint(TENSES_OF[verb.style]):
            break
    tense, time = tense_and_time(dice, verb, tenses, negative)
    return Clause(subject, verb, tense, complement, time, negative)


def either(dice: Dice, clause: Clause) -> Pair:
    """The clause as a statement, sometimes with its time in front."""
    return sentence(*(clause.fronted() if clause.time[0] and dice.chance(0.35) else clause.plain()))


def euros(dice: Dice) -> Pair:
    """Forty-five euros, or twelve euros and ten cents."""
    en, de = number(dice.between(2, 99))
    if dice.chance(0.35):
        cents, cent = number(dice.between(2, 99))
        return f"{en} euros and {cents} cents", f"{de} Euro und {cent} Cent"
    return f"{en} euros", f"{de} Euro"
