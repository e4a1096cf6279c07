"""Prices, directions, orders, and things: where they are, how they compare, what becomes of them."""

from __future__ import annotations

from jaxlm.data.phrasebook import lexicon as lex
from jaxlm.data.phrasebook.draws import (
    NAMES,
    OWNERS,
    PRONOUNS,
    Dice,
    described,
    drink,
    either,
    euros,
    pattern,
    person,
    sentence,
    tense_and_time,
)
from jaxlm.data.phrasebook.grammar import (
    ACC,
    CLOCK,
    DAT,
    IT,
    ME,
    NOM,
    WE,
    Clause,
    Complement,
    Pair,
    Phrase,
    after,
    number,
    phrase,
)
from jaxlm.data.phrasebook.situations import to_city, to_site

# ---- Prices ----


@pattern("prices", 1000)
def costs(dice: Dice) -> Pair:
    """The red jacket costs forty-five euros and ten cents."""
    what, (en, de) = described(dice, lex.BELONGINGS, dice.pick(("the", "this", "a")), 0.6), euros(dice)
    return sentence(f"{what.en} costs {en}", f"{what.de[NOM]} kostet {de}")


@pattern("prices", 600)
def several_cost(dice: Dice) -> Pair:
    """Twelve fresh eggs cost four euros."""
    adjective = dice.pick(lex.FOOD.adjectives) if dice.chance(0.5) else None
    what, (en, de) = phrase("", dice.pick(lex.FOOD.nouns), adjective, dice.between(2, 20)), euros(dice)
    return sentence(f"{what.en} cost {en}", f"{what.de[NOM]} kosten {de}")


@pattern("prices", 350)
def how_much(dice: Dice) -> Pair:
    """How much does this red hat cost?"""
    what = described(dice, lex.BELONGINGS, dice.pick(("the", "this")), 0.8)
    return sentence(f"how much does {what.en} cost", f"wie viel kostet {what.de[NOM]}", "?")


@pattern("prices", 600)
def paid(dice: Dice) -> Pair:
    """I paid fifty euros for the old lamp."""
    what, (en, de) = described(dice, lex.BELONGINGS, dice.pick(("the", "this", "a")), 0.6), euros(dice)
    return sentence(f"I paid {en} for {what.acc[0]}", f"ich habe {de} für {what.acc[1]} bezahlt")


@pattern("prices", 60)
def other_colour(dice: Dice) -> Pair:
    """Do you have this coat in red?"""
    colour, what = dice.pick(lex.adjectives(lex.COLOURS)), phrase("this", dice.pick(lex.CLOTHES.nouns))
    return sentence(
        f"do you have {what.en} in {colour.en}", f"haben Sie {what.de[ACC]} in {colour.de.capitalize()}", "?"
    )


@pattern("prices", 600)
def fare(dice: Dice) -> Pair:
    """Two tickets to Berlin cost ninety euros."""
    count, (to, nach), (en, de) = dice.between(1, 5), (to_city if dice.chance(0.7) else to_site)(dice), euros(dice)
    tickets = phrase("a", lex.TICKET, None, count)
    cost, kosten = ("costs", "kostet") if count == 1 else ("cost", "kosten")
    return sentence(f"{tickets.en} {to} {cost} {en}", f"{tickets.de[NOM]} {nach} {kosten} {de}")


@pattern("prices", 300)
def bill(dice: Dice) -> Pair:
    """That is twelve euros and ten cents, please."""
    en, de = euros(dice)
    return sentence(f"that is {en}, please", f"das macht {de}, bitte")


# ---- Directions ----

EXCUSE = (("", ""), ("excuse me, ", "entschuldigung, "))
SIDES = (("left", "links"), ("right", "rechts"))


@pattern("directions", 350)
def way(dice: Dice) -> Pair:
    """Excuse me, how do I get to the old station?"""
    (sorry, bitte), site = dice.pick(EXCUSE), described(dice, lex.SITES, "the", 0.7)
    return sentence(f"{sorry}how do I get to {site.en}", f"{bitte}wie komme ich {after('zu', site.de[DAT])}", "?")


@pattern("directions", 30)
def nearest(dice: Dice) -> Pair:
    """Where is the nearest pharmacy?"""
    (sorry, bitte), site = dice.pick(EXCUSE), phrase("the", dice.pick(lex.SITES.nouns), lex.ADJECTIVES["nearest"])
    return sentence(f"{sorry}where is {site.en}", f"{bitte}wo ist {site.de[NOM]}", "?")


@pattern("directions", 200)
def tell_me_where(dice: Dice) -> Pair:
    """Can you tell me where the library is?"""
    (sorry, bitte), site = dice.pick(EXCUSE), described(dice, lex.SITES, "the", 0.8)
    en = f"{sorry}can you tell me where {site.en} is"
    return sentence(en, f"{bitte}können Sie mir sagen, wo {site.de[NOM]} ist", "?")


