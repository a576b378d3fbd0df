"""One spelling for a region and one measure of how far two are apart.

Every region that enters (configuration, header, body, query) passes `canonical_region` once, so
that the rest compares strings. A name that means none of `REGIONS` stays what it is: nothing is
silently moved to another part of the world.
"""

from __future__ import annotations

import re

REGIONS: tuple[str, ...] = ("us-east", "eu-west", "asia-pacific")

_ALIASES = {
    "us": "us-east",
    "usa": "us-east",
    "us-east": "us-east",
    "iad": "us-east",
    "eu": "eu-west",
    "europe": "eu-west",
    "eu-west": "eu-west",
    "europe-west": "eu-west",
    "ams": "eu-west",
    "asia": "asia-pacific",
    "apac": "asia-pacific",
    "asia-pacific": "asia-pacific",
    "asia-southeast": "asia-pacific",
    "ap-southeast": "asia-pacific",
    "sin": "asia-pacific",
}
_ZONE = re.compile(r"-?[0-9]{1,2}$")  # us-east-1, europe-west4

# Fly's regions outside the Americas, by the nearest of ours; every other code is us-east.
_FLY_EUROPE = frozenset({"ams", "arn", "cdg", "fra", "jnb", "lhr", "mad", "otp", "waw"})
_FLY_ASIA = frozenset({"bom", "hkg", "nrt", "sin", "syd"})


def canonical_region(name: str) -> str:
    """Spell a region in the one way: `US`, `iad` and `us-east-1` are `us-east`.

    An unknown name comes back lower-cased, with `-` for `_`.
    """
    plain = name.strip().lower().replace("_", "-")
    return _ALIASES.get(plain) or _ALIASES.get(_ZONE.sub("", plain), plain)


def region_of_fly(code: str) -> str:
    """Name the region of `REGIONS` nearest to a Fly.io region code; unknown codes are us-east."""
    plain = code.strip().lower()
    if plain in _FLY_EUROPE:
        return "eu-west"
    return "asia-pacific" if plain in _FLY_ASIA else "us-east"


def distance(a: str, b: str) -> int:
    """Rank how far two canonical regions are apart.

    0 the same, 1 across the Atlantic, 2 to or from asia-pacific, 3 where one of them is unknown.
    """
    if a == b:
        return 0
    if a not in REGIONS or b not in REGIONS:
        return 3
    return 2 if "asia-pacific" in (a, b) else 1
