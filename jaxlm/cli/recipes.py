"""Lists the recipes of ``jaxlm compress``.

    jaxlm recipes

They compose with "+", applied from left to right; numbers in a name are yours to choose. "on CPU" says how a model of
matrices from about 512 x 512 on runs there: "faster" than the dense one, or "as dense", its weights expanded when it
is loaded, which saves space on disk only. With jax 0.12, integers of one scale an output channel (-channel) are faster
too. GPUs and TPUs hold every recipe as it is stored, 4-bit integers two a byte; their speed has not been measured.
"""

from __future__ import annotations

from jaxlm.cli.output import print_table


def add_arguments(parser) -> None:
    """It takes none."""


def run(args) -> None:
    from jaxlm.compression.names import NAMES, STORAGE

    print_table([
        {"recipe": name.example, "data": name.data, "on CPU": name.on_cpu, "what it does": name.meaning}
        for name in (*NAMES, STORAGE)
    ])
