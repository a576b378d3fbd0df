"""Runs, each in a process of its own, side by side; their records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

COUNT, SEED = 10_000, 1
LIMIT = 600.0  # s, for all of them
_ROOT = Path(__file__).parent.parent


def records(
    count: int, seed: int, *options: Mapping[str, Any], env: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The records of one run for each of `options`.

    They are keys of beacon.yaml, but `middleware` holds the options of each by its name.

    Raises:
        RuntimeError: one of them failed; what it said stands on stderr.
    """
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "replay.child", str(count), str(seed), json.dumps(each)],
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={**os.environ, **(env or {})},
        )
        for each in options
    ]
    try:
        told = [child.communicate(timeout=LIMIT)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    failed = [child.returncode for child in children if child.returncode]
    if failed:
        raise RuntimeError(f"a run ended with status {failed[0]}")
    return [orjson.loads(text) for text in told]
