"""What the proxy costs, next to its peers, on the same work of the same run: `make bench`.

The load and the mock backend share one core, the proxy under test has another for itself. The
figures are CPU seconds of its whole process tree for each request and each token, for they hold on
a machine that does other things, too; latency and memory stand beside them. Contenders take turns
(A B C, A B C, …), so that a slow minute is everybody's.

    work.py        what is asked and answered, bodies.py what is large: bytes, and where they go
    framing.py     HTTP/1.1 as the load and the backend read it
    backend.py     the mock backend, a process
    load.py        the load, a process: documents.py, streams.py, transfers.py, counted in counts.py
    soak.py        the soak, a process: faults on both sides; account.py: whether it all adds up
    processes.py   a contender's process tree: start, pin, count, stop
    peers.py       installs the peers; contenders.py: how an operator configures and starts each
    bed.py         backend, contender and load together; runs.py: one run, modes.py: all modes
    results.py     medians, noise, ratios, merging; targets.py: what must be reached
    report.py      RESULTS.md and the README's table; plot.py: the picture
"""
