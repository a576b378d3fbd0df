"""Imports point down only: what each part of the tree may import, read from the source by `ast`.

The floors of docs/architecture.md, lowest first. An import counts wherever it stands: at the top,
in a function, under TYPE_CHECKING (there the ground floor may also name types of aiohttp).
A module is known here by its dotted name, a package by that of its `__init__`.
"""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("beacon_proxy", "middleware", "providers")

# part (a module or a package of beacon_proxy) -> the parts it may import, itself aside
GROUND = {"contracts", "errors", "regions"}
FLOORS: dict[str, set[str]] = {
    **dict.fromkeys(GROUND, GROUND),
    "wire": GROUND,
    "plugins": GROUND,
    "config": GROUND | {"plugins"},
    "schema": GROUND | {"plugins", "config"},
    "spending": GROUND,
    "ledger": GROUND,
    "remembering": GROUND | {"ledger", "spending"},
    "scaling": GROUND,
    "ops": GROUND,
    "alerts": GROUND | {"config"},
    "discovery": GROUND | {"config"},
    "fleet": GROUND | {"wire", "spending"},
    "routing": GROUND | {"wire", "fleet", "spending"},
    "api": GROUND | {"wire", "plugins", "config", "fleet", "routing", "ops", "ledger"},
    "demo": GROUND | {"plugins", "config", "app"},
    "cli": GROUND | {"plugins", "config", "schema", "app", "demo", "ledger", "alerts"},
    "__main__": {"cli"},
}
# They put all others together.
FLOORS["parts"] = set(FLOORS) - {"schema", "api", "demo", "cli", "__main__"}
FLOORS["app"] = FLOORS["parts"] | {"api", "parts"}
OUTSIDE_OF_GROUND = {"multidict"}
TYPES_OF_GROUND = OUTSIDE_OF_GROUND | {"aiohttp"}
OUTSIDE_OF_PROVIDERS = {"multidict", "aiohttp", "aiohttp_retry", "modal"}
SHARED_BY_PROVIDERS = {
    "providers.openai",
    "providers.checking",
    "providers.reading",
}


class Import(NamedTuple):
    importer: str  # dotted module name
    target: str  # dotted; the module where it is one of the tree, else what the statement names
    line: int
    for_types: bool  # under `if TYPE_CHECKING:`


def modules(root: Path) -> dict[str, str]:
    """The source of every module below the packages."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text()
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }


def imports(sources: Mapping[str, str]) -> Iterator[Import]:
    for importer, source in sources.items():
        tree = ast.parse(source)
        typed = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(tree):
            for target in targets(node, importer, sources):
                yield Import(importer, target, node.lineno, id(node) in typed)


def targets(node: ast.AST, importer: str, sources: Mapping[str, str]) -> Iterator[str]:
    """What one statement imports, as absolute names."""
    if isinstance(node, ast.Import):
        yield from (_in_tree(alias.name, sources) or alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = importer.split(".")[: -node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            yield _in_tree(f"{base}.{alias.name}", sources) or _in_tree(base, sources) or base


def _in_tree(name: str, sources: Mapping[str, str]) -> str | None:
    return next((known for known in (name, f"{name}.__init__") if known in sources), None)


def part(module: str) -> str:
    """The row of FLOORS that a module of beacon_proxy belongs to."""
    return module.split(".")[1] if "." in module else module


def is_outside(target: str) -> bool:
    """Whether it is a third party's."""
    top = target.split(".")[0]
    return top not in PACKAGES and top not in sys.stdlib_module_names


def is_allowed(found: Import) -> bool:
    importer, top = found.importer.split(".")[0], found.target.split(".")[0]
    if top in sys.stdlib_module_names:
        return True
    if importer == "beacon_proxy":
        return _allowed_in_core(found, top)
    if top == "beacon_proxy":
        return part(found.target) in GROUND
    plugin = found.importer.split(".")[:2]  # it may have a folder of its own
    if len(found.importer.split(".")) > 2 and found.target.split(".")[:2] == plugin:
        return True
    if importer == "providers":
        return top in OUTSIDE_OF_PROVIDERS or found.target in SHARED_BY_PROVIDERS
    return False


def _allowed_in_core(found: Import, top: str) -> bool:
    here = part(found.importer)
    if top == "beacon_proxy":
        there = part(found.target)
        return there in ("__init__", here) or there in FLOORS.get(here, set())
    if here in GROUND:
        return top in (TYPES_OF_GROUND if found.for_types else OUTSIDE_OF_GROUND)
    return top not in PACKAGES


def violations(sources: Mapping[str, str]) -> list[str]:
    found = [each for each in imports(sources) if not is_allowed(each)]
    return sorted({f"{each.importer}:{each.line} imports {each.target}" for each in found})


def circle(sources: Mapping[str, str]) -> list[str]:
    """One circle of modules that import each other, or nothing; imports for types make none."""
    edges: dict[str, set[str]] = {name: set() for name in sources}
    for found in imports(sources):
        if not found.for_types and found.target in sources and found.target != found.importer:
            edges[found.importer].add(found.target)
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges[name]):
            if around := visit(target, [*trail, name]):
                return around
        done.add(name)
        return []

    return next((around for name in sorted(edges) if (around := visit(name, []))), [])


