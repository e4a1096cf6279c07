"""Greetings, numbers, dates and times."""

from __future__ import annotations

from jaxlm.data.phrasebook import lexicon as lex
from jaxlm.data.phrasebook.draws import NAMES, OWNERS, Dice, anybody, described, either, kin, pattern, person, sentence
from jaxlm.data.phrasebook.grammar import (
    CLOCK,
    DAT,
    DATES,
    ME,
    NOM,
    WE,
    Clause,
    Complement,
    Pair,
    after,
    at_place,
    number,
    ordinal,
    phrase,
    year,
)

# ---- Greetings ----

GREETINGS = lex.pairs(
    "Hello = Hallo; Good morning = Guten Morgen; Good evening = Guten Abend; Good afternoon = Guten Tag"
)
PARTINGS = lex.pairs("Goodbye = Auf Wiedersehen; Bye = Tschüss; Good night = Gute Nacht; Thank you = Danke")
WISHES = lex.pairs("""Have a good trip = Gute Reise; Have a nice weekend = Schönes Wochenende; Good luck = Viel Glück;
    Get well soon = Gute Besserung; Nice to see you again = Schön, Sie wiederzusehen;
    Have a nice evening = Schönen Abend noch; Many thanks for your help = Vielen Dank für Ihre Hilfe;
    Happy birthday = Alles Gute zum Geburtstag""")
TITLES = lex.pairs("Mr. = Herr; Mrs. = Frau")


def stranger(dice: Dice) -> Pair:
    """Mr. Weber: somebody who is Sie."""
    (mr, herr), surname = dice.pick(TITLES), dice.pick(lex.SURNAMES)
    return f"{mr} {surname}", f"{herr} {surname}"


@pattern("greetings", 150)
def how_are_you(dice: Dice) -> Pair:
    """Good morning, Mrs. Weber, how are you today?"""
    (hello, hallo), name = dice.pick(GREETINGS), dice.pick(NAMES)
    if dice.chance(0.3):
        return sentence(f"{hello}, {name}, how are you today", f"{hallo}, {name}, wie geht es dir heute", "?")
    who, wer = stranger(dice)
    return sentence(f"{hello}, {who}, how are you today", f"{hallo}, {wer}, wie geht es Ihnen heute", "?")


@pattern("greetings", 400)
def how_is_your_brother(dice: Dice) -> Pair:
    """Hello, Anna, how is your brother?"""
    hello, hallo = dice.pick(GREETINGS)
    (who, wer), your = (stranger(dice), "your") if dice.chance(0.5) else ((dice.pick(NAMES),) * 2, "thy")
    relation = phrase(your, dice.pick(lex.FAMILY.nouns))
    return sentence(f"{hello}, {who}, how is {relation.en}", f"{hallo}, {wer}, wie geht es {relation.de[DAT]}", "?")


@pattern("greetings", 250)
def goodbye(dice: Dice) -> Pair:
    """Goodbye, Mr. Koch, see you on Monday."""
    (bye, tschüss), (day, tag) = dice.pick(PARTINGS), dice.pick(lex.WEEKDAYS)
    who, wer = stranger(dice) if dice.chance(0.6) else (dice.pick(NAMES),) * 2
    return sentence(f"{bye}, {who}, see you on {day}", f"{tschüss}, {wer}, bis {tag}")


@pattern("greetings", 100)
def wish(dice: Dice) -> Pair:
    """Have a good trip, Mrs. Klein!"""
    (en, de), (who, wer) = dice.pick(WISHES), stranger(dice)
    return sentence(f"{en}, {who}", f"{de}, {wer}", "!")


@pattern("greetings", 350)
def introduction(dice: Dice) -> Pair:
    """My name is Anna Weber and I come from Berlin."""
    name, surname, (city, stadt) = dice.pick(NAMES), dice.pick(lex.SURNAMES), dice.pick(lex.CITIES)
    en = f"my name is {name} {surname} and I come from {city}"
    return sentence(en, f"ich heiße {name} {surname} und komme aus {stadt}")


@pattern("greetings", 350)
def this_is(dice: Dice) -> Pair:
    """This is Anna, my sister from Berlin."""
    name, (city, stadt) = dice.pick(NAMES), dice.pick(lex.CITIES)
    gender = "f" if name in lex.WOMEN else "m"
    relation = phrase(dice.pick(OWNERS), dice.pick([n for n in lex.FAMILY.nouns if n.gender == gender]))
    return sentence(f"this is {name}, {relation.en} from {city}", f"das ist {name}, {relation.de[NOM]} aus {stadt}")


@pattern("greetings", 400)
def thanks(dice: Dice) -> Pair:
    """Many thanks for the beautiful book, Anna."""
    present, name = described(dice, lex.BELONGINGS, "the", 0.8), dice.pick(NAMES)
    return sentence(f"many thanks for {present.acc[0]}, {name}", f"vielen Dank für {present.acc[1]}, {name}")


# ---- Numbers ----


