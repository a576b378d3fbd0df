"""What is wrong with a configuration: each problem at its path, all at once, no secret in any."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path

import pytest
import yaml

from beacon_proxy.config import load_settings, resolve_backends
from beacon_proxy.errors import ConfigError
from beacon_proxy.plugins import Plugins

from .config_fakes import CHAIN, FAKES, ROW, load, problems
from .kit_proxy import plugins

SECRET = "hunter2-hunter2"  # wherever it is put, no message may show it

ROW_PROBLEMS = [
    ("provider: clout", 'provider: unknown provider "clout", did you mean cloud? installed: cloud'),
    ("provider: xyz", 'provider: unknown provider "xyz"; installed: cloud'),
    ("kind: queu", 'kind: must be one of auto, queue for provider cloud, got "queu"'),
    ("pool: bursts", 'pool: must be baseline or burst, got "bursts"'),
    ("price_per_second: -1", "price_per_second: must be >= 0, got -1"),
    ("price_model: rented, price_per_hour: -0.5", "price_per_hour: must be >= 0, got -0.5"),
    ("price_model: leased", 'price_model: must be serverless or rented, got "leased"'),
    ("price_per_million_tokens: {input: 1}", "price_per_million_tokens.output: is required"),
    (
        "price_per_million_tokens: {input: 1, output: 1, cached_input: -1}",
        "price_per_million_tokens.cached_input: must be >= 0, got -1",
    ),
    (
        "price_per_million_tokens: {input: 1, output: 1, cache_write: .inf}",
        "price_per_million_tokens.cache_write: must be a finite number, got",
    ),
    (
        "price_per_million_tokens: {input: 1, output: 1, cache_read: 1}",
        "price_per_million_tokens.cache_read: unknown key",
    ),
    ("max_in_flight: 0", "max_in_flight: must be >= 1, got 0"),
    ("max_in_flight: 1.5", "max_in_flight: must be a whole number, got 1.5"),
    ("max_in_flight: true", "max_in_flight: must not be true or false, got true"),
    ("models: []", "models: must not be empty, got a list"),
    ("models: llama", 'models: must be a list, got "llama"'),
    ("models: [1]", "models[0]: must be text, got 1"),
    ("name: 'a b'", "name: must be 1 to 100 letters, digits,"),
    ("region: ''", 'region: must not be empty, got ""'),
    ('region: "eu\\r\\nset-cookie: a=1"', "region: must be 1 to 100 letters, digits,"),
    ("region: '  '", "region: must be 1 to 100 letters, digits,"),
    ("region: süd", "region: must be 1 to 100 letters, digits,"),
    ("region: no", "region: must be text, got false"),
    ("timeouts: {idle: -2}", "timeouts.idle: must be >= 0, got -2"),
    ("timeouts: {idel: 2}", "timeouts.idel: unknown key, did you mean idle?"),
    ("max_inflight: 2", "max_inflight: unknown key, did you mean max_in_flight?"),
    ("tls: {verify: maybe}", 'tls.verify: must be true or false, got "maybe"'),
    ("tls: {ca_file: /no}", 'tls.ca_file: cannot be read: No such file or directory, got "/no"'),
    (f"tls: {{ca_file: {__file__}}}", "tls.ca_file: must hold certificates in PEM form, got"),
    ('tls: {ca_file: "a\\0b"}', "tls.ca_file: must be a path, got"),
    ("tls: 5", "tls: must be a mapping, got 5"),
    ("headers: {Host: x}", "headers.Host: must not be set: the proxy writes it itself"),
    ("headers: {TE: x}", "headers.TE: must not be set: the proxy writes it itself"),
    ("headers: {'a b': x}", "headers.a b: must be a header name"),
    ('headers: {X: "a\\r\\nY: b"}', "headers.X: must hold no control characters"),
    ('headers: {X: "a\\0"}', "headers.X: must hold no control characters"),
    (
        'api_key: "k\\n"',
        "api_key: must hold no control characters; is there a line end at",
    ),
    ("api_key: ''", "api_key: must not be empty"),
    ("aliases: {a: ''}", 'aliases.a: must not be empty, got ""'),
    (
        "url: 'ftp://h'",
        'url: must be http://host[:port][/path] or https://host[:port][/path], got "',
    ),
    ("url: 'h:80'", "url: must be http://host[:port][/path] or https://host[:port][/path]"),
    ("url: 'http://'", "url: must be http://host[:port][/path] or https://host[:port][/path]"),
    ("url: 'http://h:0'", "url: must have a port in 1..65535, got"),
    ("url: 'http://h:65536'", "url: must be a URL with a valid host and port, got"),
    (
        "url: 'http://a..b:80'",
        "url: must have a host whose labels are 1 to 63 characters long, got",
    ),
    (f"url: 'http://{'a' * 64}.b'", "url: must have a host whose labels are 1 to 63 characters"),
    ("url: 'http://.'", "url: must have a host whose labels are 1 to 63 characters long, got"),
    ("url: 'http://[::1'", "url: must be a URL with a valid host and port, got"),
    ("url: 'http://h/?q=1'", 'url: must have no query and no fragment, got "http://h/?…"'),
    ("url: 'http://h/#f'", "url: must have no query and no fragment, got"),
    ("url: 'http://u:p@h/'", 'url: must hold no user or password; use api_key, got "http://…@h/"'),
    ("url: 'http://h/a b'", "url: must hold no spaces, control, non-ASCII characters or back"),
    ("url: ' http://h'", "url: must hold no spaces, control, non-ASCII characters or back"),
    ("url: 'http://hé'", "url: must hold no spaces, control, non-ASCII characters or back"),
]


@pytest.mark.parametrize(("row", "problem"), ROW_PROBLEMS, ids=[row for row, _ in ROW_PROBLEMS])
def test_backend_when_a_key_is_wrong_is_one_problem_at_its_path(row: str, problem: str) -> None:
    good = {"name": "a", "provider": "cloud", "url": "http://h:1"}
    (line,) = problems(json.dumps({"backends": [{**good, **yaml.safe_load(f"{{{row}}}")}]}))
    assert line.startswith(f"backends[0].{problem}")


SECTION_PROBLEMS = [
    ("server: {prot: 1}", "server.prot: unknown key, did you mean port?"),
    ("server: {port: -1}", "server.port: must be >= 0, got -1"),
    ("server: {port: 65536}", "server.port: must be <= 65535, got 65536"),
    ("server: {port: null}", "server.port: must be a whole number, got null"),
    ("server: {max_body_size: 0}", "server.max_body_size: must be >= 1, got 0"),
    ("server: {drain_timeout: -1}", "server.drain_timeout: must be >= 0, got -1"),
    (
        "server: {drain_timeout: .inf}",
        "server.drain_timeout: must be a finite number, got",
    ),
    ("server: {cors_origins: ['https://a/b']}", "server.cors_origins[0]: must be scheme://host"),
    ("server: 80", "server: must be a mapping, got 80"),
    ("timeout: {}", "timeout: unknown key, did you mean timeouts?"),
    ("timeouts: {connect: soon}", 'timeouts.connect: must be a number, got "soon"'),
    ("discovery: [{provider: cloud}]", "discovery[0]: must have exactly one of file, url and dns"),
    (
        "discovery: [{provider: x, dns: y}]",
        'discovery[0].provider: unknown provider "x"; ',
    ),
    ("discovery: [{provider: cloud, dns: y, interval: 0}]", "discovery[0].interval: must be > 0"),
    ("discovery: [{provider: cloud, dns: y, timeout: 0}]", "discovery[0].timeout: must be > 0"),
    ("discovery: [{provider: cloud, dns: 'a b'}]", "discovery[0].dns: must be a domain name, got"),
    ("discovery: [{provider: cloud, dns: y, port: 0}]", "discovery[0].port: must be >= 1, got 0"),
    (
        "discovery: [{provider: cloud, dns: y, resolver: dns.example}]",
        "discovery[0].resolver: must be an IP address, with :port if that is not 53, got",
    ),
    (
        "discovery: [{provider: cloud, file: y, port: 80, scheme: https}]",
        "discovery[0]: has scheme, port, which only dns uses",
    ),
    (
        "discovery: [{provider: cloud, file: y, backend: {max_in_flite: 1}}]",
        "discovery[0].backend.max_in_flite: unknown key, did you mean max_in_flight?",
    ),
    (
        "discovery: [{provider: cloud, file: y, backend: {url: 'http://h'}}]",
        "discovery[0].backend.url: unknown key",
    ),
    (
        "discovery: [{provider: cloud, file: y, backend: {tls: {ca_file: /no}}}]",
        "discovery[0].backend.tls.ca_file: cannot be read: No such file or directory, got",
    ),
    (
        "discovery: [{provider: cloud, file: y, backend: {kind: square}}]",
        "discovery[0].backend.kind: must be one of ",
    ),
    ("ledger: {flush_interval: 0}", "ledger.flush_interval: must be > 0, got 0"),
    ("ledger: {max_size: 1000}", "ledger.max_size: must be >= 1048576, got 1000"),
    (
        "ledger: {retention_days: 30.5}\nbudgets: [{name: d, per: day, usd: 1},"
        " {name: m, per: month, usd: 1}]",
        "ledger.retention_days: must be at least 31 for budget m per month, got 30.5",
    ),
    ("budgets: [{name: b, per: week, usd: 1}]", "budgets[0].per: must be minute, hour, day or mon"),
    ("budgets: [{name: b, per: day, usd: -1}]", "budgets[0].usd: must be >= 0, got -1"),
    ("budgets: [{name: b, per: day, usd: 1, scope: pools}]", "budgets[0].scope: must be all, ten"),
    (
        "budgets: [{name: b, per: day, usd: 1, scope: 'backend:b'}]",
        "budgets[0].scope: there is no backend b",
    ),
    (
        "budgets: [{name: b, per: day, usd: 1, scope: 'pool:brst'}]",
        "budgets[0].scope: there is no pool brst, did you mean burst?",
    ),
    ("limits: {tenant_header: 'X Y'}", 'limits.tenant_header: must be a header name, got "X Y"'),
    ("limits: {max_price_per_request: -1}", "limits.max_price_per_request: must be >= 0, got -1"),
    ("alerts: {rules: {pool_utilization: {}}}", "alerts.rules.pool_utilization: unknown key, did"),
    (
        "alerts: {rules: {pool_utilisation: {fro: 1, above: 1}}}",
        "alerts.rules.pool_utilisation.f",
    ),
    ("alerts: {rules: {queue: 5}}", "alerts.rules.queue: must be a mapping, got 5"),
    ("alerts: {rules: {queue: {above: 2}}}", "alerts.rules.queue.above: must be <= 1, got 2"),
    ("alerts: {rules: {queue: {clear: 0.9}}}", "alerts.rules.queue.clear: must be <= above"),
    ("alerts: {rules: {queue: {for: -1}}}", "alerts.rules.queue.for: must be >= 0, got -1"),
    (
        "alerts: {rules: {success_rate: {clear: 0.5}}}",
        "alerts.rules.success_rate.clear: must be >= below",
    ),
    ("alerts: {rules: {ttft_p95: {factor: 1}}}", "alerts.rules.ttft_p95.factor: must be > 1, got"),
    ("alerts: {rules: {ttft_p95: {clear: 3}}}", "alerts.rules.ttft_p95.clear: must be <= factor"),
    ("alerts: {rules: {ttft_p95: {clear: true}}}", "alerts.rules.ttft_p95.clear: must not be true"),
    ("alerts: {interval: 0}", "alerts.interval: must be > 0, got 0"),
    (
        "alerts: {webhooks: [{url: 'http://h', secret: 'whsec_!'}]}",
        "alerts.webhooks[0].secret: must be base64, with or without whsec_ before it",
    ),
    (
        "alerts: {webhooks: [{url: 'http://u:p@h'}]}",
        "alerts.webhooks[0].url: must hold no user or password",
    ),
    (
        "discovery: [{provider: cloud, url: 'http://u:p@h'}]",
        'discovery[0].url: must hold no user or password, got "http://…@h"',
    ),
    (
        "alerts: {webhooks: [{url: 'http://h', format: slack}]}",
        'alerts.webhooks[0].format: must be standard or text, got "slack"',
    ),
    ("alerts: {webhooks: [{url: x}]}", "alerts.webhooks[0].url: must be http://host[:port][/path]"),
    ("rates: {GLM: 0}", "rates.GLM: must be > 0, got 0"),
    ("middleware: gate", 'middleware: must be a list, got "gate"'),
    (
        "middleware: [gtae]",
        'middleware[0]: unknown middleware "gtae", did you mean gate?',
    ),
    ("middleware: [gate, gate: {}]", "middleware[1]: gate is listed twice"),
    (
        "middleware: [{gate: , low: 3}]",
        "middleware[0]: must be a name, or one name with its opt",
    ),
    ("middleware: [3]", "middleware[0]: must be a name, or one name with its options indented"),
    ("middleware: [gate: {lo: 1}]", "middleware.gate.lo: unknown key, did you mean low?"),
    ("middleware: [gate: {low: x}]", 'middleware.gate.low: must be a whole number, got "x"'),
    ("middleware: [gate: {low: -1}]", "middleware.gate.low: must be >= 0, got -1"),
    ("middleware: [gate: {label: bad1}]", "middleware.gate: must not be called bad1"),
    ("middleware: [gate: 7]", "middleware.gate: must be a mapping, got 7"),
]


@pytest.mark.parametrize(
    ("text", "problem"), SECTION_PROBLEMS, ids=[t for t, _ in SECTION_PROBLEMS]
)
def test_section_when_a_key_is_wrong_is_one_problem_at_its_path(text: str, problem: str) -> None:
    (line,) = problems(f"{text}\n{ROW}")
    assert line.startswith(problem)


def test_middleware_when_an_option_is_nested_is_named_with_its_whole_path() -> None:
    text = "middleware: [cost: {blend: {baseline: 0.7, burst: 0.4}}]\n" + ROW
    with pytest.raises(ConfigError) as caught:
        load(text.replace("cloud", "openai"), among=plugins())
    assert caught.value.problems == ("middleware.cost.blend.shares: must sum to 1, got 1.1",)


@pytest.mark.parametrize("name", ["health", "region", "cost", "capacity", "failover"])
def test_middleware_when_left_out_and_a_built_in_is_missing_says_so(name: str) -> None:
    few = {key: cls for key, cls in CHAIN.items() if key != name}
    with pytest.raises(ConfigError, match=rf'unknown middleware "{name}"'):
        load(ROW, among=Plugins(FAKES.providers, few))


def test_problems_when_there_are_many_are_told_all_at_once() -> None:
    text = """