def declared() -> set[str]:
    """Import names of what setup.cfg says the proxy, its demo and its extra `modal` need."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = "\n".join((setup["options"]["install_requires"], extras["demo"], extras["modal"]))
    names = {
        re.split(r"[<>=;\[ ]", line, maxsplit=1)[0] for line in lines.splitlines() if line.strip()
    }
    called = {"PyYAML": "yaml", "dnspython": "dns"}
    return {called.get(name, name.replace("-", "_")) for name in names}


SOURCES = modules(ROOT)


def test_floors_when_the_tree_is_read_every_import_points_down() -> None:
    assert violations(SOURCES) == []


def test_floors_when_the_tree_is_read_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(SOURCES) == []


def test_floors_when_the_tree_is_read_every_module_stands_on_one() -> None:
    parts = {part(name) for name in SOURCES if name.startswith("beacon_proxy.")} - {"__init__"}
    assert parts - set(FLOORS) == set(), "give the new part a row in FLOORS"
    assert {"contracts", "errors", "wire", "routing", "ops", "api"} <= parts
    for package in PACKAGES:
        folders = {name.rpartition(".")[0] for name in SOURCES if name.startswith(f"{package}.")}
        assert {f"{folder}.__init__" for folder in folders} <= set(SOURCES), "left out of the wheel"
        assert package in folders


def test_floors_when_the_core_imports_a_third_party_setup_cfg_declares_it() -> None:
    needed = {found.target.split(".")[0] for found in imports(SOURCES) if is_outside(found.target)}
    assert needed - declared() == set()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("beacon_proxy.contracts", "import aiohttp"),
        ("beacon_proxy.contracts", "from .wire import pool"),
        ("beacon_proxy.errors", "from beacon_proxy.config import Settings"),
        ("beacon_proxy.regions", "import pydantic"),
        ("beacon_proxy.wire.pool", "from ..fleet.fleet import Fleet"),
        ("beacon_proxy.wire.pool", "from beacon_proxy import app"),
        ("beacon_proxy.wire.__init__", "from ..ops import telemetry"),
        ("beacon_proxy.wire.pool", "if TYPE_CHECKING:\n    from ..api.server import Server"),
        ("beacon_proxy.fleet.fleet", "def late():\n    from ..api import server"),
        ("beacon_proxy.fleet.fleet", "import beacon_proxy.ops.telemetry"),
        ("beacon_proxy.ops.telemetry", "from ..fleet.fleet import Fleet"),
        ("beacon_proxy.api.server", "from ..app import App"),
        ("beacon_proxy.app", "from middleware.health import Health"),
        ("beacon_proxy.cli", "import providers.golem"),
        ("beacon_proxy.newcomer", "from .contracts import Backend"),
        ("middleware.cost", "from beacon_proxy.config import Settings"),
        ("middleware.cost", "from beacon_proxy import app"),
        ("middleware.cost", "from .health import Health"),
        ("middleware.cost", "import multidict"),
        ("providers.golem", "from .modal import Modal"),
        ("providers.golem", "from beacon_proxy.wire.headers import HOP_BY_HOP"),
        ("providers.golem", "import orjson"),
        ("providers.golem", "from middleware.cost import Cost"),
    ],
)
def test_floors_when_an_import_points_up_it_is_named(module: str, line: str) -> None:
    assert len(violations(beside(module, line))) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("beacon_proxy.contracts", "if TYPE_CHECKING:\n    import aiohttp"),
        ("beacon_proxy.contracts", "from multidict import CIMultiDict"),
        ("beacon_proxy.wire.pool", "from . import connection"),
        ("beacon_proxy.wire.__init__", "from .pool import Pool"),
        ("beacon_proxy.wire.pool", "from ..errors import ProxyError"),
        ("beacon_proxy.cli", "from . import __version__"),
        ("middleware.cost", "from beacon_proxy.contracts import Exchange"),
        ("providers.golem", "from .openai import OpenAI"),
        ("providers.golem", "import aiohttp_retry"),
    ],
)
def test_floors_when_an_import_points_down_it_passes(module: str, line: str) -> None:
    assert violations(beside(module, line)) == []


def beside(module: str, line: str) -> dict[str, str]:
    """A made-up tree in which one module holds the line and the others are empty."""
    core = """
        __init__ contracts errors config.__init__ cli app wire.__init__ wire.pool wire.connection
        fleet.fleet ops.__init__ ops.telemetry api.__init__ api.server
    """
    plugins = "middleware.__init__ middleware.health providers.openai providers.modal"
    names = [*(f"beacon_proxy.{name}" for name in core.split()), *plugins.split()]
    return {**dict.fromkeys(names, ""), module: line}


def test_circle_when_two_modules_import_each_other_names_both() -> None:
    tree = beside("beacon_proxy.wire.pool", "from .connection import Connection")
    assert circle(tree) == []
    tree["beacon_proxy.wire.connection"] = "def late():\n    from . import pool"
    assert circle(tree) == [
        "beacon_proxy.wire.connection",
        "beacon_proxy.wire.pool",
        "beacon_proxy.wire.connection",
    ]
