"""The grammar of the phrasebook: numbers and clock times, declension, conjugation, and the order of words in a clause.

Everything here is a pure function from lexicon entries to text in both languages. A German clause has a subject, a
finite verb, a middle field and a right bracket (a prefix, a participle or an infinitive); the frames of ``Clause`` only
put these in different orders.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from jaxlm.data.phrasebook.lexicon import MONTH_DAYS, MONTHS, Adjective, Noun, Place, Verb, with_s

Pair = tuple[str, str]

# ---- Numbers, clock times, dates ----

EN_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""".split()
EN_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
DE_ONES = """null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn
    siebzehn achtzehn neunzehn""".split()
DE_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
EN_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
               "twelve": "twelfth"}  # fmt: skip
DE_ORDINALS = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}


def english_number(n: int) -> str:
    """0 to 999 in words: three hundred and twenty-one."""
    if n < 20:
        return EN_ONES[n]
    if n < 100:
        return EN_TENS[n // 10 - 2] + (f"-{EN_ONES[n % 10]}" if n % 10 else "")
    return f"{EN_ONES[n // 100]} hundred" + (f" and {english_number(n % 100)}" if n % 100 else "")


def german_number(n: int) -> str:
    """0 to 999 in words: dreihunderteinundzwanzig."""
    if n < 20:
        return DE_ONES[n]
    if n < 100:
        ones = n % 10
        return (f"{'ein' if ones == 1 else DE_ONES[ones]}und" if ones else "") + DE_TENS[n // 10 - 2]
    hundreds = "ein" if n // 100 == 1 else DE_ONES[n // 100]
    return f"{hundreds}hundert" + (german_number(n % 100) if n % 100 else "")


@cache
def number(n: int) -> Pair:
    """0 to 999 in words."""
    return english_number(n), german_number(n)


@cache
def year(n: int) -> Pair:
    """A year read in two halves: 1945, nineteen forty-five, neunzehnhundertfünfundvierzig."""
    century, rest = divmod(n, 100)
    return f"{english_number(century)} {english_number(rest)}", f"{german_number(century)}hundert{german_number(rest)}"


@cache
def ordinal(n: int) -> Pair:
    """1 to 31: (twenty-first, einundzwanzigst), the German without its ending."""
    head, dash, last = english_number(n).rpartition("-")
    last = EN_ORDINALS.get(last) or (last[:-1] + "ieth" if last.endswith("y") else last + "th")
    return head + dash + last, DE_ORDINALS.get(n) or german_number(n) + ("t" if n < 20 else "st")


def clock_times() -> tuple[Pair, ...]:
    """All readings of a twelve-hour clock in steps of five minutes that need no "half past" arithmetic but halb."""
    times = []
    for hour in range(1, 13):
        (en, de), (en_next, de_next) = number(hour), number(hour % 12 + 1)
        times.append((f"{en} o'clock", f"{'ein' if hour == 1 else de} Uhr"))
        times.append((f"half past {en}", f"halb {de_next}"))
        for minutes in (("five", "fünf"), ("ten", "zehn"), ("a quarter", "Viertel"), ("twenty", "zwanzig")):
            times.append((f"{minutes[0]} past {en}", f"{minutes[1]} nach {de}"))
            times.append((f"{minutes[0]} to {en_next}", f"{minutes[1]} vor {de_next}"))
    return tuple(times)


CLOCK = clock_times()
DATES = tuple(
    (f"{ordinal(day)[0]} of {en}", f"{ordinal(day)[1]}%s {de}")
    for (en, de), days in zip(MONTHS, MONTH_DAYS, strict=True)
    for day in range(1, days + 1)
)  # the German waits for the ending of its ordinal: am dritten Mai, der dritte Mai

# ---- Noun phrases ----

NOM, ACC, DAT = range(3)
Endings = dict[str, tuple[str, str, str]]  # by gender (p = plural), then by case
DER: Endings = {
    "m": ("der", "den", "dem"), "f": ("die", "die", "der"), "n": ("das", "das", "dem"), "p": ("die", "die", "den"),
}  # fmt: skip
EIN: Endings = {"m": ("", "en", "em"), "f": ("e", "e", "er"), "n": ("", "", "em"), "p": ("e", "e", "en")}
STRONG: Endings = {"m": ("er", "en", "em"), "f": ("e", "e", "er"), "n": ("es", "es", "em"), "p": ("e", "e", "en")}
WEAK: Endings = {"m": ("e", "en", "en"), "f": ("e", "e", "en"), "n": ("e", "e", "en"), "p": ("en", "en", "en")}
MIXED: Endings = {"m": ("er", "en", "en"), "f": ("e", "e", "en"), "n": ("es", "es", "en"), "p": ("en", "en", "en")}

# English, the German stem, its endings, and the endings of an adjective after it.
DETERMINERS: dict[str, tuple[str, str, Endings, Endings]] = {
    "the": ("the", "", DER, WEAK),
    "this": ("this", "dies", STRONG, WEAK),
    "a": ("a", "ein", EIN, MIXED),
    "no": ("a", "kein", EIN, MIXED),  # "does not buy a car": the negation is in the English verb
    "": ("", "", dict.fromkeys("mfnp", ("", "", "")), STRONG),
    "thy": ("your", "dein", EIN, MIXED),  # your, to somebody called by the first name
} | {
    en: (en, de, EIN, MIXED)
    for en, de in (("my", "mein"), ("his", "sein"), ("her", "ihr"), ("our", "unser"), ("your", "Ihr"))
}


@dataclass(frozen=True, eq=False)
class Phrase:
    """A noun phrase or pronoun: the English as subject and object, the German in three cases.

    ``person`` picks the verb form (0 ich, 1 du, 2 er, 3 wir, 4 sie); ``gender`` is m, f, n or p for plural.
    """

    en: str
    de: tuple[str, str, str]
    person: int = 2
    gender: str = "m"
    en_object: str = ""

    @property
    def acc(self) -> Pair:
        """(English object, German accusative)."""
        return self.en_object or self.en, self.de[ACC]

    @property
    def dat(self) -> Pair:
        """(English object, German dative)."""
        return self.en_object or self.en, self.de[DAT]


def words(*parts: str) -> str:
    """The parts that are not empty, with single spaces."""
    return " ".join(filter(None, parts))


@cache
def phrase(determiner: str, noun: Noun, adjective: Adjective | None = None, count: int = 1) -> Phrase:
    """Declines ``determiner adjective noun``; a ``count`` above one is written in words and replaces the determiner."""
    en_det, de_det, det_endings, adj_endings = DETERMINERS["" if count > 1 else determiner]
    gender = "p" if count > 1 else noun.gender
    en_noun = noun.en_plural if count > 1 else noun.en
    en_head, de_head = number(count) if count > 1 else (en_det, "")
    en = words(en_head, adjective.en if adjective else "", en_noun)
    if en.startswith("a ") and en[2] in "aeiou":
        en = "an " + en[2:]
    de = []
    for case in (NOM, ACC, DAT):
        if count > 1:
            de_noun = noun.de_plural + ("n" if case == DAT and noun.de_plural[-1] not in "ns" else "")
        else:
            de_noun = noun.oblique if case else noun.de
        determined = de_head or de_det + det_endings[gender][case]
        described = adjective.stem + adj_endings[gender][case] if adjective else ""
        de.append(words(determined, described, de_noun))
    return Phrase(en, tuple(de), 4 if count > 1 else 2, gender)


ME, HE, SHE, WE, THEY, YOU, THOU = (
    Phrase("I", ("ich", "mich", "mir"), 0, "", "me"),
    Phrase("he", ("er", "ihn", "ihm"), 2, "m", "him"),
    Phrase("she", ("sie", "sie", "ihr"), 2, "f", "her"),
    Phrase("we", ("wir", "uns", "uns"), 3, "p", "us"),
    Phrase("they", ("sie", "sie", "ihnen"), 4, "p", "them"),
    Phrase("you", ("Sie", "Sie", "Ihnen"), 4, "", "you"),
    Phrase("you", ("du", "dich", "dir"), 1, "", "you"),
)
IT = {gender: Phrase("it", de, 2, gender) for gender, de in
      {"m": ("er", "ihn", "ihm"), "f": ("sie", "sie", "ihr"), "n": ("es", "es", "ihm")}.items()}  # fmt: skip
CONTRACTIONS = {"in dem": "im", "in das": "ins", "an dem": "am", "an das": "ans", "zu dem": "zum", "zu der": "zur"}


def after(preposition: str, german: str) -> str:
    """A German preposition before a declined phrase, contracted with its article: in das Kino, ins Kino."""
    first, _, rest = german.partition(" ")
    joined = f"{preposition} {first}"
    return words(CONTRACTIONS.get(joined, joined), rest)


@cache
def to_place(place: Place, adjective: Adjective | None = None) -> Pair:
    """Where somebody goes: to the cinema, ins Kino; to the station, zum Bahnhof."""
    goal = phrase("the", place.noun, adjective)
    return f"to {goal.en}", after(place.de_to, goal.de[DAT if place.de_to == "zu" else ACC])


@cache
def at_place(place: Place, adjective: Adjective | None = None) -> Pair:
    """Where somebody is: at the cinema, im Kino."""
    spot = phrase("the", place.noun, adjective)
    return f"{place.en_at} {spot.en}", after(place.de_at, spot.de[DAT])


# ---- Verbs and clauses ----

HAVE = "habe hast hat haben haben".split()
BE = "bin bist ist sind sind".split()
WILL = "werde wirst wird werden werden".split()
ENGLISH_AUX = {"do": "do do does do do".split(), "be": "am are is are are".split()}
DOUBLING = ("get", "run", "travel")


@dataclass(frozen=True, eq=False)
class Tense:
    """A tense or modal: the English auxiliary of its questions, words between it and the verb (with their forms in
    statements), and the German finite auxiliary, if any, with what then stands at the end."""

    aux: str
    end: str  # prefix | participle | infinitive
    german: list[str] | None = None
    lead: tuple[str, str, str] = ("", "", "")  # base, third person, past: want to, wants to, wanted to


WANT, HAVE_TO = ("want to ", "wants to ", "wanted to "), ("have to ", "has to ", "had to ")
TENSES = {
    "present": Tense("do", "prefix"),
    "progressive": Tense("be", "prefix"),
    "past": Tense("did", "participle"),
    "future": Tense("will", "infinitive", WILL),
    "can": Tense("can", "infinitive", "kann kannst kann können können".split()),
    "must": Tense("must", "infinitive", "muss musst muss müssen müssen".split()),
    "should": Tense("should", "infinitive", "sollte solltest sollte sollten sollten".split()),
    "want": Tense("do", "infinitive", "will willst will wollen wollen".split(), WANT),
    "would like": Tense("would", "infinitive", "möchte möchtest möchte möchten möchten".split(), ("like to ",) * 3),
    "could": Tense("could", "infinitive", "konnte konntest konnte konnten konnten".split()),
    "had to": Tense("did", "infinitive", "musste musstest musste mussten mussten".split(), HAVE_TO),
    "wanted": Tense("did", "infinitive", "wollte wolltest wollte wollten wollten".split(), WANT),
}


def progressive(base: str) -> str:
    """The English -ing form."""
    if base in DOUBLING:
        return base + base[-1] + "ing"
    return (base[:-1] if base.endswith("e") and not base.endswith("ee") else base) + "ing"


def third_person(base: str) -> str:
    """The English third person singular."""
    return "has" if base == "have" else with_s(base)


@cache
def english_verb(verb: Verb, tense: str, person: int, negative: bool) -> tuple[str, str, str]:
    """(finite phrase of a statement, auxiliary of a question, what then follows the subject)."""
    form = TENSES[tense]
    aux = ENGLISH_AUX[form.aux][person] if form.aux in ENGLISH_AUX else form.aux
    base, third, past = form.lead
    rest = (progressive(verb.base) if tense == "progressive" else base + verb.base) + verb.particle
    if negative:
        return ("cannot " + rest if aux == "can" else f"{aux} not {rest}"), aux, rest
    if form.aux == "do":
        finite = (third + verb.base if base else third_person(verb.base)) + verb.particle if person == 2 else rest
    elif form.aux == "did":
        finite = (past + verb.base if base else verb.past) + verb.particle
    else:
        finite = f"{aux} {rest}"
    return finite, aux, rest


@cache
def german_verb(verb: Verb, tense: str, person: int) -> tuple[str, str, str]:
    """(finite verb, right bracket of a main clause, the whole verb at the end of a subordinate clause)."""
    form = TENSES[tense]
    if form.end == "prefix":
        finite = verb.forms[person]
        return finite, verb.prefix, verb.prefix + finite
    finite = (form.german or (BE if verb.moves else HAVE))[person]
    end = verb.participle if form.end == "participle" else verb.prefix + verb.infinitive
    return finite, end, f"{end} {finite}"


@dataclass(frozen=True)
class Complement:
    """What follows the verb: the English in one piece; the German before and after the adverb of time."""

    en: str
    early: str = ""
    late: str = ""


NOTHING = Complement("")


@dataclass(frozen=True)
class Clause:
    """Subject, verb, complement and time, to be put in the order that a sentence needs. Frames return bare text."""

    subject: Phrase
    verb: Verb
    tense: str
    complement: Complement = NOTHING
    time: Pair = ("", "")
    negative: bool = False

    def _parts(self) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
        person = self.subject.person
        return english_verb(self.verb, self.tense, person, self.negative), german_verb(self.verb, self.tense, person)

    def _middle(self, time: str) -> str:
        return words(self.complement.early, time, self.complement.late)

    def plain(self) -> Pair:
        """He bought the coat yesterday; er hat gestern den Mantel gekauft."""
        (statement, _, _), (finite, end, _) = self._parts()
        return (
            words(self.subject.en, statement, self.complement.en, self.time[0]),
            words(self.subject.de[NOM], finite, self._middle(self.time[1]), end),
        )

    def fronted(self) -> Pair:
        """Yesterday he bought the coat; gestern hat er den Mantel gekauft."""
        (statement, _, _), (finite, end, _) = self._parts()
        return (
            words(self.time[0], self.subject.en, statement, self.complement.en),
            words(self.time[1], finite, self.subject.de[NOM], self._middle(""), end),
        )

    def inverted(self) -> Pair:
        """The main clause after a subordinate one: he bought the coat yesterday; hat er gestern den Mantel gekauft."""
        (statement, _, _), (finite, end, _) = self._parts()
        return (
            words(self.subject.en, statement, self.complement.en, self.time[0]),
            words(finite, self.subject.de[NOM], self._middle(self.time[1]), end),
        )

    def question(self) -> Pair:
        """Did he buy the coat yesterday; hat er gestern den Mantel gekauft."""
        (_, aux, rest), _ = self._parts()
        return words(aux, self.subject.en, rest, self.complement.en, self.time[0]), self.inverted()[1]

    def final(self) -> Pair:
        """A subordinate clause: he bought the coat yesterday; er gestern den Mantel gekauft hat."""
        (statement, _, _), (_, _, ending) = self._parts()
        return (
            words(self.subject.en, statement, self.complement.en, self.time[0]),
            words(self.subject.de[NOM], self._middle(self.time[1]), ending),
        )
