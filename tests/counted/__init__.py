"""What a request and a token cost the proxy, counted instead of timed.

The whole proxy (the default configuration, five backends in two regions, access log and metrics on)
runs in a process of its own, on production's event loop. What its loop's thread does is counted:

    calls    of functions, Python's and C's; a coroutine that goes on counts as a call
    opcodes  bytecode instructions

Both are the same on every machine that runs the same minor version of Python and the locked
dependencies, however busy it is. What they cannot see: the inside of a C function (the parsers,
orjson, uvloop), system calls, the thread that writes the log, memory. `make bench` times those.

Rule 1: one client, in lock-step: a request goes out after the answer before it, a token after the
    client has the one before. So nothing is merged on its way, and every piece costs a piece.
Rule 2: a count begins and ends when the loop has nothing left to do, and the cost of beginning and
    ending is taken off, as an empty count gives it.
Rule 3: work by the clock (probes, the wheel) falls into any count. Each figure is the median of
    several counts, and each count is long against such work.

`python -m tests.counted` shows the figures, `… profile json` the functions behind one of them.
"""
