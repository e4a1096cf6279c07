"""What README says of the code is what the code says of itself."""

from __future__ import annotations

from pathlib import Path

from jaxlm.checkpoint import hf_maps
from jaxlm.cli.main import COMMANDS
from jaxlm.compression import names

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_table_of_families_is_that_of_the_maps():
    assert hf_maps.markdown() in README, "print it with: python -m jaxlm.checkpoint.hf_maps"


def test_the_table_of_recipes_is_that_of_the_names():
    assert names.markdown() in README, "print it with: python -m jaxlm.compression.names"


def test_every_command_is_told():
    for name in COMMANDS:
        assert f"jaxlm {name} " in README or f"{name}.sh" in README, name
