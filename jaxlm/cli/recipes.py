"""Lists the recipes of ``jaxlm compress``.

    jaxlm recipes

Recipes are joined with "+" and applied from left to right; the numbers in a name can be changed. "on CPU" says how fast
a model with matrices of 512 x 512 or more runs on a CPU: "faster" than the dense model, or "as dense", because its
weights are expanded when it is loaded, which saves space only on disk. With jax 0.12, integers with one scale per
output channel (-channel) are faster too. GPUs and TPUs keep every recipe in its stored form, 4-bit integers two to a
byte; their speed has not been measured.
"""

from __future__ import annotations

import argparse

from jaxlm.cli.output import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no arguments."""


def run(args: argparse.Namespace) -> None:
    from jaxlm.compression.names import NAMES, STORAGE

    print_table([
        {"recipe": name.example, "data": name.data, "on CPU": name.on_cpu, "what it does": name.meaning}
        for name in (*NAMES, STORAGE)
    ])
