"""The words of the phrasebook: small bilingual tables in the notation of a printed dictionary.

Nouns read ``english gender German plural`` as in ``apple m Apfel ¨``: gender m, f, n or w (a weak masculine, which has
its plural form in every case but the nominative), then the plural as an ending (``-en``), an umlaut (``¨er``) or the
whole word. Verbs read ``style base/past [particle] infinitive[/er-form] participle``: a bar marks a separable prefix
(``an|rufen``), a plus sign a perfect with *sein* (``+gegangen``). The style says which tenses sound natural:
h habits, o single acts, s states, a accidents.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Noun:
    """A noun in both languages; ``oblique`` is the German accusative and dative singular."""

    en: str
    en_plural: str
    gender: str  # m, f, n
    de: str
    de_plural: str
    oblique: str


@dataclass(frozen=True, eq=False)
class Adjective:
    """An adjective: ``de`` stands alone (teuer), ``stem`` takes endings (teur-)."""

    en: str
    de: str
    stem: str


@dataclass(frozen=True, eq=False)
class Verb:
    """A verb: English ``base``, ``past``, ``particle``; German ``forms`` (ich, du, er, wir, sie) without ``prefix``."""

    style: str
    base: str
    past: str
    particle: str
    prefix: str
    infinitive: str
    forms: tuple[str, str, str, str, str]
    participle: str
    moves: bool  # the perfect is built with sein


UMLAUT = str.maketrans("aouAOU", "äöüÄÖÜ")
ENGLISH_PLURALS = {"child": "children", "man": "men", "woman": "women", "policeman": "policemen", "fish": "fish",
                   "mouse": "mice", "saleswoman": "saleswomen", "scarf": "scarves"}  # fmt: skip


def entries(table: str) -> list[str]:
    """The entries of a table, which semicolons separate."""
    return [" ".join(entry.split()) for entry in table.split(";")]


def pairs(table: str) -> tuple[tuple[str, str], ...]:
    """Entries ``english = German`` as pairs."""
    return tuple(tuple(side.strip() for side in entry.split("=")) for entry in entries(table))  # type: ignore[misc]


def ends_hissing(word: str) -> bool:
    """Whether an English word takes -es: box, dress, church, tomato."""
    return word.endswith(("s", "x", "ch", "sh", "o")) and not word.endswith("io")


def with_s(word: str) -> str:
    """The English plural of a regular noun, or the third person of a regular verb."""
    if word.endswith("y") and word[-2] not in "aeou":
        return word[:-1] + "ies"
    return word + ("es" if ends_hissing(word) else "s")


def german_plural(noun: str, code: str) -> str:
    """The plural that a dictionary writes as ``-en``, ``¨er`` or in full."""
    if code[0] not in "-¨":
        return code
    if code[0] == "¨":
        at = max(noun.rfind(vowel) for vowel in "aouAOU")
        if noun[at - 1 : at + 1] == "au":
            at -= 1
        noun = noun[:at] + noun[at:].translate(UMLAUT)[0] + noun[at + 1 :]
    return noun + code[1:]


def noun(entry: str) -> Noun:
    """Reads ``english gender German plural``."""
    *english, gender, de, code = entry.split()
    en, plural = " ".join(english), german_plural(de, code)
    en_plural = ENGLISH_PLURALS.get(en) or with_s(en)
    return Noun(en, en_plural, "m" if gender == "w" else gender, de, plural, plural if gender == "w" else de)


def nouns(table: str) -> tuple[Noun, ...]:
    """The nouns of a table."""
    return tuple(map(noun, entries(table)))


def verb(entry: str) -> Verb:
    """Reads ``style base/past [particle] infinitive[/er-form] participle``."""
    style, english, *particle, german, participle = entry.split()
    base, past = english.split("/")
    prefix, _, german = german.rpartition("|")
    infinitive, _, er = german.partition("/")
    stem = infinitive.removesuffix("n").removesuffix("e")
    er = er or stem + ("et" if stem.endswith(("t", "d")) else "t")
    du = er[:-1] + ("t" if er[-2] in "sßzx" else "st")
    forms = (stem + "e", du, er, infinitive, infinitive)
    tail = "".join(f" {word}" for word in particle)
    return Verb(style, base, past, tail, prefix, infinitive, forms, participle.removeprefix("+"), participle[0] == "+")


def verbs(table: str) -> tuple[Verb, ...]:
    """The verbs of a table."""
    return tuple(map(verb, entries(table)))


COLOURS = "red blue green black white yellow brown grey"
ADJECTIVES = {
    en: Adjective(en, de, stem or de)
    for en, (de, _, stem) in (
        (en, de.partition("/"))
        for en, de in pairs("""red = rot; blue = blau; green = grün; black = schwarz; white = weiß; yellow = gelb;
    brown = braun; grey = grau; new = neu; old = alt; small = klein; big = groß; beautiful = schön; cheap = billig;
    expensive = teuer/teur; heavy = schwer; good = gut; fresh = frisch; warm = warm; cold = kalt; hot = heiß; long =
    lang; short = kurz; modern = modern; young = jung; friendly = freundlich; tall = groß; nice = nett; polite =
    höflich; happy = glücklich; tired = müde/müd; interesting = interessant; quiet = ruhig; next = nächst; nearest =
    nächst; second = zweit; third = dritt; first = erst""")
    )
}


def adjectives(names: str) -> tuple[Adjective, ...]:
    """The adjectives of these English names."""
    return tuple(ADJECTIVES[name] for name in names.split())


@dataclass(frozen=True, eq=False)
class Kind:
    """Nouns of one kind, and the adjectives that go with them."""

    nouns: tuple[Noun, ...]
    adjectives: tuple[Adjective, ...]


def kind(qualities: str, table: str) -> Kind:
    """The nouns of a table with the adjectives of these English names."""
    return Kind(nouns(table), adjectives(qualities))


@dataclass(frozen=True, eq=False)
class Place:
    """A building or park: where one is (English and German preposition), and the German way to go there."""

    noun: Noun
    en_at: str
    de_at: str
    de_to: str


def place(entry: str) -> Place:
    """Reads ``english-preposition noun... where whereto``."""
    en_at, *words, de_at, de_to = entry.split()
    return Place(noun(" ".join(words)), en_at, de_at, de_to)


THINGS = kind(
    f"new old small big beautiful cheap expensive heavy {COLOURS}",
    """book n Buch ¨er; bag f Tasche -n; chair m Stuhl ¨e; clock f Uhr -en; key m Schlüssel -; bicycle n Fahrrad ¨er;
    car n Auto -s; umbrella m Regenschirm -e; suitcase m Koffer -; mirror m Spiegel -; picture n Bild -er;
    camera f Kamera -s; lamp f Lampe -n; guitar f Gitarre -n; table m Tisch -e""",
)
CLOTHES = kind(
    f"new old beautiful cheap expensive warm long short {COLOURS}",
    """coat m Mantel ¨; jacket f Jacke -n; shirt n Hemd -en; dress n Kleid -er; hat m Hut ¨e; skirt m Rock ¨e;
    sweater m Pullover -; scarf m Schal -s; tie f Krawatte -n; blouse f Bluse -n""",
)
FOOD = kind(
    "big small fresh good cheap",
    """apple m Apfel ¨; egg n Ei -er; cake m Kuchen -; pizza f Pizza Pizzen; soup f Suppe -n; salad m Salat -e;
    sausage f Wurst ¨e; roll n Brötchen -; fish m Fisch -e; orange f Orange -n; tomato f Tomate -n; pear f Birne -n""",
)
DRINKS = kind(
    "good cold hot fresh",
    """coffee m Kaffee -s; tea m Tee -s; milk f Milch -; water n Wasser -; juice m Saft ¨e; wine m Wein -e; beer n
    Bier -e; lemonade f Limonade -n""",
)
DISHES = FOOD.nouns[1:9]
CUP, GLASS, BOTTLE = nouns("cup f Tasse -n; glass n Glas ¨er; bottle f Flasche -n")
TEXTS = kind(
    "long short new old interesting beautiful",
    "letter m Brief -e; message f Nachricht -en; postcard f Postkarte -n; report m Bericht -e; story f Geschichte -n",
)
PRESS = kind(
    "new old interesting good",
    "newspaper f Zeitung -en; magazine f Zeitschrift -en; novel m Roman -e; book n Buch ¨er",
)
DEVICES = kind(
    "new old small big expensive cheap modern",
    """radio n Radio -s; television m Fernseher -; computer m Computer -; washing machine f Waschmaschine -n;
    printer m Drucker -; lamp f Lampe -n""",
)
OPENINGS = kind(
    "small big old heavy new white brown green",
    "door f Tür -en; window n Fenster -; box f Kiste -n; drawer f Schublade -n; suitcase m Koffer -",
)
FURNITURE = kind(
    f"new old small big {COLOURS}",
    "table m Tisch -e; bed n Bett -en; cupboard m Schrank ¨e; sofa n Sofa -s; chair m Stuhl ¨e; shelf n Regal -e",
)
ANIMALS = kind(
    "small big old young black white brown grey",
    "cat f Katze -n; dog m Hund -e; bird m Vogel ¨; mouse f Maus ¨e; rabbit n Kaninchen -",
)
PEOPLE = kind(
    "friendly tall nice polite happy tired",
    """man m Mann ¨er; woman f Frau -en; child n Kind -er; boy w Junge -n; girl n Mädchen -; teacher m Lehrer -;
    doctor m Arzt ¨e; waiter m Kellner -; policeman w Polizist -en; student w Student -en; guest m Gast ¨e;
    tourist w Tourist -en; neighbour w Nachbar -n; saleswoman f Verkäuferin -nen""",
)
FAMILY = kind(
    "old young",
    """brother m Bruder ¨; sister f Schwester -n; mother f Mutter ¨; father m Vater ¨; uncle m Onkel -; aunt f Tante -n;
    grandmother f Großmutter ¨; grandfather m Großvater ¨; son m Sohn ¨e; daughter f Tochter ¨; colleague w Kollege -n;
    boss m Chef -s""",
)
GATHERINGS = nouns("""concert n Konzert -e; party f Feier -n; exam f Prüfung -en; wedding f Hochzeit -en; course m
    Kurs -e; meeting f Besprechung -en; exhibition f Ausstellung -en""")
LANDMARKS = kind(
    "first second third next",
    """traffic light f Ampel -n; crossing f Kreuzung -en; church f Kirche -n; bridge f Brücke -n; corner f Ecke -n;
    tower m Turm ¨e""",
)
TICKET, ROOM, STREET = nouns("ticket f Fahrkarte -n; room n Zimmer -; street f Straße -n")
VEHICLES = nouns("train m Zug ¨e; ship n Schiff -e; bus m Bus Busse; tram f Straßenbahn -en")
LIGHT_THINGS = Kind(
    tuple(n for n in THINGS.nouns if n.en in ("book", "bag", "key", "camera", "umbrella"))
    + CLOTHES.nouns
    + TEXTS.nouns[:3],
    adjectives(f"new old {COLOURS}"),
)
BELONGINGS = Kind(THINGS.nouns + CLOTHES.nouns, adjectives(f"new old small big beautiful cheap expensive {COLOURS}"))

PLACES = tuple(map(place, entries("""at cinema n Kino -s in in; at theatre n Theater - in in; at
    museum n Museum Museen in in; at restaurant n Restaurant -s in in; in park m Park -s in in; at
    supermarket m Supermarkt ¨e in in; at school f Schule -n in in; at library f Bibliothek -en in
    in; in garden m Garten ¨ in in; at office n Büro -s in in; at station m Bahnhof ¨e an zu; at
    airport m Flughafen ¨ an zu; at market m Markt ¨e auf auf; at hospital n Krankenhaus ¨er in in;
    at bakery f Bäckerei -en in zu; at pharmacy f Apotheke -n in zu; at bank f Bank -en in zu; at
    town hall n Rathaus ¨er in zu; at hotel n Hotel -s in zu; at university f Universität -en an zu""")))  # fmt: skip
SITES = Kind(
    tuple(p.noun for p in PLACES if p.noun.en not in ("garden", "office")),
    adjectives("old new small big beautiful modern"),
)

ACTS = (  # (what, what one does with it)
    (BELONGINGS, verbs("""o buy/bought kaufen gekauft; o sell/sold verkaufen verkauft; s need/needed brauchen gebraucht;
        o look/looked for suchen gesucht; a find/found finden gefunden; a lose/lost verlieren verloren;
        a forget/forgot vergessen/vergisst vergessen; o take/took along mit|nehmen/nimmt mitgenommen""")),
    (CLOTHES, verbs("""h wear/wore tragen/trägt getragen; h wash/washed waschen/wäscht gewaschen;
        o try/tried on an|probieren anprobiert; o pack/packed ein|packen eingepackt""")),
    (FOOD, verbs("""h eat/ate essen/isst gegessen; h order/ordered bestellen bestellt; h buy/bought kaufen gekauft;
        o try/tried probieren probiert; h bring/brought along mit|bringen mitgebracht""")),
    (DRINKS, verbs("h drink/drank trinken getrunken; h order/ordered bestellen bestellt; h buy/bought kaufen gekauft")),
    (TEXTS, verbs("""h write/wrote schreiben geschrieben; h read/read lesen/liest gelesen;
        o translate/translated übersetzen übersetzt""")),
    (PRESS, verbs("h read/read lesen/liest gelesen; h buy/bought kaufen gekauft; o order/ordered bestellen bestellt")),
    (DEVICES, verbs("""o repair/repaired reparieren repariert; h turn/turned on ein|schalten eingeschaltet;
        h turn/turned off aus|schalten ausgeschaltet; h use/used benutzen benutzt""")),
    (OPENINGS, verbs("""h open/opened auf|machen aufgemacht; h close/closed zu|machen zugemacht;
        h clean/cleaned putzen geputzt""")),
    (FURNITURE, verbs("""o paint/painted streichen gestrichen; h clean/cleaned putzen geputzt;
        o carry/carried tragen/trägt getragen""")),
)  # fmt: skip
MEETINGS = verbs("""h visit/visited besuchen besucht; h meet/met treffen/trifft getroffen; h call/called an|rufen
    angerufen; h collect/collected ab|holen abgeholt; o invite/invited ein|laden/lädt eingeladen; a see/saw
    sehen/sieht gesehen; o ask/asked fragen gefragt; o greet/greeted grüßen gegrüßt""")
FAVOURS = verbs(
    "h help/helped helfen/hilft geholfen; o thank/thanked danken gedankt; o answer/answered antworten geantwortet"
)
GIFTS = verbs("""o give/gave geben/gibt gegeben; o show/showed zeigen gezeigt; o send/sent schicken geschickt;
    o lend/lent leihen geliehen; o bring/brought bringen gebracht; o sell/sold verkaufen verkauft""")
TRIPS = verbs("h go/went gehen +gegangen; h drive/drove fahren/fährt +gefahren; h come/came kommen +gekommen")
STAYS = verbs("h work/worked arbeiten gearbeitet; h wait/waited warten gewartet; o stay/stayed bleiben +geblieben")
JOURNEYS = verbs(
    "h travel/travelled reisen +gereist; h fly/flew fliegen +geflogen; h drive/drove fahren/fährt +gefahren"
)
ROUTINES = verbs("""h get/got up auf|stehen +aufgestanden; h arrive/arrived an|kommen +angekommen;
    h leave/left los|fahren/fährt +losgefahren; h wake/woke up auf|wachen +aufgewacht;
    h fall/fell asleep ein|schlafen/schläft +eingeschlafen; h have/had breakfast frühstücken gefrühstückt""")
HANDLING, TRADE = ACTS[0][1][:7], ACTS[0][1][:2]  # what also goes with "it"; with numbers
RESTS = verbs(
    "h sleep/slept schlafen/schläft geschlafen; o wait/waited warten gewartet; o play/played spielen gespielt"
)
LEAPS = verbs("o jump/jumped springen +gesprungen; o run/ran laufen/läuft +gelaufen")

WOMEN = "Anna Lena Julia Maria Clara Sophie".split()
MEN = "Paul Max Thomas Peter Felix Jonas".split()
SURNAMES = "Müller Schmidt Weber Fischer Wagner Becker Koch Hoffmann Schneider Klein".split()
CITIES = pairs("""Berlin = Berlin; Hamburg = Hamburg; Munich = München; Cologne = Köln; Vienna = Wien; Dresden =
    Dresden; Frankfurt = Frankfurt; Zurich = Zürich; Leipzig = Leipzig; Bremen = Bremen""")
COUNTRIES = pairs("""Germany = Deutschland; Austria = Österreich; France = Frankreich; Italy = Italien; Spain = Spanien;
    Poland = Polen""")
WEEKDAYS = pairs("""Monday = Montag; Tuesday = Dienstag; Wednesday = Mittwoch; Thursday = Donnerstag; Friday = Freitag;
    Saturday = Samstag; Sunday = Sonntag""")
MONTHS = pairs("""January = Januar; February = Februar; March = März; April = April; May = Mai; June = Juni; July =
    Juli; August = August; September = September; October = Oktober; November = November; December = Dezember""")
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
HABITUAL = pairs("""every day = jeden Tag; every week = jede Woche; every morning = jeden Morgen; every evening =
    jeden Abend; at the weekend = am Wochenende; in summer = im Sommer; in winter = im Winter""")
HABITUAL += tuple((f"on {en}s", f"{de.lower()}s") for en, de in WEEKDAYS)
PRESENT_TIMES = pairs("today = heute; now = jetzt; tomorrow = morgen; this evening = heute Abend")
PAST_TIMES = pairs("""yesterday = gestern; last week = letzte Woche; this morning = heute Morgen; yesterday evening =
    gestern Abend; last month = letzten Monat; last year = letztes Jahr; two days ago = vor zwei Tagen;
    a week ago = vor einer Woche; three weeks ago = vor drei Wochen; an hour ago = vor einer Stunde""")
PAST_DAYS = tuple((f"last {en}", f"letzten {de}") for en, de in WEEKDAYS)
PAST_TIMES += PAST_DAYS
FUTURE_TIMES = pairs("""tomorrow = morgen; next week = nächste Woche; this evening = heute Abend; next month =
    nächsten Monat; tomorrow morning = morgen früh; tomorrow evening = morgen Abend; in two days = in zwei Tagen; in
    a week = in einer Woche; the day after tomorrow = übermorgen""")
COMING_DAYS = tuple((f"on {en}", f"am {de}") for en, de in WEEKDAYS)
FUTURE_TIMES += COMING_DAYS
MOODS = pairs("happy = glücklich; sad = traurig; angry = wütend; nervous = nervös; satisfied = zufrieden")
MEANS = pairs(
    "be happy = glücklich; be healthy = gesund; have time = Zeit; have enough money = genug Geld; have guests = Gäste"
)
HINDRANCES = pairs("""be tired = müde; be ill = krank; be sad = traurig; be angry = wütend; have no time = keine Zeit;
    have no money = kein Geld; have a lot of work = viel Arbeit""")
WEATHER = pairs("""it rains = es {} regnet; it snows = es {} schneit; the sun shines = die Sonne {} scheint; the
    weather is good = das Wetter {} gut ist; the weather is bad = das Wetter {} schlecht ist; it is cold = es {}
    kalt ist""")
OPINIONS = pairs("""I think = ich glaube; I know = ich weiß; I hope = ich hoffe; he says = er sagt; she says = sie sagt;
    we know = wir wissen; they think = sie glauben; he hopes = er hofft; she writes = sie schreibt;
    it is good = es ist gut; it is possible = es ist möglich; everybody knows = alle wissen; we hope = wir hoffen;
    it is a pity = es ist schade; I am sure = ich bin sicher""")
WONDERINGS = pairs("""I do not know = ich weiß nicht; we do not know = wir wissen nicht; nobody knows = niemand weiß;
    she is asking = sie fragt; he is asking = er fragt; it is not clear = es ist nicht klar""")
COMPARISONS = pairs("""bigger = größer; smaller = kleiner; cheaper = billiger; more expensive = teurer; heavier =
    schwerer; older = älter; newer = neuer; more beautiful = schöner""")
FAULTS = pairs("small = klein; big = groß; expensive = teuer; heavy = schwer")
PRAISE = pairs(
    "good = gut; very good = sehr gut; excellent = ausgezeichnet; fresh = frisch; cheap = billig; delicious = lecker"
)
BLAME = pairs("cold = kalt; too hot = zu heiß; too salty = zu salzig; too small = zu klein; not fresh = nicht frisch")
VIRTUES = adjectives("new beautiful good modern")
SPOTS = pairs("on = auf; under = unter; behind = hinter; next to = neben; in front of = vor")
NEAR = SPOTS[2:]
LEAP_SPOTS = pairs("onto = auf; under = unter; behind = hinter; in front of = vor")
