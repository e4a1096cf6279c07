"""A synthetic English-German phrasebook: tens of thousands of sentence pairs from small tables and pattern functions.

``lexicon`` holds the words, ``grammar`` declension, conjugation and word order, ``draws`` chance; ``situations``,
``errands`` and ``stories`` the patterns, each a small function that draws one pair. Every English sentence has one
German translation. The conventions that make it so: *you* is Sie unless the sentence addresses somebody by the first
name, the English past is the German perfect (was, had and could stay preterite), *is doing* without a time is *gerade*,
*will do* is *werden*, and articles, possessives and names settle every gender.
"""

from __future__ import annotations

from jaxlm.data.phrasebook import errands, situations, stories  # noqa: F401  (they enter their patterns)
from jaxlm.data.phrasebook.draws import PATTERNS, Dice, Pair

DESCRIPTION = "synthetic English-German sentences from jaxlm's phrasebook generator, not natural text"
HELD_OUT = 1_000  # pairs in valid, and in test
TRIES = 4  # draws a pattern may spend on one new pair before it counts as exhausted, on average


def draw_pairs(seed: int) -> list[Pair]:
    """All pairs, pattern after pattern; no English and no German sentence comes twice."""
    dice, drawn, english, german = Dice(seed), [], set(), set()
    for pattern in PATTERNS:
        wanted = pattern.share
        for _ in range(TRIES * pattern.share):
            en, de = pattern.draw(dice)
            if en in english or de in german:
                continue
            english.add(en)
            german.add(de)
            drawn.append((en, de))
            wanted -= 1
            if not wanted:
                break
    return drawn


def generate(seed: int = 0) -> dict[str, list[Pair]]:
    """Distinct (English, German) pairs by split: ``train`` (at least 50,000), ``valid`` and ``test`` (1,000 each).

    The splits share no sentence on either side, and each is a fair sample of all patterns. The same seed gives the same
    pairs on every Python: the only source of chance is the stream of ``random.Random(seed).random()``.
    """
    drawn = draw_pairs(seed)
    roll = Dice(seed + 1).roll
    drawn = [pair for _, pair in sorted((roll(), pair) for pair in drawn)]
    return {"train": drawn[2 * HELD_OUT :], "valid": drawn[:HELD_OUT], "test": drawn[HELD_OUT : 2 * HELD_OUT]}
