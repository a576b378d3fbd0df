"""Installs the peers of peers.txt, each into a virtual environment that git ignores.

`BENCH_PEERS` names another folder for them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .processes import Failed

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("BENCH_PEERS", HERE / ".peers"))
_LIMIT = 900.0  # s that one installation may take; litellm brings 600 MB


def requirements() -> dict[str, str]:
    """Folder -> requirement."""
    lines = (HERE / "peers.txt").read_text().splitlines()
    rows = (line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    return dict(rows)


def version(name: str) -> str:
    """The version that peers.txt asks for."""
    return requirements()[name].partition("==")[2]


def find(name: str, program: str) -> Path:
    """A program of a peer, which is installed if it is not there in the right version.

    Raises:
        Failed: it cannot be installed.
    """
    requirement = requirements()[name]
    folder = FOLDER / name
    if not _has(folder, requirement):
        print(f"installing {requirement}", flush=True)
        try:
            _install(folder, requirement)
        except (subprocess.SubprocessError, OSError) as exc:
            shutil.rmtree(folder, ignore_errors=True)
            raise Failed(f"cannot install {requirement}: {exc}") from exc
    return folder / "bin" / program


def _has(folder: Path, requirement: str) -> bool:
    python = folder / "bin" / "python"
    if not python.exists() or python.resolve() != Path(sys.executable).resolve():
        return False  # made by another Python: a peer in Python is measured on the same as we
    project, _, wanted = requirement.partition("==")
    stem = re.sub(r"[-_.]+", "_", project.partition("[")[0])
    return any(folder.glob(f"lib/python*/site-packages/{stem}-{wanted}.dist-info"))


def _install(folder: Path, requirement: str) -> None:
    python = folder / "bin" / "python"
    commands: tuple[list[str | Path], ...] = (
        [sys.executable, "-m", "venv", "--clear", folder],
        [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", requirement],
    )
    for command in commands:
        subprocess.run(command, check=True, timeout=_LIMIT, stdin=subprocess.DEVNULL)
