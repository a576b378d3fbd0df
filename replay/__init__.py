"""What the proxy does with 10 000 requests, on a simulated clock: `python -m replay`.

The whole proxy runs as it is: its configuration, server, loop, middlewares, providers and records,
composed by `beacon_proxy.app.App`. Simulated are the clock, the wires and the backends behind them.
Hours pass in seconds, and the same seed gives the same figures, to the last digit.

Rule 1: nothing of the proxy is copied or patched. It reads the simulated clock because that stands
    in the place of `time.monotonic` and `time.time` before any of it is imported, so a run is a
    process of its own.
Rule 2: a backend counts its own requests, seconds and money. What the proxy recorded is compared
    with that, never with itself.
Rule 3: figures are computed from the records of a run, in another process.

    clock.py      the clock, and an event loop that jumps to its next timer; clients connect in it
    trace.py      the requests: generated from a seed
    world.py      the simulated backends: workers, cold starts, outages, money
    families.py   the providers' own classes, with the simulated backends for a transport
    clients.py    who sends the requests, reads the answers, and may leave
    run.py        one run: the proxy between the two; child.py and runs.py: in a process of its own
    figures.py    from records to figures; optimum.py: what the same work could have cost
    report.py     docs/replay.md; plot.py: the picture
"""
