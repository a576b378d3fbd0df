"""A request as the input of a RunPod job.

What worker-vllm takes (its README and src/handler.py): `openai_route` with `openai_input`, which is
the client's own body, byte for byte; or `prompt` with `sampling_params`. A handler of one's own
finds a plain `prompt` with the usual settings beside it.
"""

from __future__ import annotations

import json
from math import inf

from beacon_proxy.contracts import Backend, Prompt, Submission

_SHORTEST_RUN, _SHORTEST_LIFE = 5.0, 10.0  # s, RunPod's own bounds of a policy
_LONGEST = 7 * 86_400.0
_RUN = 3600.0  # s for a job that nothing else limits; RunPod's own default would cut at 600
_LIFE = 86_400.0  # s, RunPod's own default
_SLACK = 5.0  # s: whoever is still there ends a job by a cancel; the policy is for when nobody is


def body_of(backend: Backend, submission: Submission, now: float) -> bytes:
    """The body of `/run` or `/runsync`; `now` is monotonic s.

    Raises:
        ValueError: the client's body is no JSON object. It is embedded as it is, so it must be one:
            anything else could say more than `input`, such as a webhook.
    """
    if submission.prompt is not None:
        asked = json.dumps(_plain(submission.prompt)).encode()
    else:
        require_object(submission.body)
        route = json.dumps(route_of(submission.path)).encode()
        asked = b'{"openai_route":%b,"openai_input":%b}' % (route, submission.body.strip())
    policy = json.dumps(policy_of(backend, submission, now)).encode()
    return b'{"input":%b,"policy":%b}' % (asked, policy)


def _plain(prompt: Prompt) -> dict[str, object]:
    settings = {"temperature": prompt.temperature, "max_tokens": prompt.max_tokens}
    return {
        "prompt": prompt.prompt,
        "model": prompt.model,
        **settings,
        "sampling_params": settings,
        "stream": prompt.stream,
    }


def route_of(path: str) -> str:
    """The route as vLLM serves it: clients with a base URL of their own leave `/v1` out."""
    return path if path.startswith("/v1/") else f"/v1{path}"


def require_object(body: bytes) -> None:
    """Raise ValueError unless `body` is one JSON object in UTF-8, and nothing else."""
    try:
        document = json.loads(body.decode(), parse_constant=_refuse)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def policy_of(backend: Backend, submission: Submission, now: float) -> dict[str, int]:
    """How long the job may run, and exist at all, in ms.

    RunPod counts the time in the queue toward `ttl` alone.
    """
    if submission.deadline < inf:
        run = life = submission.deadline - now + _SLACK
    else:
        limit = 0.0 if submission.stream else backend.timeouts.document
        run = (limit or _RUN - _SLACK) + _SLACK
        cold = backend.cold_timeouts or backend.timeouts
        wait = max(submission.patience, cold.first_content or inf)
        life = run + (wait if wait < inf else _LIFE)
    return {
        "executionTimeout": _ms(run, _SHORTEST_RUN),
        "ttl": _ms(life, _SHORTEST_LIFE),
    }


def _ms(seconds: float, least: float) -> int:
    return int(min(max(seconds, least), _LONGEST) * 1000)
