"""Plugins: found by entry point, options by dataclass, made with what they declare."""

from __future__ import annotations

import configparser
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from beacon_proxy.contracts import (
    Backend,
    Call,
    Clock,
    Dialect,
    Notify,
    Prompt,
    Provider,
    Reading,
    tell_nobody,
)
from beacon_proxy.errors import ConfigError
from beacon_proxy.plugins import (
    MIDDLEWARE_GROUP,
    PROVIDER_GROUP,
    Plugins,
    build_middleware,
    build_provider,
    option_model,
)

ROOT = Path(__file__).parent.parent
Install = Callable[[str, dict[str, dict[str, str]]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package that is nothing but entry points: (name, {group: {name: value}})."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(package: str, groups: dict[str, dict[str, str]]) -> None:
        info = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        parser = configparser.ConfigParser()
        parser.read_dict(groups)
        with (info / "entry_points.txt").open("w") as file:
            parser.write(file)
        monkeypatch.syspath_prepend(str(tmp_path))  # drops the caches of importlib

    return write


def test_plugins_when_a_stranger_installs_some_are_found(install: Install, tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text("class Polite: ...\nclass Cloud: ...\n")
    install(
        "stranger",
        {MIDDLEWARE_GROUP: {"polite": "stranger:Polite"}, PROVIDER_GROUP: {"c": "stranger:Cloud"}},
    )
    plugins = Plugins.discover()
    assert plugins.middleware["polite"].__name__ == "Polite"
    assert plugins.providers["c"].__name__ == "Cloud"


def test_plugins_when_setup_cfg_is_installed_are_the_built_in_ones(install: Install) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = {}
    for group in (MIDDLEWARE_GROUP, PROVIDER_GROUP):
        rows = setup["options.entry_points"][group].strip().splitlines()
        declared[group] = dict(row.split(" = ") for row in rows)
    install("beacon-proxy", declared)
    plugins = Plugins.discover()
    assert plugins.middleware.keys() >= {"health", "region", "cost", "capacity", "failover"}
    assert plugins.providers.keys() >= {"openai", "golem", "modal", "runpod"}


def test_plugins_when_some_cannot_be_loaded_are_all_named(install: Install, tmp_path: Path) -> None:
    (tmp_path / "explodes.py").write_text("raise RuntimeError('no GPU here')\n")
    (tmp_path / "plain.py").write_text("thing = 3\n")
    values = {"gone": "no.such:Thing", "bad": "explodes:Thing", "odd": "plain:thing"}
    install("broken", {MIDDLEWARE_GROUP: values, PROVIDER_GROUP: {"less": "plain:Missing"}})
    with pytest.raises(ConfigError) as caught:
        Plugins.discover()
    gone, bad, odd, less = sorted(caught.value.problems, key=lambda line: "gbol".index(line[7]))
    assert gone.startswith(
        f"plugin gone ({MIDDLEWARE_GROUP}): no.such:Thing cannot be imported: Mod"
    )
    assert bad.endswith("explodes:Thing cannot be imported: RuntimeError: no GPU here")
    assert odd.endswith("plain:thing is not a class")
    assert less.startswith(f"plugin less ({PROVIDER_GROUP})")
    assert not any("\n" in line for line in caught.value.problems)


def test_plugins_when_a_name_is_claimed_twice_both_are_named(
    install: Install, tmp_path: Path
) -> None:
    (tmp_path / "twin.py").write_text("class A: ...\nclass B: ...\n")
    install("one", {PROVIDER_GROUP: {"cloud": "twin:A"}})
    install("two", {PROVIDER_GROUP: {"cloud": "twin:B"}})
    with pytest.raises(ConfigError, match=r"cloud .*claimed by both twin:[AB] and twin:"):
        Plugins.discover()


def test_plugins_when_one_is_listed_twice_alike_is_taken_once(
    install: Install, tmp_path: Path
) -> None:
    """An installed package run from its own source tree lists its entry points two times."""
    (tmp_path / "again.py").write_text("class A: ...\n")
    install("one", {PROVIDER_GROUP: {"cloud": "again:A"}})
    install("two", {PROVIDER_GROUP: {"cloud": "again:A"}})
    assert Plugins.discover().providers["cloud"].__name__ == "A"


@dataclass(frozen=True, slots=True)
class Split:
    left: float = field(default=0.5, metadata={"help": "share, 0..1"})

    def __post_init__(self) -> None:
        if self.left > 1:
            raise ValueError(f"left: must be <= 1, got {self.left}")


@dataclass(slots=True)
class Sample:
    """A middleware with every sort of field."""

    wait: float = field(default=2.0, metadata={"help": "s to wait"})
    split: Split = field(default_factory=Split, metadata={"help": "how it is split"})
    loud: bool = False
    clock: Clock = field(default=time.monotonic, metadata={"injected": True}, repr=False)
    rng: random.Random = field(default_factory=random.Random, metadata={"injected": True})
    region: str = field(default="", metadata={"injected": True})
    notify: Notify = field(default=tell_nobody, metadata={"injected": True}, repr=False)
    _seen: int = field(default=0, init=False, repr=False)


def test_options_when_modelled_are_the_init_fields_that_are_not_injected() -> None:
    model = option_model(Sample)
    assert list(model.model_fields) == ["wait", "split", "loud"]
    assert model.model_fields["wait"].description == "s to wait"
    assert model.model_fields["wait"].default == 2.0


def test_options_when_a_dataclass_is_nested_become_one() -> None:
    options: Any = option_model(Sample).model_validate({"split": {"left": 0.25}})
    assert options.split == Split(0.25)


@pytest.mark.parametrize(
    "options",
    [
        {"wiat": 1},
        {"clock": 1},
        {"_seen": 1},
        {"wait": True},
        {"wait": "soon"},
        {"wait": float("nan")},
        {"loud": 7},
        {"split": {"right": 1}},
        {"split": {"left": 2}},
    ],
)
def test_options_when_wrong_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        option_model(Sample).model_validate(options)


def test_options_when_the_class_is_no_dataclass_say_so() -> None:
    with pytest.raises(ConfigError, match="Path is not a dataclass"):
        option_model(Path)


def test_options_when_a_type_exists_for_checkers_only_say_so() -> None:
    @dataclass
    class Odd:
        value: Elsewhere = 1  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(ConfigError, match=r"Odd: the type of an option cannot be resolved"):
        option_model(Odd)


def test_middleware_when_built_gets_options_and_what_it_declares() -> None:
    rng = random.Random(1)
    made: Any = build_middleware(
        Sample, {"wait": 9.0}, clock=lambda: 5.0, rng=rng, region="eu-west", notify=tell_nobody
    )
    assert (made.wait, made.clock(), made.rng, made.region) == (9.0, 5.0, rng, "eu-west")


def test_middleware_when_it_declares_nothing_injected_gets_options_alone() -> None:
    assert build_middleware(
        Split, {"left": 0.1}, clock=time.monotonic, rng=random.Random(), region="us-east"
    ) == Split(0.1)


def test_provider_when_it_needs_arguments_is_a_clear_error() -> None:
    @dataclass
    class Needy:
        account: str

    with pytest.raises(ConfigError, match=r"Needy cannot be made: .*account"):
        build_provider(Needy)


class Bare:
    """What every provider has, written out."""

    name, price_per_second, pool, kinds, environment = "bare", 0.0, "burst", ("auto",), ()

    def _any(self, *args: Any) -> Any: ...

    from_environment = target = credentials = judge = check = problem = ask = read = _any


def without(*names: str) -> type:
    parts = {name: part for name, part in vars(Bare).items() if name not in names}
    return type("Less", (), parts)


def test_provider_when_it_has_every_part_is_made() -> None:
    assert build_provider(Bare).name == "bare"


@pytest.mark.parametrize("names", [("read",), ("name", "pool"), ("judge", "target")])
def test_provider_when_it_lacks_a_part_is_a_clear_error(names: tuple[str, ...]) -> None:
    """It was an AttributeError in the middle of the first exchange."""
    with pytest.raises(ConfigError, match=f"Less is no provider: it lacks {', '.join(names)}$"):
        build_provider(without(*names))


@pytest.mark.parametrize(
    ("has", "lacks"),
    [
        ("carry", "carries"),
        ("carries", "carry"),
        ("scale", "kept, scalable"),
        ("carries carry scalable kept", "scale"),
    ],
)
def test_provider_when_it_has_half_of_what_goes_together_is_a_clear_error(
    has: str, lacks: str
) -> None:
    with pytest.raises(ConfigError, match=f"it lacks {lacks}$"):
        build_provider(type("Half", (Bare,), dict.fromkeys(has.split(), Bare._any)))


@pytest.mark.parametrize(
    ("part", "value", "told"),
    [
        ("price_per_second", "x", "price_per_second must be a number of at least 0, got 'x'"),
        ("price_per_second", True, "price_per_second must be a number"),
        ("cold_start", -1, "cold_start must be a number"),
        ("stays_warm", "60", "stays_warm must be a number"),
        ("pool", "cheap", "pool must be baseline or burst, got 'cheap'"),
        ("kinds", "auto", "kinds must be a tuple of texts, got 'auto'"),
        ("kinds", (), "kinds must name at least one"),
        ("environment", ("A", 1), "environment must be a tuple of texts"),
        ("wake", Bare._any, "wake is called by nobody; did you mean wakes?"),
        ("feilds", Bare._any, "feilds is called by nobody; did you mean fields?"),
    ],
)
def test_provider_when_a_part_is_not_of_its_kind_is_a_clear_error(
    part: str, value: Any, told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_provider(type("Odd", (Bare,), {part: value}))
    (problem,) = caught.value.problems
    assert f":Odd: {told}" in problem


@pytest.mark.parametrize("part", ["read", "ask", "hop", "takes"])
def test_provider_when_a_method_is_async_that_nobody_awaits_is_a_clear_error(part: str) -> None:
    async def method(self: Any, *args: Any) -> None: ...

    with pytest.raises(ConfigError, match=f"{part} must not be async"):
        build_provider(type("Odd", (Bare,), {part: method}))


def test_provider_when_it_inherits_may_leave_out_what_has_a_body() -> None:
    class Least(Provider):
        name, price_per_second, pool = "least", 0.0, "burst"

        def ask(self, backend: Backend, prompt: Prompt) -> Call:
            return Call(b"/", b"", Dialect.OPENAI)

        def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
            return Reading()

    least = build_provider(Least)
    backend = Backend("a", "least", "http://[::1]:9/v1", "http", "::1", 9, "/v1", api_key="k")
    assert (least.kinds, least.environment, least.from_environment({}, "us-east")) == (
        ("auto",),
        (),
        [],
    )
    assert least.target(backend, b"/chat?x=%2f") == b"/v1/chat?x=%2f"
    assert least.credentials(backend) == ((b"Authorization", b"Bearer k"),)
    assert least.credentials(replace(backend, api_key="")) == ()
    assert least.judge(backend, 500, (), b"") is None
    assert least.problem(backend) is None
    assert backend.origin == "http://[::1]:9"
    assert replace(backend, scheme="https", host="h", port=443).origin == "https://h"


def test_provider_when_it_inherits_but_cannot_speak_is_a_clear_error() -> None:
    class Mute(Provider):
        name, price_per_second, pool = "mute", 0.0, "burst"

    with pytest.raises(ConfigError, match=r"Mute cannot be made: .*ask.*read"):
        build_provider(Mute)
