"""Region: priorities for who names a region, distances for who does not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.contracts import Backend, Candidate, Exchange, Live
from beacon_proxy.regions import REGIONS
from middleware.region import Region


def exchange(region: str | None = None, mode: str | None = None) -> Exchange:
    return Exchange(
        id="x",
        method="POST",
        target=b"/",
        path="/",
        headers=(),
        started=0.0,
        region=region,
        region_mode=mode,
    )


def candidate(region: str, name: str = "", *, last_resort: bool = False) -> Candidate:
    backend = Backend(
        name=name or region,
        provider="openai",
        url="http://127.0.0.1:1",
        scheme="http",
        host="127.0.0.1",
        port=1,
        region=region,
    )
    return Candidate(backend, Live(), last_resort=last_resort)


def fleet() -> list[Candidate]:
    return [candidate("asia-pacific"), candidate("eu-west"), candidate("us-east")]


def names(candidates: object) -> list[str]:
    return [c.backend.name for c in candidates]  # type: ignore[attr-defined]


def test_select_when_region_is_preferred_sets_priority_by_distance_from_it() -> None:
    chosen = Region(region="us-east").select(exchange("eu-west"), fleet())
    assert names(chosen) == ["eu-west", "us-east", "asia-pacific"]
    assert [c.priority for c in chosen] == [0, 1, 2]


def test_select_when_region_is_preferred_breaks_ties_by_distance_from_this_instance() -> None:
    chosen = Region(region="us-east").select(exchange("asia-pacific"), fleet())
    assert [(c.backend.name, c.priority, c.distance) for c in chosen] == [
        ("asia-pacific", 0, 2),
        ("us-east", 2, 0),
        ("eu-west", 2, 1),
    ]


def test_select_when_no_preference_leaves_priority_and_orders_by_nearness() -> None:
    """Cost policy rules between pools then, so far backends must not be of a lower priority."""
    chosen = Region(region="eu-west").select(exchange(), fleet())
    assert [(c.backend.name, c.priority, c.distance) for c in chosen] == [
        ("eu-west", 0, 0),
        ("us-east", 0, 1),
        ("asia-pacific", 0, 2),
    ]


def test_select_when_instance_region_is_an_alias_understands_it() -> None:
    chosen = Region(region="ams").select(exchange(), fleet())
    assert names(chosen)[0] == "eu-west"


def test_select_when_mode_is_require_drops_all_other_regions() -> None:
    region = Region(mode="require", region="us-east")
    assert names(region.select(exchange("eu-west"), fleet())) == ["eu-west"]


@pytest.mark.parametrize(
    ("configured", "asked", "kept"),
    [("prefer", "require", 1), ("require", "prefer", 3), ("require", None, 1), ("prefer", None, 3)],
)
def test_select_when_exchange_names_a_mode_it_beats_the_configured(
    configured: str, asked: str | None, kept: int
) -> None:
    region = Region(mode=configured, region="us-east")  # type: ignore[arg-type]
    assert len(region.select(exchange("eu-west", asked), fleet())) == kept


def test_select_when_required_region_has_no_backend_is_empty() -> None:
    """`require` must never leave the region: the core answers 503 and names it."""
    region = Region(region="us-east")
    assert list(region.select(exchange("mars", "require"), fleet())) == []


def test_select_when_required_region_is_none_of_ours_still_finds_its_own_name() -> None:
    chosen = Region().select(exchange("my-cellar", "require"), [*fleet(), candidate("my-cellar")])
    assert names(chosen) == ["my-cellar"]


def prepared(middleware: Region, asked: Exchange) -> tuple[str | None, str | None]:
    middleware.prepare(asked)
    return asked.region, asked.region_mode


@pytest.mark.parametrize(
    ("configured", "region", "mode", "then"),
    [
        pytest.param("prefer", None, "require", ("us-east", "require"), id="asked for"),
        pytest.param("require", None, None, ("us-east", "require"), id="configured"),
        pytest.param("require", None, "require", ("us-east", "require"), id="both"),
        pytest.param("require", "eu-west", None, ("eu-west", "require"), id="region named"),
        pytest.param("prefer", "eu-west", "require", ("eu-west", "require"), id="all named"),
        pytest.param("require", None, "prefer", (None, "prefer"), id="asked not to"),
        pytest.param("require", "eu-west", "prefer", ("eu-west", "prefer"), id="named, not to"),
        pytest.param("prefer", None, None, (None, "prefer"), id="nothing"),
        pytest.param("prefer", "eu-west", None, ("eu-west", "prefer"), id="only preferred"),
    ],
)
def test_prepare_settles_mode_and_region_where_the_client_left_them_open(
    configured: str,
    region: str | None,
    mode: str | None,
    then: tuple[str | None, str | None],
) -> None:
    """`require` without a region required nothing; and phases before this one knew no mode."""
    middleware = Region(mode=configured, region="us-east")  # type: ignore[arg-type]
    asked = exchange(region, mode)
    assert prepared(middleware, asked) == then
    assert prepared(middleware, asked) == then  # what is settled stays so


def test_prepare_when_instance_region_is_an_alias_gives_its_canonical_name() -> None:
    """Health compares it with the backends' regions as it is."""
    assert prepared(Region(mode="require", region="iad"), exchange()) == ("us-east", "require")


