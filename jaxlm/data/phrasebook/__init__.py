"""Generates a synthetic English-German phrasebook: tens of thousands of sentence pairs from small tables and patterns.

``lexicon`` holds the words; ``grammar`` holds declension, conjugation and word order; ``draws`` makes random choices.
``situations``, ``errands`` and ``stories`` hold the patterns. A pattern is a function that draws one sentence pair.

Every English sentence has exactly one German translation, by these conventions: *you* is Sie unless the sentence
addresses somebody by the first name; the English past is the German perfect (but was, had and could are preterite);
*is doing* without a time is *gerade*; *will do* is *werden*; articles, possessives and names determine every gender.
"""

from __future__ import annotations

from jaxlm.data.phrasebook import errands, situations, stories  # noqa: F401  (importing them registers their patterns)
from jaxlm.data.phrasebook.draws import PATTERNS, Dice, Pair

DESCRIPTION = "synthetic English-German sentences from jaxlm's phrasebook generator, not natural text"
HELD_OUT = 1_000  # pairs in valid, and in test
TRIES = 4  # draws that a pattern may use for one new pair, on average, before it counts as exhausted


def draw_pairs(seed: int) -> list[Pair]:
    """All pairs, pattern by pattern; no sentence of either language occurs twice."""
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

    The splits share no sentence in either language, and each is a random sample of all patterns. The same seed gives
    the same pairs on every version of Python: the only random numbers are those of ``random.Random(seed).random()``.
    """
    drawn = draw_pairs(seed)
    roll = Dice(seed + 1).roll
    drawn = [pair for _, pair in sorted((roll(), pair) for pair in drawn)]
    return {"train": drawn[2 * HELD_OUT :], "valid": drawn[:HELD_OUT], "test": drawn[HELD_OUT : 2 * HELD_OUT]}
