"""rename: the bytes of the outermost `model` change, and no other; what is no JSON stays."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_proxy.wire import rename
from beacon_proxy.wire.rename import Renaming, members, model_spans

NEW = 'meta-llama/"Llama"\\3.2 ☀'
TOLD = json.dumps(NEW).encode()


def renaming(body: bytes, whole: bool, name: str) -> Renaming | None:
    spans = model_spans(body, whole)
    return Renaming(spans, name) if spans else None


def renamed(body: bytes, whole: bool = True) -> bytes:
    found = renaming(body, whole, NEW)
    return body if found is None else found.apply(body)


@pytest.mark.parametrize(
    ("before", "value", "after"),
    [
        (b'{"model":', b'"m"', b"}"),
        (b' \n{ "model"\t:\r\n ', b'"m"', b' , "stream":true}\n'),
        (b'{"mod\\u0065l":', b'"m"', b"}"),
        (b'{"model":', b'"a\\"}b\\\\"', b',"x":"model"}'),
        (b'{"messages":[{"model":"x"}],"metadata":{"model":{"model":"y"}},"model":', b'"m"', b"}"),
        (b'{"a":"{\\"model\\":\\"x\\"}","model":', b'"m"', b',"tools":[{"model":"z"}]}'),
        (b'{"a":[[[{}]],[]],"b":-1.5e+9,"c":null,"model":', b'"m"', b"}"),
        (b'{"\\ud83d\\ude00 \xe2\x98\x80":"\\\\","model":', b'"\xe2\x98\x80"', b"}"),
        (b'{"Model":"x","model ":"y","model":', b'"m"', b',"MODEL":"z"}'),
        (b'{"":"","model":', b'""', b"}"),
    ],
)
def test_rename_when_body_is_json_replaces_the_value_and_nothing_else(
    before: bytes, value: bytes, after: bytes
) -> None:
    body = before + value + after
    assert renamed(body) == before + TOLD + after
    found = renaming(body, True, NEW)
    assert found is not None
    assert found.growth == len(TOLD) - len(value)
    assert json.loads(renamed(body)) == {**json.loads(body), "model": NEW}


def test_rename_when_the_key_stands_twice_replaces_both() -> None:
    """Parsers differ in which one they take."""
    body = b'{"model":"a","x":1,"model" : {"model":"b"} ,"mode\\u006c":null}'
    told = b'{"model":%b,"x":1,"model" : %b ,"mode\\u006c":%b}' % (TOLD, TOLD, TOLD)
    assert renamed(body) == told


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model"',
        b'{"model":',
        b'{"model":"m',
        b'{"model":"m"',
        b'{"model":"m",}',
        b'{"model":"m"}}',
        b'{"model":"m"} x',
        b'{"model":"m","a":tru}',
        b'{"model":"m","a":[1,]}',
        b'{"model":"m","a":"\n"}',
        b'{"model":"m","a":"\xff"}',
        b'{"model":"m" "a":1}',
        b'{model:"m"}',
        b"{'model':'m'}",
        b'{"model":m}',
        b'\xef\xbb\xbf{"model":"m"}',
        b'["model","m"]',
        b'"model"',
        b'[{"model":"m"}]',
        b'{"a":{"model":"m"}}',
        '{"model":"m"}'.encode("utf-16"),
        b'{"model":"m","a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_rename_when_body_is_malformed_or_has_no_model_leaves_it(body: bytes) -> None:
    assert renamed(body) == body


spaces = st.sampled_from([b"", b" ", b"\n", b"\t \r\n"])
texts = st.one_of(st.text(max_size=8), st.sampled_from(["model", '"model":"x"', "\\", '"', "}]"]))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False), texts
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(st.tuples(st.one_of(texts, st.just("model")), inner), max_size=4).map(dict),
    ),
    max_leaves=12,
)
members_of = st.lists(st.tuples(st.one_of(texts, st.just("model")), values), max_size=6)


def escaped(text: str, draw: Any) -> bytes:
    """A JSON string, plain or with each third character as an escape."""
    parts, escape = [], draw(st.booleans())
    for at, char in enumerate(text):
        units = char.encode("utf-16-be", "surrogatepass")
        raw = json.dumps(char, ensure_ascii=False).encode("utf-8", "surrogatepass")[1:-1]
        long = "".join(f"\\u{units[n : n + 2].hex()}" for n in range(0, len(units), 2))
        parts.append(long.encode() if escape and at % 3 == 1 else raw)
    return b'"' + b"".join(parts) + b'"'


def written(value: Any, draw: Any) -> bytes:
    """The value in one of its many spellings."""
    if isinstance(value, str):
        return escaped(value, draw)
    if isinstance(value, dict):
        rows = [_member(key, each, draw) for key, each in value.items()]
        return b"{" + b",".join(rows) + draw(spaces) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(draw(spaces) + written(x, draw) for x in value) + b"]"
    return json.dumps(value).encode()


def _member(key: str, value: Any, draw: Any) -> bytes:
    gaps = [draw(spaces) for _ in range(4)]
    raw = escaped(key, draw), written(value, draw)
    return gaps[0] + raw[0] + gaps[1] + b":" + gaps[2] + raw[1] + gaps[3]


@given(members_of, st.data(), st.text(max_size=9))
@settings(deadline=None, max_examples=150)
def test_rename_when_document_is_any_gives_the_same_but_for_its_model(
    rows: list[tuple[str, Any]], data: st.DataObject, name: str
) -> None:
    """The body is put together from pieces, so where the values stand is known beforehand."""
    body, told = b"", b""
    new = json.dumps(name).encode()
    lead, tail = data.draw(spaces), data.draw(spaces)
    for number, (key, value) in enumerate(rows):
        member = _member(key, value, data.draw)
        raw = written(value, data.draw)
        comma = b"," if number else b""
        before = comma + data.draw(spaces) + escaped(key, data.draw) + data.draw(spaces) + b":"
        after = data.draw(spaces)
        if key == "model":
            body += before + raw + after
            told += before + new + after
        else:
            body += comma + member
            told += comma + member
    body, told = (lead + b"{" + each + b"}" + tail for each in (body, told))
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:  # half a surrogate
        assert renaming(body, True, name) is None
        return
    found = renaming(body, True, name)
    assert (body if found is None else found.apply(body)) == told
    assert (found is None) == all(key != "model" for key, _ in rows)
    if found is not None:
        assert json.loads(told) == {**json.loads(body), "model": name}
        assert len(told) - len(body) == found.growth


@given(st.binary(max_size=60) | st.text('{}[]",:\\model 1tn', max_size=60).map(str.encode))
@settings(deadline=None, max_examples=500)
def test_rename_when_bytes_are_any_touches_no_malformed_ones(body: bytes) -> None:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    has = isinstance(document, dict) and "model" in document
    assert (renaming(body, True, NEW) is not None) == has
    if has:
        assert json.loads(renamed(body)) == {**json.loads(body), "model": NEW}


@given(st.integers(0, 60))
def test_members_when_the_end_is_not_there_gives_only_what_is_whole(cut: int) -> None:
    body = b'{"model" : "m", "stream":true, "metadata":{"user_id":"u"} , "model":"n"}'[:cut]
    found, all_of_it = members(body, ("model", "stream", "metadata"))
    assert all_of_it
    texts = {name: [body[a:b] for a, b in spans] for name, spans in found.items()}
    assert texts["model"] == ([b'"m"'] if cut > 14 else [])
    assert texts["stream"] == ([b"true"] if cut > 29 else [])
    assert texts["metadata"] == ([b'{"user_id":"u"}'] if cut > 58 else [])


def test_rename_when_a_body_holds_very_much_looks_at_its_beginning_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards the loop: a few MB of brackets would hold up every other exchange."""
    monkeypatch.setattr(rename, "TURNS_MOST", 100)
    many = b"[" + b"[]," * 200 + b"1]"
    early = b'{"model":"m","a":' + many + b',"model":"n"}'
    assert renamed(early) == early.replace(b'"m"', TOLD)
    late = b'{"a":' + many + b',"model":"m"}'
    assert renamed(late) == late


async def streamed(edit: Renaming, pieces: list[bytes]) -> list[bytes]:
    async def come() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return [piece async for piece in edit.applied(come())]


@pytest.mark.parametrize("size", [1, 5, 14, 15, 16, 400])
async def test_rename_when_the_body_streams_changes_the_same_bytes(size: int) -> None:
    beginning = b'{"x":1,"model":"m","messages":[{"content":"'
    body = beginning + b"a" * 300 + b'","model":"other"}]}'
    edit = renaming(beginning, False, NEW)
    assert edit is not None
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    came = await streamed(edit, pieces)
    assert b"".join(came) == body.replace(b'"m"', TOLD)
    assert pieces[-1] == came[-1] or len(pieces) == 1, "what follows is passed on as it comes"


async def test_rename_when_the_stream_ends_too_early_passes_on_what_came() -> None:
    edit = renaming(b'{"x":1,"model":"m",', False, NEW)
    assert edit is not None
    assert await streamed(edit, [b'{"x"', b":1"]) == [b'{"x":1']