@pattern("directions", 800)
def neighbours(dice: Dice) -> Pair:
    """The bank is next to the old museum."""
    site, other, (spot, wo) = described(dice, lex.SITES, "the"), described(dice, lex.SITES, "the"), dice.pick(lex.NEAR)
    return sentence(f"{site.en} is {spot} {other.en}", f"{site.de[NOM]} ist {after(wo, other.de[DAT])}")


@pattern("directions", 700)
def turn(dice: Dice) -> Pair:
    """Go to the station and turn left at the second traffic light."""
    (left, links), mark = dice.pick(SIDES), described(dice, lex.LANDMARKS, "the", 0.6)
    where, wohin = to_site(dice) if dice.chance(0.7) else ("straight ahead", "geradeaus")
    en = f"go {where} and turn {left} at {mark.en}"
    return sentence(en, f"gehen Sie {wohin} und biegen Sie {after('an', mark.de[DAT])} {links} ab")


@pattern("directions", 500)
def street(dice: Dice) -> Pair:
    """Go past the church and take the second street on the left."""
    (left, links), mark = dice.pick(SIDES), described(dice, lex.SITES, "the", 0.5)
    road = phrase("the", lex.STREET, dice.pick(lex.LANDMARKS.adjectives))
    en = f"go past {mark.en} and take {road.en} on the {left}"
    return sentence(en, f"gehen Sie {after('an', mark.de[DAT])} vorbei und nehmen Sie {road.de[ACC]} {links}")


@pattern("directions", 500)
def bus(dice: Dice) -> Pair:
    """Take bus number forty-one to the airport."""
    (line, linie), (to, zum) = number(dice.between(2, 99)), to_site(dice)
    return sentence(f"take bus number {line} {to}", f"nehmen Sie den Bus Nummer {linie} {zum}")


@pattern("directions", 400)
def distance(dice: Dice) -> Pair:
    """The old station is ten minutes from here."""
    site, (far, weit) = described(dice, lex.SITES, "the"), number(dice.between(2, 30))
    return sentence(f"{site.en} is {far} minutes from here", f"{site.de[NOM]} ist {weit} Minuten von hier entfernt")


# ---- Orders ----


def course(dice: Dice) -> Phrase:
    """Something to order: a fresh roll, two salads, a cup of tea."""
    if dice.chance(0.45):
        return drink(dice)
    adjective = dice.pick(lex.FOOD.adjectives) if dice.chance(0.3) else None
    return phrase("a", dice.pick(lex.FOOD.nouns), adjective, dice.pick((1, 1, 1, 2, 3)))


LIKE = lex.pairs("""I would like = ich möchte; we would like = wir möchten; I will take = ich nehme;
    we will take = wir nehmen; for me = für mich; for us = für uns""")


@pattern("orders", 1600)
def order(dice: Dice) -> Pair:
    """I would like a cup of tea and two fresh rolls, please."""
    (like, möchte), what, more = dice.pick(LIKE), course(dice), course(dice)
    return sentence(f"{like} {what.en} and {more.en}, please", f"{möchte} {what.de[ACC]} und {more.de[ACC]}, bitte")


@pattern("orders", 1200)
def bring(dice: Dice) -> Pair:
    """Could you bring my daughter a glass of milk, please?"""
    whom, what = dice.pick((ME, WE, person(dice), person(dice))), course(dice)
    en, de = f"could you bring {whom.dat[0]} {what.en}", f"könnten Sie {whom.dat[1]} bitte {what.de[ACC]} bringen"
    return sentence(f"{en}, please", de, "?")


@pattern("orders", 700)
def for_whom(dice: Dice) -> Pair:
    """A salad for my uncle and a bottle of water for me, please."""
    who, what, more = person(dice), course(dice), course(dice)
    en = f"{what.en} for {who.en} and {more.en} for me, please"
    return sentence(en, f"{what.de[ACC]} für {who.de[ACC]} und {more.de[ACC]} für mich, bitte")


@pattern("orders", 600)
def review(dice: Dice) -> Pair:
    """The soup was good, but the fish was too salty."""
    dish, other = phrase("the", dice.pick(lex.DISHES[:4])), phrase("the", dice.pick(lex.DISHES[4:]))
    if dice.chance(0.5):
        dish, other = other, dish
    (good, gut), (bad, schlecht) = dice.pick(lex.PRAISE), dice.pick(lex.BLAME)
    en = f"{dish.en} was {good}, but {other.en} was {bad}"
    return sentence(en, f"{dish.de[NOM]} war {gut}, aber {other.de[NOM]} war {schlecht}")


@pattern("orders", 500)
def mistake(dice: Dice) -> Pair:
    """Anna ordered a soup, not a salad."""
    name, dish, other = dice.pick(NAMES), dice.pick(lex.FOOD.nouns), dice.pick(lex.FOOD.nouns[1:])
    dish = phrase("a", lex.FOOD.nouns[0] if dish is other else dish)
    wrong = phrase("no", other)
    return sentence(f"{name} ordered {dish.en}, not {wrong.en}", f"{name} hat {dish.de[ACC]} bestellt, {wrong.de[ACC]}")


