"""Sentences about events: statements, questions, requests, and subordinate clauses of every kind."""

from __future__ import annotations

from dataclasses import replace

from jaxlm.data.phrasebook import lexicon as lex
from jaxlm.data.phrasebook.draws import (
    MODALS,
    NAMES,
    PAST,
    PRONOUNS,
    Dice,
    act,
    anybody,
    described,
    euros,
    event,
    gift,
    meeting,
    named,
    pattern,
    person,
    sentence,
)
from jaxlm.data.phrasebook.grammar import (
    ACC,
    BE,
    DER,
    ENGLISH_AUX,
    HAVE,
    HE,
    NOM,
    NOTHING,
    SHE,
    THOU,
    YOU,
    Clause,
    Pair,
    Phrase,
    at_place,
    words,
)
from jaxlm.data.phrasebook.situations import stranger


@pattern("statements", 4500)
def statement(dice: Dice) -> Pair:
    """She gave the child a red ball yesterday."""
    return sentence(*event(dice).plain())


@pattern("statements", 3500)
def fronted(dice: Dice) -> Pair:
    """Yesterday he bought a coat: the verb stays second, the subject follows it."""
    while True:
        clause = event(dice)
        if clause.time[0]:
            return sentence(*clause.fronted())


@pattern("questions", 4500)
def question(dice: Dice) -> Pair:
    """Can you repair the radio? Anna, did you see my brother? Why does he want to sell the car?"""
    asked = dice.pick((YOU, YOU, THOU, THOU, None))
    while (clause := event(dice, asked)).negative:
        pass
    en, de = clause.question()
    if asked is THOU:
        name = dice.pick(NAMES)
        return sentence(f"{name}, {en}", f"{name}, {de}", "?")
    if dice.chance(0.25):
        return sentence(f"why {en}", f"warum {de}", "?")
    return sentence(en, de, "?")


@pattern("questions", 1200)
def request(dice: Dice) -> Pair:
    """Please close the window, Mrs. Weber."""
    while True:
        clause = event(dice, YOU, ("future",), (act, act, gift, meeting))
        if not clause.negative and clause.verb.style != "s":
            break
    verb, middle = clause.verb, clause.complement
    en = words("please", verb.base + verb.particle, middle.en)
    de = words(verb.infinitive, "Sie", middle.early, "bitte", middle.late, verb.prefix)
    if dice.chance(0.5):
        who, wer = stranger(dice)
        en, de = f"{en}, {who}", f"{de}, {wer}"
    return sentence(en, de)


WAS, HAD = "war warst war waren waren".split(), "hatte hattest hatte hatten hatten".split()


def state(subject: Phrase, what: Pair, past: bool) -> tuple[str, str, str]:
    """Somebody is happy or has no time: (English, German main clause, German subordinate clause)."""
    (en, de), person = what, subject.person
    verb, _, rest = en.partition(" ")
    if verb == "be":
        finite, ist = (
            ("was" if person in (0, 2) else "were", WAS[person]) if past else (ENGLISH_AUX["be"][person], BE[person])
        )
    else:
        finite, ist = ("had", HAD[person]) if past else ("has" if person == 2 else "have", HAVE[person])
    return f"{subject.en} {finite} {rest}", f"{subject.de[NOM]} {ist} {de}", f"{subject.de[NOM]} {de} {ist}"


def lead(dice: Dice) -> tuple[Phrase, Phrase]:
    """The subject of a main clause, and the same person again as a pronoun."""
    if dice.chance(0.6):
        subject = dice.pick(PRONOUNS)
        return subject, subject
    subject = named(dice.pick(NAMES))
    return subject, SHE if subject.gender == "f" else HE


@pattern("subordinate", 1200)
def feeling(dice: Dice) -> Pair:
    """Anna is sad because she lost her bag yesterday."""
    subject, again = lead(dice)
    mood, stimmung = dice.pick(lex.MOODS)
    en, de, _ = state(subject, (f"be {mood}", stimmung), past=False)
    en_why, de_why = event(dice, again, ("past",)).final()
    return sentence(f"{en} because {en_why}", f"{de}, weil {de_why}")


@pattern("subordinate", 2200)
def reason(dice: Dice) -> Pair:
    """Although she was tired, Anna helped my brother. He is buying a car because he has enough money."""
    subject, again = lead(dice)
    clause, because = event(dice, again), dice.chance(0.6)
    conjunction, weil = ("because", "weil") if because else ("although", "obwohl")
    what = dice.pick(lex.MEANS if because != clause.negative else lex.HINDRANCES)
    if dice.chance(0.4):
        en, _, de = state(subject, what, clause.tense in PAST)
        en_main, de_main = clause.inverted()
        return sentence(f"{conjunction} {en}, {en_main}", f"{weil} {de}, {de_main}")
    en, _, de = state(again, what, clause.tense in PAST)
    en_main, de_main = replace(clause, subject=subject).plain()
    return sentence(f"{en_main} {conjunction} {en}", f"{de_main}, {weil} {de}")


@pattern("subordinate", 3000)
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


@pattern("subordinate", 2500)
def condition(dice: Dice) -> Pair:
    """If it rains tomorrow, he will read a book. We can go to the cinema if you have time."""
    clause = event(dice, None, ("future", *MODALS))
    if dice.chance(0.55):
        en, de = dice.pick(lex.WEATHER)
        en_when, de_when = dice.pick(lex.FUTURE_TIMES) if dice.chance(0.5) and not clause.time[0] else ("", "")
        en, de = words(en, en_when), words(*de.format(de_when).split())
    else:
        en, _, de = state(anybody(dice), dice.pick(lex.MEANS + lex.HINDRANCES), past=False)
    if dice.chance(0.6):
        en_main, de_main = clause.inverted()
        return sentence(f"if {en}, {en_main}", f"wenn {de}, {de_main}")
    en_main, de_main = clause.plain()
    return sentence(f"{en_main} if {en}", f"{de_main}, wenn {de}")


@pattern("relative", 2500)
def relative(dice: Dice) -> Pair:
    """The woman who sold the red car lives in Berlin. The coat that I bought yesterday is too small."""
    if dice.chance(0.6):
        who = described(dice, lex.PEOPLE, "the", 0.3)
        pronoun = DER[who.gender][NOM]
        en, de = event(dice, Phrase("who", (pronoun,) * 3, 2, who.gender), ("past", "wanted", "had to")).final()
        main = dice.pick((lives, waits, comes, feels))(dice)
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


def waits(dice: Dice) -> Pair:
    """Is waiting at the pharmacy."""
    en, de = at_place(dice.pick(lex.PLACES))
    return f"is waiting {en}", f"wartet gerade {de}"


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