server: {port: 99999, prot: 1}
timeouts: {idle: -1}
backends:
  - {name: a, provider: cloud, url: "ftp://x", kind: odd, price_per_second: -1}
  - {name: a, provider: clod, url: "http://h", api_key: "${NOPE}"}
  - {provider: cloud, url: "http://h"}
middleware:
  - gate: {low: -5, high: -9, label: 3}
  - nothing
budgets: [{name: b, per: day, usd: 1}, {name: b, per: day, usd: 1}]
"""
    found = problems(text, {"PORT": "x"})
    places = [line.partition(": ")[0] for line in found]
    assert sorted(places) == sorted(
        [
            "backends[1].api_key",
            "server.port",
            "server.prot",
            "timeouts.idle",
            "backends[0].url",
            "backends[0].price_per_second",
            "backends[2].name",
            "environment.PORT",
            "middleware.gate.label",
            "middleware.gate.low",
            "middleware.gate.high",
            "middleware[1]",
            "backends[0].kind",
            "backends[1].provider",
            "backends[1].name",
            "budgets[1].name",
        ]
    )
    assert 'backends[1].name: must be unique, got "a" as backends[0].name has' in found


LEAKS = [
    f"backends: [{{name: a, provider: cloud, url: 'http://u:{SECRET}@h'}}]",
    f"backends: [{{name: a, provider: cloud, url: 'http://h/?key={SECRET}'}}]",
    f'backends: [{{name: a, provider: cloud, url: "http://h", api_key: "{SECRET}\\n"}}]',
    f"backends: [{{name: a, provider: cloud, url: 'http://h', api_key: [{SECRET}]}}]",
    f"backends: [{{name: a, provider: cloud, url: 'http://h', api_kye: {SECRET}}}]",
    f"backends: [{{name: a, provider: cloud, url: 'http://h', headers: 'X: {SECRET}'}}]",
    f'backends: [{{name: a, provider: cloud, url: "http://h", headers: {{X: "{SECRET}\\0"}}}}]',
    f"{ROW}\nalerts: {{webhooks: [{{url: 'ftp://hooks.example/{SECRET}'}}]}}",
    f'{ROW}\nalerts: {{webhooks: [{{url: "http://h", secret: "{SECRET}\\0"}}]}}',
    f"{ROW}\nalerts: {{webhooks: [{{url: 'http://h', secret: '{SECRET}'}}]}}",
    f"{ROW}\nalerts: {{webhooks: [{{url: 'http://u:{SECRET}@h'}}]}}",
    f"{ROW}\nmiddleware: [gate: {{secret: {SECRET}}}]",
    f"{ROW}\nserver: {{port: '${{HIDDEN}}'}}",
    f"{ROW}\nserver: {{host: ['${{HIDDEN}}']}}",
    f"{ROW}\nmiddleware: [gate: {{low: '${{HIDDEN}}'}}]",
    f"{ROW}\nmiddleware: [gate: {{label: 'bad ${{HIDDEN}}'}}]",
    f"{ROW}\nmiddleware: ['${{HIDDEN}}']",
    "backends: [{name: a, provider: '${HIDDEN}', url: '${HIDDEN}', kind: '${HIDDEN}'}]",
]


@pytest.mark.parametrize("text", LEAKS)
def test_secret_when_something_is_wrong_about_it_is_in_no_message(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, {"HIDDEN": SECRET})
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None  # whose traceback could show it


def test_secret_when_settings_and_backends_are_printed_is_not_shown() -> None:
    key = b64encode(SECRET.encode()).decode()
    text = (
        f"backends: [{{name: a, provider: cloud, url: 'http://h', api_key: {SECRET},"
        f" headers: {{X: {SECRET}}}}}]\n"
        f"alerts: {{webhooks: [{{url: 'https://h/{SECRET}', secret: {key}}}]}}"
    )
    settings = load(text)
    made = resolve_backends(settings, FAKES)
    assert made[0].api_key == SECRET
    assert made[0].headers == ((b"X", SECRET.encode()),)
    shown = f"{settings!r} {settings} {made!r} {settings.model_dump_json()}"
    assert SECRET not in shown
    assert key not in shown


def read(path: Path, content: bytes) -> ConfigError:
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {}, FAKES)
    return caught.value


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "FILE: is empty"),
        (b"# nothing\n", "FILE: is empty"),
        (b"- a\n", "FILE: must be a mapping of sections such as server and backends"),
        (b"server: {port: 1\nx: 2", "FILE:2:2: while parsing a flow mapping expected ',' or '}'"),
        (
            b"server:\n\tport: 1",
            "FILE:2:1: while scanning for the next token found char",
        ),
        (
            b"a: {b: ${C}}",
            "FILE:1:9: while parsing a flow mapping expected ',' or '}', but got '{'",
        ),
        (b"server: !!python/name:os.system x", "FILE:1:9: could not determine a constructor"),
        (
            b"a: 1\n---\nb: 2",
            "FILE:2:1: expected a single document in the stream but found",
        ),
        (b"server: {port: !!int x}", "FILE: "),
        (b"\xff\xfe\xff", "FILE: is not UTF-8 text"),
        (b"a: \x01", "FILE: unacceptable character"),
        (b"[" * 1000, "FILE: is nested too deeply"),
    ],
)
def test_file_when_it_cannot_be_read_says_where(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "beacon.yaml"
    (line,) = read(path, content).problems
    assert line.startswith(problem.replace("FILE", str(path)))
    assert "\n" not in line


def test_file_when_keys_are_given_twice_names_each(tmp_path: Path) -> None:
    """PyYAML takes the last one silently."""
    path = tmp_path / "beacon.yaml"
    found = read(path, b"server:\n  port: 1\n  port: 2\nbackends: []\nbackends: []\n").problems
    assert sorted(found) == [
        f"{path}:3:3: duplicate key port, first in line 2",
        f"{path}:5:1: duplicate key backends, first in line 4",
    ]


def test_file_when_anchors_are_merged_are_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "beacon.yaml"
    path.write_text(
        "backends:\n"
        "  - &one {name: a, provider: cloud, url: 'http://h', max_in_flight: 3}\n"
        "  - {<<: *one, name: b}\n"
    )
    rows = load_settings(path, {}, FAKES).backends
    assert [(row.name, row.max_in_flight) for row in rows] == [("a", 3), ("b", 3)]


def test_file_when_it_contains_itself_is_nested_too_deeply(tmp_path: Path) -> None:
    found = read(tmp_path / "beacon.yaml", b"server: &a {host: *a}\n" + ROW.encode()).problems
    assert any(line.endswith("is nested too deeply") for line in found)


def test_file_when_a_text_looks_like_a_date_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "beacon.yaml"
    path.write_text("backends: [{name: 2026-01-01, provider: cloud, url: 'http://h'}]")
    assert load_settings(path, {}, FAKES).backends[0].name == "2026-01-01"


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_file_when_it_is_not_there_or_no_file_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r": cannot be read: (No such file|Is a directory)"):
        load_settings(tmp_path / name, {}, FAKES)


def test_backend_when_its_provider_cannot_use_it_is_named_with_its_key() -> None:
    settings = load("backends: [{name: a, provider: cloud, url: 'http://refused.example'}]")
    with pytest.raises(ConfigError) as caught:
        resolve_backends(settings, FAKES)
    assert caught.value.problems == ("backends[0].url: not this one",)
