"""Sentences about events: statements, questions, requests, and subordinate clauses of every kind."""

from __future__ import annotations

from dataclasses import replace

from jaxlm.data.phrasebook import lexicon as lex
from jaxlm.data.phrasebook.draws import (
    MODALS, NAMES, PAST, PRONOUNS, Dice, act, anybody, described, euros, event, gift, meeting, named, pattern, person, sentence,
)
from jaxlm.data.phrasebook.grammar import (
    ACC, BE, DER, HAVE, HE, NOM, NOTHING, SHE, THOU, YOU, Clause, Pair, Phrase, at_place, words,
)
from jaxlm.data.phrasebook.situations import stranger


@pattern("statements", 5000)
def statement(dice: Dice) -> Pair:
    """She gave the child a red ball yesterday."""
    return sentence(*event(dice).plain())


@pattern("statements", 4000)
def fronted(dice: Dice) -> Pair:
    """Yesterday he bought a coat: the verb stays second, the subject follows it."""
    while True:
        clause = event(dice)
        if clause.time[0]:
            return sentence(*clause.fronted())


@pattern("questions", 5000)
def question(dice: Dice) -> Pair:
    """Can you repair the radio? Anna, did you see my brother? Why does he want to sell the car?"""
    roll = dice.roll()
    if roll < 0.3:
        name = dice.pick(NAMES)
        en, de = event(dice, THOU).question()
        return sentence(f"{name}, {en}", f"{name}, {de}", "?")
    en, de = event(dice, YOU if roll < 0.65 else None).question()
    if dice.chance(0.25):
        return sentence(f"why {en}", f"warum {de}", "?")
    return sentence(en, de, "?")


@pattern("questions", 1500)
def request(dice: Dice) -> Pair:
    """Please close the window, Mrs. Weber."""
    while True:
        clause = event(dice, YOU, ("future",), (act, act, gift, meeting))
        if not clause.negative and clause.verb.style != "s":
            break
    verb, middle = clause.verb, clause.complement
    en = words("please", verb.base + verb.particle, middle.en)
    de = words(verb.forms[4], "Sie bitte" if not middle.early else f"Sie {middle.early} bitte", middle.late, verb.prefix)
    if dice.chance(0.5):
        who, wer = stranger(dice)
        en, de = f"{en}, {who}", f"{de}, {wer}"
    return sentence(en, de)


WAS, HAD = "war warst war waren waren".split(), "hatte hattest hatte hatten hatten".split()


def state(dice: Dice, subject: Phrase, past: bool) -> tuple[str, str, str]:
    """Somebody is tired or has no time: (English, German main clause, German subordinate clause)."""
    who, p = subject.de[NOM], subject.person
    if dice.chance(0.65):
        en, de = dice.pick(lex.MOODS)
        is_, ist = ("was" if p in (0, 2) else "were", WAS[p]) if past else ("am are is are are".split()[p], BE[p])
    else:
        en, de = dice.pick(lex.HOLDINGS)
        is_, ist = ("had", HAD[p]) if past else ("has" if p == 2 else "have", HAVE[p])
    return f"{subject.en} {is_} {en}", f"{who} {ist} {de}", f"{who} {de} {ist}"


CAUSES = (("because", "weil"), ("because", "weil"), ("although", "obwohl"))


@pattern("subordinate", 4500)
def cause(dice: Dice) -> Pair:
    """Anna is sad because she lost her bag. Because he was tired, he stayed at home. Although ..."""
    conjunction, weil = dice.pick(CAUSES)
    subject = named(dice.pick(NAMES)) if dice.chance(0.4) else dice.pick(PRONOUNS)
    again = subject if subject in PRONOUNS else (SHE if subject.gender == "f" else HE)
    if dice.chance(0.4):
        en, de, _ = state(dice, subject, past=False)
        en_why, de_why = event(dice, again, ("past", "had to", "must", "can", "future")).final()
        return sentence(f"{en} {conjunction} {en_why}", f"{de}, {weil} {de_why}")
    clause = event(dice, again)
    past = clause.tense in PAST
    if dice.chance(0.4):
        en, _, de = state(dice, subject, past)
        en_main, de_main = clause.inverted()
        return sentence(f"{conjunction} {en}, {en_main}", f"{weil} {de}, {de_main}")
    en, _, de = state(dice, again, past)
    en_main, de_main = replace(clause, subject=subject).plain()
    return sentence(f"{en_main} {conjunction} {en}", f"{de_main}, {weil} {de}")


