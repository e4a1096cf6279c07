"""What the README pages say of the code is what the code says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxlm.cli import COMMANDS
from jaxlm.compression.names import parse
from tests.benchmarks import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OTHERS = {".venv", ".git", ".pytest_cache", "runs", "build"}  # folders that are not of the repository
PAGES = [page for page in ROOT.rglob("*.md") if not OTHERS & {*page.relative_to(ROOT).parts}]


def test_the_tables_are_current():
    for page, (text, new) in tables.current().items():
        assert text == new, f"{page} is not what the programs say; run launch/readme.sh"


def test_a_table_that_is_not_current_is_found_and_mended(tmp_path):
    for page in tables.TABLES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / page).read_text()
        (tmp_path / page).write_text(text.replace("| `kv8` |", "| `kv9` |"))
    stale = {page: new for page, (text, new) in tables.current(tmp_path).items() if text != new}
    assert [page.relative_to(tmp_path).as_posix() for page in stale] == ["jaxlm/compression/README.md"]
    assert stale.popitem()[1] == (ROOT / "jaxlm/compression/README.md").read_text()
    with pytest.raises(ValueError, match="families"):
        tables.filled("a page without markers", "families", "")


def test_every_command_and_package_is_told():
    for name in COMMANDS:
        assert f"jaxlm {name}" in README, name
    for folder in sorted((ROOT / "jaxlm").iterdir()):
        if (folder / "__init__.py").is_file():
            assert f"(jaxlm/{folder.name})" in README or f"(jaxlm/{folder.name}/README.md)" in README, folder


def test_readme_fits_a_screen_and_a_half_and_its_recipes_exist():
    assert len(README.splitlines()) <= 140
    recipes = re.findall(r"^\| `([^`]+)` \|", README.partition("## Recipes")[2].partition("\n## ")[0], re.M)
    assert len(recipes) >= 10
    for recipe in recipes:
        parse(recipe)


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """Links of a page to files and headings of this repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            linked = linked / "README.md" if linked.is_dir() else linked
            assert anchor in _anchors(linked), f"{page}: {target}"


def test_paths_and_modules_that_pages_name_exist():
    """`jaxlm/x/y.py`, `tests/...`, `launch/...` and `configs/...` in code spans and blocks."""
    named = r"(?<![\w/.])((?:jaxlm|tests|launch|configs|findings)/[\w/.-]+\.(?:py|sh|md|sbatch|yaml|ipynb))"
    for page in PAGES:
        for path in re.findall(named, page.read_text()):
            if not Path(path).name.startswith("NAME."):  # it stands for any name
                assert (ROOT / path).exists(), f"{page} names {path}"
