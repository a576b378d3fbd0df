"""What a request and a token cost the proxy, counted instead of timed.

The whole proxy (the default configuration, five backends in two regions, access log and metrics on)
runs in a process of its own, on production's event loop. What its loop's thread does is counted:

    calls    of functions, Python's and C's; a coroutine that goes on counts as a call
    opcodes  bytecode instructions

Both come out the same on every machine with the same minor version of Python and the locked
dependencies, however busy it is. What they cannot see: the inside of a C function (the parsers,
orjson, uvloop), calls of what Cython made, system calls, the thread that writes the log, memory.
All that is for a benchmark in seconds. Twenty runs on a busy machine lie within 1 %.

Rule 1: one client, in lock-step: a request goes out after the answer before it, a token after the
    client has the one before. So nothing is merged on its way, and every piece costs a piece.
Rule 2: a count begins and ends when the loop has nothing left to do. What beginning and ending
    cost is counted alone, and taken off.
Rule 3: work by the clock (probes, the timer wheel) may fall into a count, and only ever adds to it:
    a figure is the least of several counts. What comes less often than once a count is not seen.

    python -m tests.counted                 the figures beside those that are kept
    python -m tests.counted --keep          keep them: tests/counted/kept.json
    python -m tests.counted profile json    the functions behind a figure
"""