@pattern("subordinate", 4000)
def opinion(dice: Dice) -> Pair:
    """I think that she bought the coat yesterday. I do not know whether he can repair the radio."""
    en, de = event(dice).final()
    if dice.chance(0.6):
        en_main, de_main = dice.pick(lex.OPINIONS)
        return sentence(f"{en_main} that {en}", f"{de_main}, dass {de}")
    asking, ob = dice.pick((("whether", "ob"), ("why", "warum")))
    if dice.chance(0.3):
        return sentence(f"do you know {asking} {en}", f"wissen Sie, {ob} {de}", "?")
    en_main, de_main = dice.pick(lex.WONDERINGS)
    return sentence(f"{en_main} {asking} {en}", f"{de_main}, {ob} {de}")


@pattern("subordinate", 3500)
def condition(dice: Dice) -> Pair:
    """If it rains tomorrow, he will read a book. We can go to the cinema if you have time."""
    clause = event(dice, None, ("future", *MODALS))
    if dice.chance(0.55):
        en, de = dice.pick(lex.WEATHER)
        en_when, de_when = dice.pick(lex.FUTURE_TIMES) if dice.chance(0.5) and not clause.time[0] else ("", "")
        en, de = words(en, en_when), words(*de.format(de_when).split())
    else:
        en, _, de = state(dice, anybody(dice), past=False)
    if dice.chance(0.6):
        en_main, de_main = clause.inverted()
        return sentence(f"if {en}, {en_main}", f"wenn {de}, {de_main}")
    en_main, de_main = clause.plain()
    return sentence(f"{en_main} if {en}", f"{de_main}, wenn {de}")


@pattern("relative", 3500)
def relative(dice: Dice) -> Pair:
    """The woman who sold the red car lives in Berlin. The coat that I bought yesterday is too small."""
    if dice.chance(0.6):
        who = described(dice, lex.PEOPLE, "the", 0.3)
        pronoun = DER[who.gender][NOM]
        en, de = event(dice, Phrase("who", (pronoun,) * 3), ("past", "wanted", "had to")).final()
        main = dice.pick((lives, works, comes, feels))(dice)
        if dice.chance(0.3):
            return sentence(f"this is {who.en} {en}", f"das ist {who.de[NOM]}, {de}")
    else:
        who = described(dice, lex.BELONGINGS, "the", 0.35)
        pronoun = DER[who.gender][ACC]
        verb = dice.pick(lex.ACTS[0][1])
        en, de = Clause(anybody(dice), verb, "past", NOTHING, dice.pick(lex.PAST_TIMES)).final()
        en, de, main = f"that {en}", f"{pronoun} {de}", dice.pick((fails, costs, belongs))(dice)
    return sentence(f"{who.en} {en} {main[0]}", f"{who.de[NOM]}, {de}, {main[1]}")


def lives(dice: Dice) -> Pair:
    """Lives in Berlin."""
    en, de = dice.pick(lex.CITIES)
    return f"lives in {en}", f"wohnt in {de}"


def works(dice: Dice) -> Pair:
    """Works at the pharmacy."""
    en, de = at_place(dice.pick(lex.PLACES))
    return f"works {en}", f"arbeitet {de}"


def comes(dice: Dice) -> Pair:
    """Comes from Austria."""
    en, de = dice.pick(lex.CITIES + lex.COUNTRIES)
    return f"comes from {en}", f"kommt aus {de}"


def feels(dice: Dice) -> Pair:
    """Is tired."""
    en, de = dice.pick(lex.MOODS)
    return f"is {en}", f"ist {de}"


def fails(dice: Dice) -> Pair:
    """Is too small."""
    en, de = dice.pick(lex.FAULTS)
    return f"is too {en}", f"ist zu {de}"


def costs(dice: Dice) -> Pair:
    """Costs forty-five euros."""
    en, de = euros(dice)
    return f"costs {en}", f"kostet {de}"


def belongs(dice: Dice) -> Pair:
    """Belongs to my brother: gehört meinem Bruder."""
    en, de = person(dice).dat
    return f"belongs to {en}", f"gehört {de}"
