"""Backends that come and go: sources that are asked again and again, and what they answered last.

Rule 1: an answer is whole or it is none. A failure of any kind leaves the last good answer
    standing; only an answer that leaves a backend out takes it away.
Rule 2: no source waits for another, and nobody waits for a source: the proxy listens first.
Rule 3: what comes from outside is data. It is checked as beacon.yaml is, row by row, and no
    `${VARIABLE}` in it is ever put in.
"""