@pattern("orders", 600)
def reservation(dice: Dice) -> Pair:
    """A table for four people on Monday at half past seven, please."""
    (people, personen), (day, tag), (hour, uhr) = number(dice.between(2, 20)), dice.pick(lex.WEEKDAYS), dice.pick(CLOCK)
    en = f"a table for {people} people on {day} at {hour}, please"
    return sentence(en, f"einen Tisch für {personen} Personen am {tag} um {uhr}, bitte")


# ---- Things ----


def with_it(dice: Dice, noun: lex.Noun) -> Clause:
    """Somebody does something with it."""
    verb, who = dice.pick(lex.HANDLING), dice.pick(PRONOUNS)
    tense, time = tense_and_time(dice, verb)
    return Clause(who, verb, tense, Complement("it", early=IT[noun.gender].de[ACC]), time)


@pattern("things", 1300)
def where_is_it(dice: Dice) -> Pair:
    """Where is the key? I lost it yesterday."""
    noun = dice.pick(lex.BELONGINGS.nouns)
    adjective = dice.pick(lex.BELONGINGS.adjectives) if dice.chance(0.5) else None
    what, (en, de) = phrase(dice.pick((*OWNERS, "the")), noun, adjective), with_it(dice, noun).plain()
    (en, de), (where, wo) = sentence(en, de), sentence(f"where is {what.en}", f"wo ist {what.de[NOM]}", "?")
    return f"{where} {en}", f"{wo} {de}"


@pattern("things", 900)
def here_it_is(dice: Dice) -> Pair:
    """This is a beautiful coat, and I would like to buy it tomorrow."""
    noun = dice.pick(lex.BELONGINGS.nouns)
    what, (en, de) = phrase("a", noun, dice.pick(lex.BELONGINGS.adjectives)), with_it(dice, noun).plain()
    return sentence(f"this is {what.en}, and {en}", f"das ist {what.de[NOM]}, und {de}")


@pattern("things", 800)
def too_small(dice: Dice) -> Pair:
    """The coat is beautiful, but it is too expensive."""
    noun, quality, (bad, schlecht) = dice.pick(lex.BELONGINGS.nouns), dice.pick(lex.VIRTUES), dice.pick(lex.FAULTS)
    what, it = phrase(dice.pick((*OWNERS, "the", "this")), noun), IT[noun.gender].de[NOM]
    en = f"{what.en} is {quality.en}, but it is too {bad}"
    return sentence(en, f"{what.de[NOM]} ist {quality.de}, aber {it} ist zu {schlecht}")


@pattern("things", 1000)
def comparison(dice: Dice) -> Pair:
    """The blue coat is cheaper than the red dress."""
    kind = dice.pick((lex.THINGS, lex.CLOTHES))
    one, other = (
        phrase(dice.pick(determiners), dice.pick(kind.nouns), dice.pick((None, *lex.adjectives(lex.COLOURS))))
        for determiners in (("the", "my", "this"), ("the", "his", "her", "our"))
    )
    cheaper, billiger = dice.pick(lex.COMPARISONS)
    return sentence(f"{one.en} is {cheaper} than {other.en}", f"{one.de[NOM]} ist {billiger} als {other.de[NOM]}")


@pattern("places", 700)
def lies(dice: Dice) -> Pair:
    """The book is under the old table: where takes the dative."""
    what, (spot, wo) = described(dice, lex.LIGHT_THINGS, dice.pick(("the", *OWNERS)), 0.3), dice.pick(lex.SPOTS)
    base = described(dice, lex.FURNITURE, "the", 0.4)
    return sentence(f"{what.en} is {spot} {base.en}", f"{what.de[NOM]} ist {after(wo, base.de[DAT])}")


@pattern("places", 700)
def lay(dice: Dice) -> Pair:
    """Please put the book on the table: where to takes the accusative."""
    what, (spot, wo) = described(dice, lex.LIGHT_THINGS, dice.pick(("the", *OWNERS)), 0.3), dice.pick(lex.SPOTS)
    base = described(dice, lex.FURNITURE, "the", 0.4)
    en = f"please put {what.en} {spot} {base.en}"
    return sentence(en, f"legen Sie bitte {what.de[ACC]} {after(wo, base.de[ACC])}")


@pattern("places", 900)
def animal(dice: Dice) -> Pair:
    """The cat is sleeping on the sofa (dative); the dog jumped onto the bed yesterday (accusative)."""
    who, base = (
        described(dice, lex.ANIMALS, dice.pick(("the", *OWNERS)), 0.3),
        described(dice, lex.FURNITURE, "the", 0.3),
    )
    leaps = dice.chance(0.5)
    verb, (spot, wo) = dice.pick(lex.LEAPS if leaps else lex.RESTS), dice.pick(lex.LEAP_SPOTS if leaps else lex.SPOTS)
    tense = dice.pick(("progressive", "past", "past"))
    time = ("", "gerade") if tense == "progressive" else dice.pick(lex.PAST_TIMES)
    where = Complement(f"{spot} {base.en}", late=after(wo, base.de[ACC if leaps else DAT]))
    return either(dice, Clause(who, verb, tense, where, time))