def test_select_when_require_was_prepared_without_a_region_keeps_this_instances_own() -> None:
    region = Region(mode="require", region="ams")
    asked = exchange()
    region.prepare(asked)
    assert names(region.select(asked, fleet())) == ["eu-west"]


def test_select_when_required_without_a_region_anywhere_keeps_all() -> None:
    """An instance that was told no region has none of its own to require."""
    region = Region(mode="require")
    asked = exchange()
    region.prepare(asked)
    assert len(region.select(asked, fleet())) == 3


def test_select_when_equally_near_keeps_the_order_it_was_given() -> None:
    same = [candidate("eu-west", name) for name in ("c", "a", "b")]
    assert names(Region(region="us-east").select(exchange("us-east"), same)) == ["c", "a", "b"]


def test_select_whatever_regions_clients_make_up_remembers_none() -> None:
    """Names of regions come from clients: they must not pile up for ever."""
    region = Region(region="us-east")
    for n in range(50):
        chosen = region.select(exchange(f"made-up-{n}"), fleet())
        assert [c.priority for c in chosen] == [3, 3, 3]
        assert names(chosen) == ["us-east", "eu-west", "asia-pacific"]
    region.select(exchange("eu-west"), fleet())
    region.select(exchange(), fleet())
    assert set(region._places) == {"eu-west", ""}


def test_select_when_last_resort_keeps_the_least_bad_first_and_behind_the_others() -> None:
    bad = [candidate("asia-pacific", "rests", last_resort=True)]
    bad.append(candidate("us-east", "ejected", last_resort=True))
    good = candidate("eu-west", "good")
    region = Region(region="us-east")
    assert names(region.select(exchange("us-east"), [*bad, good])) == ["good", "rests", "ejected"]
    assert bad[0].priority == 2  # still said, for who wants to know


def test_options_when_mode_is_unknown_names_it() -> None:
    with pytest.raises(ValueError, match=r"^mode: must be prefer or require, got 'near'$"):
        Region(mode="near")  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    here=st.sampled_from([*REGIONS, "", "moon"]),
    wanted=st.none() | st.sampled_from([*REGIONS, "moon"]),
    where=st.lists(st.sampled_from([*REGIONS, "moon", "mars"]), max_size=8),
)
def test_select_when_preferring_loses_nobody_and_is_sorted(
    here: str, wanted: str | None, where: list[str]
) -> None:
    given_ones = [candidate(region, f"{n}") for n, region in enumerate(where)]
    chosen = list(Region(region=here).select(exchange(wanted), given_ones))
    assert sorted(names(chosen)) == sorted(names(given_ones))
    keys = [(c.priority, c.distance) for c in chosen]
    assert keys == sorted(keys)
    if wanted is not None:
        assert all((c.priority == 0) == (c.backend.region == wanted) for c in chosen)