@pattern("numbers", 700)
def arithmetic(dice: Dice) -> Pair:
    """Twelve plus thirty is forty-two."""
    a, b = dice.between(2, 60), dice.between(2, 39)
    (en_a, de_a), (en_b, de_b), (en_c, de_c) = number(a), number(b), number(a + b)
    if dice.chance(0.5):
        return sentence(f"{en_a} plus {en_b} is {en_c}", f"{de_a} plus {de_b} ist {de_c}")
    return sentence(f"{en_c} minus {en_b} is {en_a}", f"{de_c} minus {de_b} ist {de_a}")


@pattern("numbers", 500)
def age(dice: Dice) -> Pair:
    """My sister is thirty-four years old."""
    who, (en, de) = kin(dice), number(dice.between(18, 79))
    return sentence(f"{who.en} is {en} years old", f"{who.de[NOM]} ist {de} Jahre alt")


@pattern("numbers", 500)
def room_number(dice: Dice) -> Pair:
    """My room has the number three hundred and twelve."""
    room, (en, de) = phrase(dice.pick(OWNERS), lex.ROOM), number(dice.between(2, 999))
    return sentence(f"{room.en} has the number {en}", f"{room.de[NOM]} hat die Nummer {de}")


@pattern("numbers", 700)
def crowd(dice: Dice) -> Pair:
    """There are sixteen students at the museum."""
    people = phrase("", dice.pick(lex.PEOPLE.nouns), None, dice.between(2, 99))
    en, de = at_place(dice.pick(lex.PLACES))
    return sentence(f"there are {people.en} {en}", f"{de} sind {people.de[NOM]}")


@pattern("numbers", 900)
def trade(dice: Dice) -> Pair:
    """Last week he sold sixteen old chairs."""
    adjective = dice.pick(lex.BELONGINGS.adjectives) if dice.chance(0.6) else None
    goods = phrase("", dice.pick(lex.BELONGINGS.nouns), adjective, dice.between(2, 99))
    verb, time = dice.pick(lex.TRADE), dice.pick(lex.PAST_TIMES)
    return either(dice, Clause(anybody(dice), verb, "past", Complement(goods.acc[0], late=goods.acc[1]), time))


# ---- Dates ----


def on_date(dice: Dice) -> Pair:
    """On the third of May, am dritten Mai."""
    en, de = dice.pick(DATES)
    return f"on the {en}", f"am {de % 'en'}"


@pattern("dates", 400)
def today(dice: Dice) -> Pair:
    """Today is Monday, the third of May."""
    (en, de), (day, tag) = dice.pick(DATES), dice.pick(lex.WEEKDAYS)
    now, jetzt = dice.pick(lex.PRESENT_TIMES[:1] + lex.FUTURE_TIMES[:1])
    return sentence(f"{now} is {day}, the {en}", f"{jetzt} ist {tag}, der {de % 'e'}")


@pattern("dates", 500)
def birthday(dice: Dice) -> Pair:
    """Anna's birthday is on the third of May."""
    who, (on, am) = kin(dice), on_date(dice)
    return sentence(f"{who.en}'s birthday is {on}", f"{who.de[NOM]} hat {am} Geburtstag")


@pattern("dates", 900)
def takes_place(dice: Dice) -> Pair:
    """The concert takes place on Friday, the third of May."""
    what, (day, tag), (en, de) = phrase("the", dice.pick(lex.GATHERINGS)), dice.pick(lex.WEEKDAYS), dice.pick(DATES)
    gathering = what.de[NOM]
    if dice.chance(0.4):
        return sentence(f"{what.en} takes place on the {en}", f"{gathering} findet am {de % 'en'} statt")
    on = f"on {day}, the {en}"
    return sentence(f"{what.en} takes place {on}", f"{gathering} findet am {tag}, dem {de % 'en'}, statt")


@pattern("dates", 700)
def begins(dice: Dice) -> Pair:
    """The course begins on the third of May at half past two."""
    what, (on, am), (hour, uhr) = phrase("the", dice.pick(lex.GATHERINGS)), on_date(dice), dice.pick(CLOCK)
    starts, beginnt = dice.pick((("begins", "beginnt"), ("ends", "endet")))
    return sentence(f"{what.en} {starts} {on} at {hour}", f"{what.de[NOM]} {beginnt} {am} um {uhr}")


@pattern("dates", 600)
def stay(dice: Dice) -> Pair:
    """We need a room from the third to the ninth of May."""
    who, (month, monat), first = dice.pick((ME, WE)), dice.pick(lex.MONTHS), dice.between(1, 27)
    (en_1, de_1), (en_2, de_2) = ordinal(first), ordinal(dice.between(first + 1, 28))
    room = phrase("a", lex.ROOM, dice.pick((None, *lex.adjectives("quiet small big"))))
    need = "brauche" if who is ME else "brauchen"
    return sentence(
        f"{who.en} need {room.en} from the {en_1} to the {en_2} of {month}",
        f"{who.de[NOM]} {need} {room.acc[1]} vom {de_1}en bis zum {de_2}en {monat}",
    )


