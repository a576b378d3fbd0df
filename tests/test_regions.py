"""Region names and distances."""

from __future__ import annotations

import pytest

from beacon_proxy.regions import REGIONS, canonical_region, distance, region_of_fly


@pytest.mark.parametrize(
    ("name", "region"),
    [
        *[(name, "us-east") for name in ("US", "us", "iad", "us-east", "us-east-1", "us-east4")],
        *[(name, "eu-west") for name in ("EU", "eu", "ams", "eu-west-1", "europe-west4", "europe")],
        *[(name, "asia-pacific") for name in ("ASIA", "APAC", "asia", "sin", "asia-southeast")],
        *[(name, "asia-pacific") for name in ("ap-southeast-1", "asia-southeast1")],
        (" Us_East ", "us-east"),
    ],
)
def test_region_when_it_is_an_alias_is_spelt_in_one_way(name: str, region: str) -> None:
    assert canonical_region(name) == region


@pytest.mark.parametrize(
    ("name", "kept"),
    [("us-west-2", "us-west-2"), ("Basement_Rack", "basement-rack"), ("lab1", "lab1"), ("", "")],
)
def test_region_when_it_is_unknown_stays_itself(name: str, kept: str) -> None:
    """A silent move to another region spoils the data of who measures by region."""
    assert canonical_region(name) == kept


def test_region_when_spelt_once_stays_so() -> None:
    assert [canonical_region(region) for region in REGIONS] == list(REGIONS)


@pytest.mark.parametrize(
    ("code", "region"),
    [
        *[(code, "us-east") for code in ("iad", "lax", "gru", "yyz", "xyz", "")],
        *[(code, "eu-west") for code in ("ams", "AMS ", "fra", "jnb")],
        *[(code, "asia-pacific") for code in ("sin", "nrt", "syd", "bom")],
    ],
)
def test_fly_code_when_any_gives_one_of_the_regions(code: str, region: str) -> None:
    assert region_of_fly(code) == region


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        ("us-east", "us-east", 0),
        ("lab", "lab", 0),
        ("us-east", "eu-west", 1),
        ("us-east", "asia-pacific", 2),
        ("eu-west", "asia-pacific", 2),
        ("lab", "us-east", 3),
        ("lab", "attic", 3),
    ],
)
def test_distance_when_measured_either_way_is_the_same(a: str, b: str, apart: int) -> None:
    assert distance(a, b) == distance(b, a) == apart
