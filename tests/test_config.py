"""The configuration: file, environment, variables, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import trustme

from beacon_proxy.config import load_settings, resolve_backends
from beacon_proxy.config.alerts import Alerts
from beacon_proxy.contracts import Backend, Timeouts

from .config_fakes import FAKES, ROW, load, problems
from .kit_proxy import plugins

SECRET = "hunter2-hunter2"


def backend(row: str, more: str = "", env: Mapping[str, str] | None = None) -> Backend:
    text = f"backends: [{{name: a, provider: cloud, url: 'http://h:1', {row}}}]\n{more}"
    return resolve_backends(load(text, env), FAKES)[0]


def test_settings_when_nothing_is_given_are_the_documented_defaults() -> None:
    settings = load(ROW)
    server, timeouts = settings.server, settings.timeouts
    assert (server.host, server.port, server.region) == ("0.0.0.0", 8080, "us-east")
    assert (server.drain_timeout, server.max_body_size) == (30, 104857600)
    assert (server.access_log, server.cors_origins) == (True, [])
    assert timeouts.model_dump() == {
        "connect": 2,
        "first_content": 120,
        "document": 600,
        "idle": 60,
        "total": 0,
        "cold_start": None,
    }
    assert settings.ledger.model_dump() == {
        "path": "beacon.db",
        "flush_interval": 0.25,
        "retention_days": 90,
        "max_size": None,
    }
    chain = [entry.name for entry in settings.middleware]
    assert chain == ["health", "region", "cost", "capacity", "failover"]
    assert settings.warnings == []


def test_settings_when_the_documented_blocks_are_whole_load() -> None:
    """Every key of both blocks of the interface, with the built-in plugins."""
    text = """
server: {host: "::", port: 0, region: EU, drain_timeout: 0, max_body_size: 1, access_log: false,
         cors_origins: ["https://portal.example", "*"]}
timeouts: {connect: 1, first_content: 2, document: 3, idle: 4, total: 5}
backends:
  - {name: golem-us-1, provider: golem, url: "http://127.0.0.1:11434", region: us-east,
     pool: baseline, price_per_second: 0.0001, max_in_flight: 5, models: ["llama3.2:1b"]}
  - {name: hosted, provider: openai, url: "https://127.0.0.1:8443",
     price_per_million_tokens: {input: 0.05, output: 0.2}}
  - {name: golem-us-2, provider: golem, url: "http://127.0.0.1:11435", kind: ollama,
     price_model: rented, price_glm_per_hour: 2.0}
  - name: runpod-eu
    provider: runpod
    url: https://api.runpod.ai/v2/ENDPOINT_ID
    api_key: ${RUNPOD_API_KEY}
    kind: auto
    control_url: https://api.runpod.ai/v2/ENDPOINT_ID
    price_model: rented
    price_per_hour: 0.5
    rented_until: "2027-01-31T12:00:00+01:00"
    aliases: {"llama3.2:1b": "meta-llama/Llama-3.2-1B-Instruct"}
    timeouts: {first_content: 300}
    headers: {X-Team: research}
    tls: {verify: false, ca_file: null}
middleware:
  - health: {probe_interval: 30, probe_timeout: 5, consecutive_failures: 5, base_ejection_time: 30,
             max_ejection_time: 300}
  - region: {mode: require}
  - cost: {default: latency, blend: {baseline: 0.6, burst: 0.4, by: cost}, max_blended_price: 0.1}
  - capacity: {max_queue: 7, queue_timeout: 10}
  - failover: {max_attempts: 3, retry_budget: 0.2, min_retries_per_second: 10}
discovery:
  - {provider: golem, file: nodes.json, interval: 10}
  - {provider: golem, url: "https://list.example/nodes?x=1"}
  - {provider: golem, dns: _beacon._tcp.example}
