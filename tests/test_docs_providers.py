"""docs/providers.md: every cell of its table names the tests that prove it, and they are there.

`docs/providers.table` is the list that it is made from: `python -m tests.test_docs_providers`
writes the table into the page, and takes the `?` from tests that have come.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from beacon_proxy.config import load_settings, resolve_backends

from .kit_proxy import plugins

ROOT = Path(__file__).parent.parent
PAGE, LIST = ROOT / "docs" / "providers.md", ROOT / "docs" / "providers.table"
MADE = "<!-- made from providers.table by `python -m tests.test_docs_providers` -->\n"
END = "<!-- end of what is made -->\n"
FAMILIES = (
    "openai",
    "golem",
    "modal function",
    "modal server",
    "runpod queue",
    "runpod openai",
    "runpod load_balancing",
)
FEATURES = (
    "verbatim dialects",
    "streaming",
    "cancel reaches the provider",
    "cold start",
    "capacity signal",
    "probe cost",
    "price",
)


class Cell(NamedTuple):
    family: str
    feature: str
    words: str
    proofs: tuple[str, ...]  # node ids; `?` before one: still to come


def read(text: str) -> list[Cell]:
    rows = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    cells = []
    for row in rows:
        family, feature, words, proofs = (part.strip() for part in row.split("|"))
        cells.append(Cell(family, feature, words, tuple(proofs.split())))
    return cells


def drawn(cells: list[Cell]) -> str:
    """The table, and the tests under it as footnotes."""
    at = {(cell.family, cell.feature): cell for cell in cells}
    numbers: dict[tuple[str, ...], int] = {}
    lines = ["| | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    for family in FAMILIES:
        shown = []
        for feature in FEATURES:
            cell = at[family, feature]
            number = numbers.setdefault(cell.proofs, len(numbers) + 1)
            shown.append(f"{cell.words}[^{number}]")
        lines.append(f"| **{family}** | " + " | ".join(shown) + " |")
    lines.append("")
    for proofs, number in numbers.items():
        lines.append(f"[^{number}]: " + ", ".join(map(_named, proofs)))
    return "\n".join(lines) + "\n"


def _named(proof: str) -> str:
    return f"still to come: `{proof[1:]}`" if proof.startswith("?") else f"`{proof}`"


def with_table(page: str, table: str) -> str:
    before, _, rest = page.partition(MADE)
    _, _, after = rest.partition(END)
    return f"{before}{MADE}\n{table}\n{END}{after}"


@cache
def functions_in(path: str) -> set[str]:
    """The functions of a module, by its path; none where there is no such file."""
    file = ROOT / path
    if not file.is_file():
        return set()
    defined = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, defined)}


def exists(proof: str) -> bool:
    path, _, name = proof.partition("::")
    return name.startswith("test_") and name in functions_in(path)


CELLS = read(LIST.read_text())


def test_table_when_read_has_each_family_and_feature_once() -> None:
    places = [(cell.family, cell.feature) for cell in CELLS]
    assert places == [(family, feature) for family in FAMILIES for feature in FEATURES]
    assert all(cell.words for cell in CELLS)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.family}-{cell.feature}")
def test_cell_when_it_claims_something_names_tests_that_are_there(cell: Cell) -> None:
    assert cell.proofs, "nothing proves it"
    for proof in cell.proofs:
        if proof.startswith("?"):
            assert not exists(proof[1:]), (
                f"{proof[1:]} has come: python -m tests.test_docs_providers"
            )
        else:
            assert exists(proof), f"there is no {proof}"


def test_page_when_the_list_changes_is_made_anew() -> None:
    page = PAGE.read_text()
    assert page == with_table(page, drawn(CELLS)), "python -m tests.test_docs_providers mends this"


def blocks() -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks())
def test_page_when_it_shows_configuration_it_is_valid(block: str, tmp_path: Path) -> None:
    path = tmp_path / "beacon.yaml"
    path.write_text(block)
    values = dict.fromkeys(re.findall(r"\$\{(\w+)\}", block), "wk-1:ws-2")
    settings = load_settings(path, values, plugins())
    rows = yaml.safe_load(block)["backends"]
    assert [backend.name for backend in resolve_backends(settings, plugins())] == [
        row["name"] for row in rows
    ]
    assert settings.warnings == []


def test_page_when_a_family_is_built_in_tells_of_it_and_of_its_kinds() -> None:
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    told = {section.partition(":")[0]: section for section in sections}
    built_in = plugins().providers
    assert told.keys() == built_in.keys()
    for name, cls in built_in.items():
        for kind in cls.kinds[1:]:
            assert f"`{kind}`" in told[name], (name, kind)
        for word in ("Credentials", "Kinds", "Cold start", "Health checks", "A client that leaves"):
            assert f"**{word}**" in told[name], (name, word)


@pytest.mark.parametrize(
    "path", ["README.md", *(f"docs/{p.name}" for p in PAGE.parent.glob("*.md"))]
)
def test_link_when_it_is_relative_leads_somewhere(path: str) -> None:
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / path).parent.joinpath(target).exists(), target


def main() -> None:
    """Write the table into the page."""
    text = LIST.read_text()
    for proof in re.findall(r"\?(tests/\S+)", text):
        if exists(proof):
            text = text.replace(f"?{proof}", proof)
    LIST.write_text(text)
    PAGE.write_text(with_table(PAGE.read_text(), drawn(read(text))))


if __name__ == "__main__":
    sys.exit(main())
