"""The shape of `backends` and `discovery`: one GPU server, and where more of them are found."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, create_model, model_validator

from .values import (
    ControlUrl,
    Count,
    HeaderName,
    HeaderValue,
    Moment,
    Name,
    NotNegative,
    Pool,
    Port,
    Positive,
    Region,
    Secret,
    Section,
    Source,
    Text,
    Url,
)


class BackendTimeouts(Section):
    """Limits that differ for one backend; a key left out is as in `timeouts`."""

    connect: NotNegative | None = Field(default=None, description="s; default: timeouts.connect")
    first_content: NotNegative | None = Field(
        default=None, description="s; default: timeouts.first_content"
    )
    document: NotNegative | None = Field(default=None, description="s; default: timeouts.document")
    idle: NotNegative | None = Field(default=None, description="s; default: timeouts.idle")
    total: NotNegative | None = Field(default=None, description="s; default: timeouts.total")
    cold_start: NotNegative | None = Field(
        default=None, description="s; default: timeouts.cold_start"
    )


class Tls(Section):
    """How the certificate of an https backend is checked."""

    verify: bool = Field(default=True, description="check certificate and host name")
    ca_file: Text | None = Field(
        default=None, description="PEM file of the authorities to trust; default: the system's"
    )


class TokenPrice(Section):
    """A price by tokens instead of seconds."""

    input: NotNegative = Field(description="USD per million input tokens")
    output: NotNegative = Field(description="USD per million output tokens")
    cached_input: NotNegative | None = Field(
        default=None,
        description="USD per million input tokens from the backend's prompt cache; default: input",
        examples=[0.005],
    )
    cache_write: NotNegative | None = Field(
        default=None,
        description="USD per million input tokens put into that cache; default: input",
        examples=[0.0625],
    )


class BackendSettings(Section):
    """One GPU server."""

    name: Name = Field(description="unique name, for logs, metrics and X-Beacon-Backend")
    provider: Text = Field(
        description="golem, modal, runpod, openai (any OpenAI-, Anthropic- or Ollama-compatible"
        " server) or an installed plugin",
        examples=["golem", "modal", "runpod", "openai"],
    )
    url: Url = Field(
        description="http:// or https:// base URL",
        examples=["http://127.0.0.1:11434"],
    )
    region: Region | None = Field(
        default=None,
        description="where it runs; default: the region of this instance",
        examples=["us-east", "eu-west", "asia-pacific"],
    )
    kind: Text = Field(
        default="auto",
        description="API of the backend; runpod: auto, queue, openai, load_balancing;"
        " modal: auto, function, server; golem: auto, ollama, openai, inference",
    )
    pool: Pool | None = Field(
        default=None, description="baseline or burst; default: golem baseline, the others burst"
    )
    price_per_second: NotNegative | None = Field(
        default=None,
        description="USD per second of work, of rent where rented; default by provider, where"
        " serverless: golem .0001, runpod .00025, modal .0003",
        examples=[0.0001],
    )
    max_in_flight: Count = Field(default=8, description="requests at once")
    models: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="models it serves; left out: asked of the backend where that is free, else any",
        examples=[["llama3.2:1b"]],
    )
    api_key: Secret | None = Field(
        default=None,
        description="credential, best as ${RUNPOD_API_KEY}; replaces the client's Authorization;"
        " modal: wk-…:ws-… becomes Modal-Key and Modal-Secret",
    )
    headers: dict[HeaderName, HeaderValue] = Field(
        default={},
        description="headers added to each request to this backend",
        examples=[{"X-Team": "research"}],
    )
    timeouts: BackendTimeouts = Field(
        default=BackendTimeouts(), description="limits that differ for this backend"
    )
    tls: Tls = Field(default=Tls(), description="how its certificate is checked")
    stays_warm: Positive | None = Field(
        default=None,
        description="s after an answer that it is surely still warm; default by provider:"
        " runpod 5, modal 60, golem 300",
        examples=[60],
    )
    control_url: ControlUrl | None = Field(
        default=None,
        description="where free health lives; default: derived from url; modal: modal://APP/FUNCTION"
        " or modal://APP/FUNCTION?environment=NAME, with pip install 'beacon-proxy[modal]'",
        examples=["https://api.runpod.ai/v2/ENDPOINT_ID"],
    )
    price_model: Literal["serverless", "rented"] = Field(
        default="serverless",
        description="serverless: billed while running; rented: by the hour, busy or idle, so that"
        " a request costs nothing more until rented_until",
    )
    price_per_hour: NotNegative | None = Field(
        default=None,
        description="USD per hour of rent; needs price_model: rented",
        examples=[0.5],
    )
    price_glm_per_hour: NotNegative | None = Field(
        default=None,
        description="GLM per hour of rent; needs price_model: rented and rates: {GLM: …}",
        examples=[2.0],
    )
    rented_until: Moment | None = Field(
        default=None,
        description="when the agreement ends, ISO 8601 with its zone or unix s; from then on a"
        " request costs its seconds of rent; default: never",
        examples=["2027-01-31T12:00:00Z"],
    )
    price_per_million_tokens: TokenPrice | None = Field(
        default=None,
        description="USD per million tokens, where tokens are billed instead of seconds; not beside"
        " price_per_second",
    )
    aliases: dict[Text, Text] = Field(
        default={},
        description="a client's name of a model: this backend's name of it",
        examples=[{"llama3.2:1b": "meta-llama/Llama-3.2-1B-Instruct"}],
    )


_OF_ROWS = ("name", "provider", "url")  # a row alone can say these
if TYPE_CHECKING:
    RowDefaults = Section
else:
    RowDefaults = create_model(
        "RowDefaults",
        __base__=Section,
        __doc__="What every backend found has, but for what its own row says.",
        **{
            name: (field.annotation, field)
            for name, field in BackendSettings.model_fields.items()
            if name not in _OF_ROWS
        },
    )

SERVICE = re.compile(r"_[^.]+\._[^.]+\..+")  # RFC 2782: _service._proto.name


def split_resolver(value: str) -> tuple[str, int]:
    """Address and port of a DNS server: `10.0.0.2`, `10.0.0.2:5353`, `[fdaa::3]:53`, `fdaa::3`.

    Raises:
        ValueError: saying what it must be.
    """
    host, port = value, "53"
    if value.startswith("["):
        host, closed, rest = value[1:].partition("]")
        port = rest.removeprefix(":") if rest or not closed else port
    elif value.count(":") == 1:
        host, _, port = value.partition(":")
    try:
        number = int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else 0
        if not 0 < number <= 65535:
            raise ValueError
        return str(ipaddress.ip_address(host)), number
    except ValueError:
        raise ValueError("must be an IP address, with :port if that is not 53") from None


def _resolver(value: str) -> str:
    split_resolver(value)
    return value


def _domain(value: str) -> str:
    labels = value.removesuffix(".").split(".")
    good = value.isascii() and len(value) <= 254 and all(0 < len(each) < 64 for each in labels)
    if not good or re.search(r"[^A-Za-z0-9._-]", value):
        raise ValueError("must be a domain name")
    return value


class Discovery(Section):
    """A source of backends that come and go; exactly one of file, url and dns."""

    provider: Text = Field(description="provider of the backends found, where a row names none")
    file: Text | None = Field(
        default=None, description="JSON file with an array of backend rows, or of URLs"
    )
    url: Source | None = Field(default=None, description="URL that answers such an array")
    dns: Annotated[Text, AfterValidator(_domain)] | None = Field(
        default=None, description="name with SRV (_service._proto.…), else A and AAAA records"
    )
    interval: Positive = Field(default=10.0, description="s between two looks")
    timeout: Positive = Field(default=5.0, description="s a look may take")
    backend: RowDefaults = Field(
        default=RowDefaults(),
        description="keys of `backends` for every backend found; those of its own row win;"
        " an api_key goes wherever a row's url says: trust the source with it",
    )
    scheme: Literal["http", "https"] = Field(
        default="http", description="of the backends that dns finds"
    )
    port: Annotated[Port, Field(ge=1)] | None = Field(
        default=None,
        description="of the backends that A and AAAA records find (SRV records have their own);"
        " default: that of the scheme",
        examples=[11434],
    )
    resolver: Annotated[Text, AfterValidator(_resolver)] | None = Field(
        default=None,
        description="DNS server to ask, as address[:port]; default: the system's",
        examples=["10.0.0.2:5353"],
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.file, self.url, self.dns)) != 1:
            raise ValueError("must have exactly one of file, url and dns")
        of_dns = {"scheme": self.scheme != "http", "port": self.port, "resolver": self.resolver}
        idle = [key for key, said in of_dns.items() if said and self.dns is None]
        if idle:
            raise ValueError(f"has {', '.join(idle)}, which only dns uses")
        return self
