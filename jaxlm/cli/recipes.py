"""Lists the recipes of ``jaxlm compress``.

    jaxlm recipes

They compose with "+", applied from left to right; numbers in a name are yours to choose.
"""

from __future__ import annotations

from jaxlm.cli.output import print_table


def add_arguments(parser) -> None:
    """It takes none."""


def run(args) -> None:
    from jaxlm.compression.names import NAMES, STORAGE

    print_table([
        {"recipe": name.example, "data": name.data, "what it does": name.meaning}
        for name in (*NAMES, STORAGE)
    ])