@pattern("dates", 700)
def born(dice: Dice) -> Pair:
    """My uncle was born on the third of May nineteen forty-five."""
    who, (on, am), (when, wann) = kin(dice), on_date(dice), year(dice.between(1910, 1999))
    return sentence(f"{who.en} was born {on} {when}", f"{who.de[NOM]} wurde {am} {wann} geboren")


@pattern("dates", 400)
def built(dice: Dice) -> Pair:
    """The old church was built in eighteen twelve."""
    site, (when, wann) = described(dice, lex.SITES, "the"), year(dice.between(18, 19) * 100 + dice.between(10, 99))
    return sentence(f"{site.en} was built in {when}", f"{site.de[NOM]} wurde {wann} gebaut")


# ---- Times ----


@pattern("times", 200)
def what_time(dice: Dice) -> Pair:
    """It is already half past two."""
    (hour, uhr), (already, schon) = (
        dice.pick(CLOCK),
        dice.pick((("", ""), (" already", " schon"), (" almost", " fast"))),
    )
    return sentence(f"it is{already} {hour}", f"es ist{schon} {uhr}")


def to_city(dice: Dice) -> Pair:
    """To Berlin, nach Berlin."""
    city, stadt = dice.pick(lex.CITIES)
    return f"to {city}", f"nach {stadt}"


def to_site(dice: Dice) -> Pair:
    """To the airport, zum Flughafen."""
    goal = phrase("the", dice.pick(lex.SITES.nouns))
    return f"to {goal.en}", after("zu", goal.de[DAT])


@pattern("times", 1200)
def departure(dice: Dice) -> Pair:
    """The next train to Berlin leaves at half past two. When does the tram to the museum leave?"""
    local, which = dice.chance(0.5), dice.pick((None, None, *lex.adjectives("next first second third")))
    vehicle = phrase("the", dice.pick(lex.VEHICLES[2:] if local else lex.VEHICLES[:3]), which)
    to, nach = to_site(dice) if local else to_city(dice)
    (hour, uhr), zug = dice.pick(CLOCK), vehicle.de[NOM]
    if dice.chance(0.25):
        return sentence(f"when does {vehicle.en} {to} leave", f"wann fährt {zug} {nach} ab", "?")
    return sentence(f"{vehicle.en} {to} leaves at {hour}", f"{zug} {nach} fährt um {uhr} ab")


@pattern("times", 700)
def arrival(dice: Dice) -> Pair:
    """The train from Hamburg arrives in Berlin at half past two."""
    vehicle, (hour, uhr) = phrase("the", dice.pick(lex.VEHICLES[:3])), dice.pick(CLOCK)
    (city, stadt), (origin, herkunft) = dice.pick(lex.CITIES[:5]), dice.pick(lex.CITIES[5:] + lex.COUNTRIES)
    en = f"{vehicle.en} from {origin} arrives in {city} at {hour}"
    return sentence(en, f"{vehicle.de[NOM]} aus {herkunft} kommt um {uhr} in {stadt} an")


@pattern("times", 600)
def opening(dice: Dice) -> Pair:
    """The pharmacy opens at nine o'clock and closes at half past six."""
    site, (hour, uhr), (until, bis) = described(dice, lex.SITES, "the", 0.2), dice.pick(CLOCK), dice.pick(CLOCK)
    en = f"{site.en} opens at {hour} and closes at {until}"
    return sentence(en, f"{site.de[NOM]} öffnet um {uhr} und schließt um {bis}")


@pattern("times", 600)
def rendezvous(dice: Dice) -> Pair:
    """Anna is waiting in front of the old church at half past two."""
    site, name, (hour, uhr) = described(dice, lex.SITES, "the", 0.3), dice.pick(NAMES), dice.pick(CLOCK)
    spot, wo = dice.pick(lex.NEAR)
    en = f"{name} is waiting {spot} {site.en} at {hour}"
    return sentence(en, f"{name} wartet um {uhr} {after(wo, site.de[DAT])}")


SOON = (*lex.FUTURE_TIMES[:1], *lex.COMING_DAYS)
DAYS = {
    "present": lex.HABITUAL,
    "past": (*lex.PAST_TIMES[:1], *lex.PAST_DAYS),
    "future": SOON,
    "must": SOON,
    "want": SOON,
}


@pattern("times", 2500)
def routine(dice: Dice) -> Pair:
    """She gets up at seven o'clock every day. Yesterday he fell asleep at half past ten."""
    tense, (hour, uhr) = dice.pick(tuple(DAYS)), dice.pick(CLOCK)
    complement, who = Complement(f"at {hour}", late=f"um {uhr}"), anybody(dice) if dice.chance(0.8) else person(dice)
    return either(dice, Clause(who, dice.pick(lex.ROUTINES), tense, complement, dice.pick(DAYS[tense])))
