"""The tables in README pages that programs make, each written between its markers ``<!-- name -->`` and
``<!-- /name -->``.

    python -m tests.benchmarks.tables [--check]        # launch/readme.sh runs it

With ``--check`` nothing is written; the exit status is 1 and the difference is printed where a page is not current.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxlm.compression import names
from jaxlm.hf.families import registry
from tests.benchmarks.compression import compression_reference, multi30k_pareto
from tests.benchmarks.planning import plan_tables, weak_scaling

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/benchmarks/results"


def _result(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text())


# Page -> marker -> what makes the table.
TABLES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "jaxlm/hf/README.md": {"families": registry.markdown},
    "jaxlm/compression/README.md": {"recipes": names.markdown},
    "jaxlm/planning/README.md": {
        "plan": lambda: plan_tables.tables(RESULTS / "plan"),
        "scaling": lambda: weak_scaling.markdown(
            sorted(_result("weak_scaling.json"), key=lambda row: (row["split"], row["chips"]))
        ),
    },
    "tests/benchmarks/README.md": {
        "pareto": lambda: multi30k_pareto.markdown(_result("multi30k_pareto.json")),
        "compression": lambda: compression_reference.markdown(_result("compression_reference.json")),
    },
}


def filled(text: str, name: str, table: str) -> str:
    """A page with ``table`` between the markers of that name.

    Raises:
        ValueError: the page does not have these markers.
    """
    before, opening, rest = text.partition(f"<!-- {name} -->\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    if not opening or not closing:
        raise ValueError(f"no markers <!-- {name} --> and <!-- /{name} -->")
    return f"{before}{opening}{table}\n{closing}{after}"


def current(root: Path = ROOT) -> dict[Path, tuple[str, str]]:
    """For each page, what it says and what it should say."""
    pages = {}
    for page, tables in TABLES.items():
        text = new = (root / page).read_text()
        for name, make in tables.items():
            new = filled(new, name, make())
        pages[root / page] = (text, new)
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not current")
    check = parser.parse_args().check
    stale = {page: texts for page, texts in current().items() if texts[0] != texts[1]}
    for page, (old, new) in stale.items():
        if check:
            lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(page), "what the programs say")
            sys.stderr.writelines(lines)
        else:
            page.write_text(new)
            print(f"{page} is written", file=sys.stderr)
    if check and stale:
        sys.exit("README tables are not current: run launch/readme.sh")


if __name__ == "__main__":
    main()