ledger: {path: "", flush_interval: 1, retention_days: 30}
budgets:
  - {name: daily, scope: all, per: day, usd: 5.0}
  - {name: burst, scope: "pool:burst", per: hour, usd: 1}
  - {name: modal, scope: "provider:modal", per: month, usd: 1}
  - {name: golem, scope: "backend:golem-us-1", per: minute, usd: 1}
  - {name: europe, scope: "region:EU", per: day, usd: 1}
  - {name: each, scope: tenant, per: day, usd: 1}
limits: {max_price_per_request: 0.01, tenant_header: X-Tenant}
alerts: {webhooks: [{url: "https://hooks.example/x", secret: "${ALERT_SECRET}"}],
         rules: {pool_utilisation: {above: 0.8, for: 60}}}
rates: {GLM: 0.25}
"""
    env = {"RUNPOD_API_KEY": "k", "ALERT_SECRET": "whsec_c2VjcmV0"}
    settings = load(text, env, among=plugins())
    assert settings.server.region == "eu-west"
    assert settings.budgets[4].scope == "region:eu-west"
    assert settings.middleware[3].options == {"max_queue": 7, "queue_timeout": 10}
    assert settings.alerts.rules.pool_utilisation is not None
    assert settings.alerts.rules.pool_utilisation.for_ == 60
    runpod = resolve_backends(settings, plugins())[3]
    assert runpod.region == "eu-west"  # left out: this instance's
    assert (runpod.api_key, runpod.tls_verify) == ("k", False)


def test_settings_when_the_chain_is_given_keep_its_order_and_accept_bare_names() -> None:
    settings = load(ROW + "\nmiddleware: [gate, health: {low: '2'}, region: ]")
    chain = [(entry.name, entry.options) for entry in settings.middleware]
    assert chain == [("gate", {}), ("health", {"low": 2}), ("region", {})]


def test_settings_when_a_section_is_left_empty_take_it_as_left_out() -> None:
    settings = load(ROW + "\nserver:\ntimeouts:\nalerts: {webhooks: }\nbudgets:")
    assert settings.server.port == 8080
    assert settings.warnings == []


def test_alert_rules_when_switched_keep_their_defaults_or_are_off() -> None:
    text = "rules: {queue: false, budget: true, ledger: , log_lines_lost: off}"
    rules = load(f"{ROW}\nalerts: {{{text}}}").alerts.rules
    assert (rules.queue, rules.log_lines_lost) == (None, None)
    assert (rules.budget, rules.ledger) == (Alerts().rules.budget, Alerts().rules.ledger)
    assert rules.provider_down is not None, "what is left out is on"


@pytest.mark.parametrize(
    ("name", "region"), [("US", "us-east"), ("ap-southeast-1", "asia-pacific"), ("Lab", "lab")]
)
def test_settings_when_a_region_is_an_alias_hold_it_canonical(name: str, region: str) -> None:
    assert load(f"server: {{region: {name}}}\n{ROW}").server.region == region
    assert backend(f"region: {name}").region == region


@pytest.mark.parametrize(
    ("file", "env", "port", "region"),
    [
        ("server: {}", {}, 8080, "us-east"),
        ("server: {port: 1}", {"PORT": "2"}, 2, "us-east"),
        ("server: {port: 1}", {"PORT": ""}, 1, "us-east"),
        ("server: {}", {"FLY_REGION": "fra"}, 8080, "eu-west"),
        ("server: {region: }", {"FLY_REGION": "nrt"}, 8080, "asia-pacific"),
        ("server: {region: lab}", {"FLY_REGION": "fra"}, 8080, "lab"),
    ],
)
def test_server_when_the_environment_speaks_follows_the_order_of_precedence(
    file: str, env: dict[str, str], port: int, region: str
) -> None:
    server = load(f"{file}\n{ROW}", env).server
    assert (server.port, server.region) == (port, region)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("${KEY}", "abc"),
        ("x-${KEY}-${KEY}", "x-abc-abc"),
        ("$$${KEY}", "$abc"),
        ("$${KEY}", "${KEY}"),
        ("$KEY 5$", "$KEY 5$"),
    ],
)
def test_variable_when_in_a_text_is_put_in(written: str, value: str) -> None:
    assert backend(f"api_key: '{written}'", env={"KEY": "abc"}).api_key == value


def test_variable_when_it_holds_a_number_fits_a_number() -> None:
    assert backend("max_in_flight: '${N}'", env={"N": "3"}).max_in_flight == 3


def test_variable_when_its_value_has_one_is_not_expanded_again() -> None:
    assert backend("api_key: '${A}'", env={"A": "${B}", "B": "x"}).api_key == "${B}"


def test_variable_when_unset_is_named_with_its_place_and_nothing_else_is_said_of_it() -> None:
    text = (
        "backends: [{name: a, provider: cloud, url: '${NO_URL}', headers: {X: '${NO_X}'}}]\n"
        "middleware: [gate: {low: '${NO_LOW}'}]"
    )
    assert problems(text) == [
        "backends[0].url: environment variable NO_URL is not set",
        "backends[0].headers.X: environment variable NO_X is not set",
        "middleware.gate.low: environment variable NO_LOW is not set",
    ]


@pytest.mark.parametrize("broken", ["${}", "${KEY", "${KEY:-x}", "${1}"])
def test_variable_when_malformed_is_a_problem(broken: str) -> None:
    (line,) = problems(f"backends: [{{name: a, provider: cloud, url: '{broken}'}}]", {"KEY": "x"})
    assert line == "backends[0].url: has a ${ that is no ${NAME}; $$ is a dollar sign"


def test_environment_when_there_is_no_file_gives_the_backends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(None, {"CLOUD_URL": "http://c", "FLY_REGION": "ams"}, FAKES)
    (made,) = resolve_backends(settings, FAKES)
    assert (made.name, made.provider, made.region) == ("cloud-eu-west", "cloud", "eu-west")


def test_file_when_it_lies_in_the_working_directory_is_read_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("beacon.yaml").write_text(ROW)
    assert [row.name for row in load_settings(None, {}, FAKES).backends] == ["a"]


def test_environment_when_the_file_has_no_backends_adds_them() -> None:
    settings = load("server: {region: lab}", {"CLOUD_URL": "http://c"})
    assert [row.name for row in settings.backends] == ["cloud-lab"]


def test_environment_when_the_file_has_backends_adds_none() -> None:
    assert [row.name for row in load(ROW, {"CLOUD_URL": "http://c"}).backends] == ["a"]


def test_environment_when_a_provider_refuses_it_is_the_problem() -> None:
    assert problems("{}", {"CLOUD_URL": "refuse"}) == ["CLOUD_URL: must be better, got refuse"]


def test_environment_when_its_row_is_wrong_is_named_as_such() -> None:
    assert problems("{}", {"CLOUD_URL": "ftp://c"}) == [
        "environment.cloud-us-east.url: must be http://host[:port][/path] or"
        ' https://host[:port][/path], got "ftp://c"'
    ]


@pytest.mark.parametrize("port", ["x", "65536", "-1", "8080.5", "٣"])
def test_environment_when_port_is_wrong_is_a_problem(port: str) -> None:
    (line,) = problems(ROW, {"PORT": port})
    assert line == f'environment.PORT: must be a whole number in 0..65535, got "{port}"'


@pytest.mark.parametrize("text", ["{}", "backends: []", "server: {port: 1}"])
def test_backends_when_there_is_none_says_how_to_add_one(text: str) -> None:
    (line,) = problems(text)
    assert line.startswith("backends: there is none; add one to beacon.yaml, such as `backends: [{")
    assert "CLOUD_URL" in line


@pytest.mark.parametrize("backends", ["", "backends: []\n", "backends:\n"])
def test_backends_when_discovery_will_find_them_need_not_be_there(backends: str) -> None:
    settings = load(f"{backends}discovery: [{{provider: cloud, file: nodes.json}}]")
    assert settings.backends == []
    assert settings.warnings == []
    assert resolve_backends(settings, FAKES) == ()


def test_discovery_when_the_environment_gives_backends_has_them_beside() -> None:
    settings = load("discovery: [{provider: cloud, file: n}]", {"CLOUD_URL": "http://c"})
    assert len(settings.backends) == 1


def test_environment_of_the_deployment_when_all_is_set_gives_a_backend_each() -> None:
    env = {
        "GOLEM_PROVIDER_ENDPOINTS": "http://10.0.0.1:11434,http://10.0.0.2:11434|eu",
        "MODAL_API_BASE": "https://team--app.modal.run",
        "MODAL_API_TOKEN": "wk-1:ws-2",
        "RUNPOD_API_BASE": "https://api.runpod.ai/v2",
        "RUNPOD_API_KEY": "rpa_1",
        "RUNPOD_ENDPOINT_ID": "abc123",
        "FLY_REGION": "sin",
    }
    made = resolve_backends(load("{}", env, among=plugins()), plugins())
    assert {b.name: (b.pool, b.region) for b in made} == {
        "golem-1": ("baseline", "asia-pacific"),
        "golem-2": ("baseline", "eu-west"),
        "modal-asia-pacific": ("burst", "asia-pacific"),
        "runpod-asia-pacific": ("burst", "asia-pacific"),
    }


def test_backend_when_resolved_takes_what_is_left_out_from_provider_and_globals() -> None:
    made = backend("timeouts: {idle: 0}", "timeouts: {connect: 9}\nserver: {region: EU}")
    assert made == Backend(
        name="a",
        provider="cloud",
        url="http://h:1",
        scheme="http",
        host="h",
        port=1,
        region="eu-west",
        pool="baseline",
        price_per_second=0.25,
        timeouts=Timeouts(connect=9, idle=0),
    )


def test_backend_when_all_is_said_keeps_it(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(ca_file)
    made = backend(
        "pool: burst, price_per_second: 0, max_in_flight: 3, kind: queue,"
        " models: ['Llama3.2:1b', 'llama3.2-1b', qwen], headers: {X-A: ' b ', x-a: c},"
        f" tls: {{verify: false, ca_file: {ca_file}}}"
    )
    assert (made.pool, made.price_per_second, made.max_in_flight) == ("burst", 0, 3)
    assert made.models == {"llama3.2-1b", "qwen"}
    assert made.headers == ((b"X-A", b"b"), (b"x-a", b"c"))
    assert (made.kind, made.tls_verify, made.tls_ca_file) == ("queue", False, str(ca_file))


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "base_path"),
    [
        ("http://h", "http", "h", 80, ""),
        ("https://H.Example/", "https", "h.example", 443, ""),
        ("https://h:8443/v2/ID/", "https", "h", 8443, "/v2/ID"),
        ("http://[::1]:11434/a%2Fb", "http", "::1", 11434, "/a%2Fb"),
        ("http://127.0.0.1:65535", "http", "127.0.0.1", 65535, ""),
    ],
)
def test_backend_when_its_url_is_split_keeps_every_part(
    url: str, scheme: str, host: str, port: int, base_path: str
) -> None:
    text = f"backends: [{{name: a, provider: cloud, url: '{url}'}}]"
    (made,) = resolve_backends(load(text), FAKES)
    assert (made.scheme, made.host, made.port, made.base_path) == (scheme, host, port, base_path)
    assert made.url == url


@pytest.mark.parametrize(
    ("secret", "warned"), [("hunter2", True), ("A" * 31, True), ("A" * 32, False)]
)
def test_warning_when_the_key_of_a_webhook_is_short_says_so_without_it(
    secret: str, warned: bool
) -> None:
    told = load(f"{ROW}\nalerts: {{webhooks: [{{url: 'http://h', secret: {secret}}}]}}").warnings
    wanted = "alerts.webhooks[0].secret: read as base64 it is a key of fewer than 24 bytes"
    assert [line.startswith(wanted) for line in told if secret not in line] == [True] * warned
    assert all(secret not in line for line in told)


@pytest.mark.parametrize(
    "text",
    [
        "ledger: {retention_days: 31}\nbudgets: [{name: b, per: month, usd: 1}]",
        "ledger: {retention_days: 0.05}\nbudgets: [{name: b, per: hour, usd: 1}]",
        "ledger: {retention_days: 1, path: ''}\nbudgets: [{name: b, per: month, usd: 1}]",
        "ledger: {retention_days: 0.001}",
    ],
)
def test_retention_when_no_budget_needs_more_is_fine(text: str) -> None:
    assert load(f"{ROW}\n{text}").ledger.retention_days > 0


@pytest.mark.parametrize(
    ("more", "lines"),
    [
        ("budgets: [{name: b, per: day, usd: 1}]\nlimits: {max_price_per_request: 1}", []),
        (
            "budgets: [{name: b, per: day, usd: 1}]\nledger: {path: ''}",
            ["budgets: begin anew at each restart, as the ledger is off"],
        ),
        (
            "budgets: [{name: a, per: day, usd: 1}, {name: b, scope: tenant, per: day, usd: 1}]",
            ["budgets[1].scope: without limits.tenant_header all clients are one tenant"],
        ),
        (
            "budgets: [{name: b, scope: tenant, per: day, usd: 1}]\nlimits: {tenant_header: X-T}",
            [],
        ),
    ],
)
def test_warning_when_a_budget_holds_less_than_it_seems_to_says_why(
    more: str, lines: list[str]
) -> None:
    told = load(f"{ROW}\n{more}").warnings
    assert [line for line in told if not line.startswith("ledger")] == lines


def test_warning_when_the_folder_of_the_ledger_is_not_there_names_it(tmp_path: Path) -> None:
    def warnings(path: Path | str) -> list[str]:
        return load(f"{ROW}\nledger: {{path: '{path}'}}").warnings

    assert warnings(tmp_path / "none" / "beacon.db") == [
        f"ledger.path: nothing is recorded while there is no folder {tmp_path}/none"
    ]
    assert warnings(tmp_path / "beacon.db") == warnings("other.db") == warnings("") == []


@pytest.mark.parametrize(
    ("more", "cached_input", "cache_write"),
    [
        ("", 0.5, 0.5),
        ("cached_input: 0.05", 0.05, 0.5),
        ("cache_write: 0.625", 0.5, 0.625),
        ("cached_input: 0, cache_write: 0", 0.0, 0.0),
        ("cached_input: null", 0.5, 0.5),
    ],
)
def test_token_price_of_a_cache_is_that_of_input_where_none_is_named(
    more: str, cached_input: float, cache_write: float
) -> None:
    price = f"price_per_million_tokens: {{input: 0.5, output: 2, {more}}}"
    settings = load(f"backends: [{{name: a, provider: cloud, url: 'http://h', {price}}}]")
    (backend,) = resolve_backends(settings, FAKES)
    assert backend.token_price is not None
    told = [price * 1e6 for price in backend.token_price]
    assert told == pytest.approx([0.5, 2.0, cached_input, cache_write])


def test_token_price_when_configured_replaces_the_providers_price_per_second() -> None:
    price = "price_per_million_tokens: {input: 0.05, output: 0.2}"
    settings = load(f"backends: [{{name: a, provider: cloud, url: 'http://h', {price}}}]")
    (backend,) = resolve_backends(settings, FAKES)
    assert settings.warnings == []
    assert backend.token_price == pytest.approx((5e-8, 2e-7, 5e-8, 5e-8))
    assert backend.price_per_second == 0.0
