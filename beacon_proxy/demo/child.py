"""The program that each backend process of the demo runs: `python -m beacon_proxy.demo.child`.

A module of its own, since the package imports `backend`, and what is imported must not be run, too.
"""

from __future__ import annotations

from .backend import main

if __name__ == "__main__":
    main()
