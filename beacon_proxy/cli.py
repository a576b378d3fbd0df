"""The command line: `beacon-proxy serve | check | costs | demo`.

What a command needs is imported when it runs: `--help` and a usage error answer at once, and
`check` never loads the data path. Every way to fail is a clear line a problem on stderr and exit 1.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from .config import Settings
    from .plugins import Plugins

_SINCE = re.compile(r"[1-9][0-9]{0,5}[smhdw]")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    args = _parser().parse_args(argv)
    from .errors import ConfigError

    commands = {
        "serve": _serve,
        "check": _check,
        "costs": _costs,
        "alerts": _alerts,
        "demo": _demo,
    }
    try:
        return commands[args.command](args)
    except ConfigError as exc:
        print(*exc.problems, sep="\n", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def _serve(args: argparse.Namespace) -> int:
    settings, plugins = _load(args.config)
    listen = {"host": args.host, "port": args.port}
    chosen = {key: value for key, value in listen.items() if value is not None}
    server = settings.server.model_copy(update=chosen)
    settings = settings.model_copy(update={"server": server})
    from .app import run

    try:
        return run(settings, plugins)
    except OSError as exc:  # a taken port, an address that is not ours, no right to the port
        number = exc.errno or 0  # the resolver's are negative, and come with words of their own
        reason = os.strerror(number) if number > 0 else exc.strerror or exc
        _say(f"cannot listen on {server.host}:{server.port}: {reason}")
        return 1


def _check(args: argparse.Namespace) -> int:
    from .config import make_settings, read_settings, resolve_backends
    from .plugins import Plugins

    written = read_settings(args.config)
    warnings = _incomplete(written)
    for warning in warnings:  # before all else: without a backend, they are why there is none
        _say(f"warning: {warning}")
    plugins = Plugins.discover()
    settings = make_settings(written, os.environ, plugins)
    resolve_backends(settings, plugins)
    for warning in settings.warnings:
        _say(f"warning: {warning}")
    count = len(warnings) + len(settings.warnings)
    warned = f", {count} warning{'s' * (count > 1)} above" if count else ""
    chain = ", ".join(entry.name for entry in settings.middleware)
    backends = ", ".join(row.name for row in settings.backends) or "none of its own"
    if settings.discovery:
        backends += f", and those of {len(settings.discovery)} discovery source(s)"
    print(f"configuration is valid{warned}; backends: {backends}; middleware: {chain or 'none'}")
    return 0


# A variable, and the one without which it does nothing.
_PARTNERS = {"MODAL_API_TOKEN": "MODAL_API_BASE", "RUNPOD_API_KEY": "RUNPOD_ENDPOINT_ID"}


def _incomplete(written: Mapping[str, Any]) -> list[str]:
    """The variables that give no backend, where it is the environment that gives the backends."""
    if "backends" in written:
        return []
    given = {name for name, value in os.environ.items() if value.strip()}
    return [
        f"environment.{name}: is set, but gives no backend without {partner}"
        for name, partner in _PARTNERS.items()
        if name in given and partner not in given
    ]


def _costs(args: argparse.Namespace) -> int:
    from .config import ledger_settings, read_settings
    from .ledger import LedgerError, report
    from .ledger.formats import FORMATS

    written = read_settings(args.config)
    path = ledger_settings(written, os.environ).path
    if not path:
        _say("costs: no ledger is kept, as ledger.path is empty")
        return 1
    try:
        found = report(path, args.since, args.by, math.inf)  # who waits has Ctrl-C
    except LedgerError as exc:
        _say(f"costs: {Path(path).absolute()}: {exc}")
        return 1
    sys.stdout.write(FORMATS[args.format](found.document(_rent(written))))
    return 0


def _rent(written: Mapping[str, Any]) -> float | None:
    """USD an hour of what is rented; None where the ledger is read without the configuration."""
    from .config import make_settings, resolve_backends
    from .errors import ConfigError
    from .ledger import rent_per_hour
    from .plugins import Plugins

    try:
        plugins = Plugins.discover()
        settings = make_settings(written, os.environ, plugins)
        return rent_per_hour(resolve_backends(settings, plugins), time.time())
    except ConfigError:
        _say("warning: rents are not known: `beacon-proxy check` says what is wrong")
        return None


def _alerts(args: argparse.Namespace) -> int:
    settings, _ = _load(args.config)
    if not settings.alerts.webhooks:
        _say("alerts: there is no webhook to test; add one to alerts.webhooks of beacon.yaml")
        return 1
    from .alerts.trial import send_test

    taken = send_test(settings.alerts, settings.server.region, __version__, print)
    return 0 if taken else 1


def _demo(args: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(port=args.port)


def _load(path: Path | None) -> tuple[Settings, Plugins]:
    from .config import load_settings
    from .plugins import Plugins

    plugins = Plugins.discover()
    return load_settings(path, os.environ, plugins), plugins


def _say(line: str) -> None:
    print(f"beacon-proxy: {line}", file=sys.stderr)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"must be a whole number in 0..65535, got {text!r}")
    return int(text)


def _since(text: str) -> str:
    if not _SINCE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be a number and s, m, h, d or w, got {text!r}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="beacon-proxy",
        description="A reverse proxy that routes LLM inference over GPU backends.",
    )
    parser.add_argument("--version", action="version", version=f"beacon-proxy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    serve = commands.add_parser("serve", help="run the proxy")
    check = commands.add_parser("check", help="validate the configuration; exit 0 or 1")
    costs = commands.add_parser("costs", help="what was spent, from the ledger")
    alerts = commands.add_parser("alerts", help="test the webhooks that alerts are sent to")
    alerts.add_argument("what", choices=("test",), help="send one message to each; exit 0 or 1")
    for command in (serve, check, costs, alerts):
        command.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="default: ./beacon.yaml if there, else the environment only",
        )
    serve.add_argument("--host", metavar="H", help="address to listen on, over the file's")
    serve.add_argument("--port", type=_port, metavar="P", help="port, over env PORT and the file's")
    _add_costs(costs)
    demo = commands.add_parser("demo", help="real local backends and the proxy before them")
    demo.add_argument("--port", type=_port, default=8080, metavar="P", help="default: 8080")
    return parser


def _add_costs(costs: argparse.ArgumentParser) -> None:
    by = ("provider", "region", "model", "tenant", "day", "backend", "pool")
    costs.add_argument("--since", type=_since, default="7d", metavar="7d", help="s, m, h, d or w")
    costs.add_argument("--by", choices=by, default="provider", help="default: provider")
    costs.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="default: table"
    )
