"""Answers of both wire formats, right ones and mutated ones; and what may come of each."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.boundary import odd
from tests.boundary.strategy_cases import KEY, PROMPT

#: Marks the answer that a model means; a draft before it is none.
FINAL, DRAFT = "final", "draft"
SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string"}},
    "required": ["label"],
}


@dataclass
class Reply:
    """What the server sends to one request.

    `body`: the JSON that a client can read of it; None where there is none.
    `right`: whether nothing was changed: it must be a success.
    `tokens`: what it must count as; None where that is open.
    """

    name: str
    data: bytes
    status: int = 200
    body: Any = None
    right: bool = False
    tokens: int | None = None
    drop: bool = False


@dataclass
class Case:
    number: int
    wire: str
    replies: list[Reply]
    sent: list[Reply] = field(default_factory=list)

    def next(self) -> Reply:
        reply = self.replies[min(len(self.sent), len(self.replies) - 1)]
        self.sent.append(reply)
        return reply


def case(number: int, seed: int, wire: str, schema: bool) -> Case:
    rng = random.Random(f"{wire} {schema} {seed} {number}")
    replies = [_reply(rng, wire, schema) for _ in range(rng.choice([1, 1, 2, 3]))]
    return Case(number, wire, replies)


class Server:
    """Answers each request as the case that its prompt names says."""

    def __init__(self) -> None:
        self.cases: dict[int, Case] = {}
        self.strange: list[str] = []
        self.url = ""
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = re.search(rb"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(size[1])) if size else b""
            found = re.search(rb"case-(\d+)-", body)
            if found is None:
                self.strange.append((head + body)[:300].decode("latin-1"))
                writer.close()
                return
            reply = self.cases[int(found[1])].next()
            writer.write(reply.data)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


# -- right answers


def _text(rng: random.Random, schema: bool) -> str:
    if not schema:
        return f"answer {rng.randint(0, 9999)} {odd.text(rng)}".strip()
    final = json.dumps({"label": FINAL, "n": odd.plain(rng, 1)})
    draft = json.dumps({"label": DRAFT})
    return rng.choice(
        [
            final,
            final,
            f"```json\n{final}\n```",
            f"<think>maybe {draft}? no</think>{final}",
            f"<think>\n{draft}\n</think>\n```json\n{final}\n```",
            f"Here it is: {final}",
        ]
    )


def _tokens(rng: random.Random) -> tuple[int, int]:
    return rng.randint(1, 5000), rng.randint(1, 5000)


def _openai(rng: random.Random, text: str) -> tuple[Any, int]:
    inputs, outputs = _tokens(rng)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if rng.random() < 0.2:
        message["content"] = [
            {"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]},
            {"type": "text", "text": text},
        ]
    if rng.random() < 0.2:
        message |= {"refusal": None, "tool_calls": None, "reasoning_content": DRAFT}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    usage: dict[str, Any] = {
        "prompt_tokens": inputs,
        "completion_tokens": outputs,
        "total_tokens": inputs + outputs,
        "prompt_tokens_details": {"cached_tokens": rng.randint(0, inputs)},
        "completion_tokens_details": {"reasoning_tokens": rng.randint(0, outputs)},
    }
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m-2026"}
    return {**body, "choices": [choice], "usage": usage}, inputs + outputs


def _gemini(rng: random.Random, text: str) -> tuple[Any, int]:
    inputs, outputs = _tokens(rng)
    thoughts = rng.choice([0, 0, rng.randint(1, 500)])
    parts: list[Any] = [{"text": text}]
    if len(text) > 6 and rng.random() < 0.2:
        parts = [{"text": text[:5]}, {"text": text[5:]}]
    if thoughts:
        parts.insert(0, {"text": DRAFT, "thought": True})
    candidate = {
        "content": {"role": "model", "parts": parts},
        "finishReason": "STOP",
        "index": 0,
        "avgLogprobs": -0.5,
        "safetyRatings": [{"category": "HARM_CATEGORY_HARASSMENT", "probability": "NEGLIGIBLE"}],
    }
    usage = {
        "promptTokenCount": inputs,
        "candidatesTokenCount": outputs,
        "totalTokenCount": inputs + outputs + thoughts,
        "cachedContentTokenCount": rng.randint(0, inputs),
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": inputs}],
    }
    if thoughts:
        usage["thoughtsTokenCount"] = thoughts
    body = {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "m-2026"}
    return {**body, "responseId": "r"}, inputs + outputs + thoughts


# -- mutations


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += _paths(inner, (*path, name))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found += _paths(inner, (*path, index))
    return found


def _json_value(rng: random.Random, old: Any) -> Any:
    """Another value in place of one; whatever JSON can say."""
    return rng.choice(
        [
            None,
            None,
            True,
            0,
            -1,
            1.5,
            10**12,
            10**30,
            1e300,
            "",
            "  ",
            "x",
            "STOP",
            "stop",
            "error",
            "length",
            "content_filter",
            "SAFETY",
            "MAX_TOKENS",
            "a reason still to come",
            odd.ESC,
            [],
            {},
            [None],
            [old],
            [[old]],
            {"value": old},
            [old, old],
            str(old),
            odd.nested(60),
            odd.nested(300, mapping=True),
            "y" * 100_000,
            f"{PROMPT} {KEY}",
            odd.plain(rng),
        ]
    )


def _mutated(rng: random.Random, body: Any) -> tuple[Any, str]:
    body = copy.deepcopy(body)
    named = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        paths = _paths(body)
        if not paths:
            break
        path = rng.choice(paths)
        holder = body
        for name in path[:-1]:
            holder = holder[name]
        deed = rng.choice(["set", "set", "set", "delete", "rename", "double"])
        named.append(f"{deed} {'.'.join(map(str, path))}")
        if deed == "set":
            holder[path[-1]] = _json_value(rng, holder[path[-1]])
        elif deed == "delete":
            del holder[path[-1]]
        elif deed == "rename" and isinstance(holder, dict):
            holder[f"{path[-1]}x"] = holder.pop(path[-1])
        elif deed == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
    return body, ", ".join(named)


def _error(rng: random.Random) -> Any:
    words = rng.choice(["it failed", f"your prompt {PROMPT}", f"{KEY} is odd", odd.ESC, "x" * 9000])
    codes: list[Any] = [400, 404, 429, 500, 503, "429", "busy", None, 0, -5, 10**30, 1.5, [], {}]
    inner: Any = {
        "message": words,
        "code": rng.choice(codes),
        "type": rng.choice([None, "server_error", 5]),
    }
    details = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.01s"}
    return rng.choice(
        [
            {"error": inner},
            {"error": words},
            [{"error": inner}],
            {"errors": [inner, words]},
            {"detail": [{"msg": words, "loc": [1]}]},
            {"message": words},
            {"error": {**inner, "details": rng.choice([[details], details, [None], "x", [[1]]])}},
            {"error": odd.plain(rng)},
            odd.plain(rng),
        ]
    )


STATUSES = [400, 404, 408, 409, 413, 418, 422, 425, 429, 429, 451, 500, 500, 502, 503, 503, 504]
STATUSES += [520, 529, 599, 301, 302, 304, 307, 308, 201, 202, 204, 206, 226, 700, 999]
WAITS = ["0", "0.01", "-1", "soon", "", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "0x5", "1e-9", "½"]
TYPES = ["application/json", "application/json; charset=utf-8", "text/plain", "text/html", ""]
TYPES += ["application/json; charset=nonsense", "APPLICATION/JSON", "text/event-stream"]


def _http(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> bytes:
    given = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    given |= {**(headers or {}), "Connection": "close"}

    lines = [f"{name}: {value}" for name, value in given.items() if value]
    head = "\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""])
    return head.encode("latin-1", "replace") + content


def _reply(rng: random.Random, wire: str, schema: bool) -> Reply:
    make = _openai if wire == "openai" else _gemini
    body, tokens = make(rng, _text(rng, schema))
    kind = rng.choices(["right", "mutated", "error", "bytes", "http"], weights=[4, 8, 3, 4, 3])[0]
    plain = json.dumps(body).encode()
    if kind == "right":
        return Reply("right", _http(plain), body=body, right=True, tokens=tokens)
    if kind == "mutated":
        changed, how = _mutated(rng, body)
        data = json.dumps(changed).encode("utf-8", "surrogatepass")
        key = "usage" if wire == "openai" else "usageMetadata"
        same = isinstance(changed, dict) and changed.get(key) == body[key]
        whole = same and isinstance(changed, dict) and len(json.dumps(changed)) < 90_000
        known = tokens if whole and "error" not in changed else None
        return Reply(how, _http(data), body=changed, tokens=known)
    if kind == "error":
        said = _error(rng)
        status = rng.choice([200, 200, *STATUSES])
        headers = {"Retry-After": rng.choice(WAITS)} if rng.random() < 0.5 else {}
        if 300 <= status < 400:
            headers["Location"] = rng.choice(["/elsewhere", "http://127.0.0.1:1/", "::", ""])
        return Reply(
            f"error {status}", _http(json.dumps(said).encode(), status, headers), status, said
        )
    if kind == "bytes":
        name, data, headers = _broken(rng, plain, body)
        readable = _read(data, headers)
        return Reply(name, _http(data, 200, headers), body=readable)
    name, data = _broken_http(rng, plain)
    return Reply(name, data, body=body, drop=True)


def _read(data: bytes, headers: dict[str, str]) -> Any:
    """The JSON of a body, by what its headers say; None where it is none."""
    if headers.get("Content-Encoding") == "gzip":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError):
            return None
    if "latin" in headers.get("Content-Type", ""):
        data = data.decode("latin-1").encode()
    try:  # in any of JSON's encodings; of a number with 5,000 digits only its place matters
        return json.loads(data, parse_int=_some_int)
    except (ValueError, RecursionError):
        return None


def _some_int(text: str) -> int:
    return int(text[:100])


def _broken(rng: random.Random, plain: bytes, body: Any) -> tuple[str, bytes, dict[str, str]]:
    at = rng.randint(0, len(plain))
    latin = json.dumps(body, ensure_ascii=False).encode("latin-1", "replace")
    half = plain.replace(b"answer", b"answer \\ud800", 1)
    return rng.choice(
        [
            ("cut", plain[:at], {}),
            ("a bad byte", plain[:at] + b"\xff" + plain[at:], {}),
            ("a missing byte", plain[:at] + plain[at + 1 :], {}),
            ("twice", plain + plain, {}),
            ("lines", plain + b"\n" + plain, {}),
            ("garbage after", plain + b"}]", {}),
            ("blank before", b" \r\n\t" + plain, {}),
            ("a mark before", b"\xef\xbb\xbf" + plain, {}),
            ("UTF-16", plain.decode().encode("utf-16"), {}),
            ("Latin-1", latin, {"Content-Type": "application/json; charset=latin-1"}),
            ("a list of it", b"[" + plain + b"]", {}),
            ("a stream", b"data: " + plain + b"\n\ndata: [DONE]\n\n", {}),
            ("a page", b"<!doctype html><p>Welcome " + KEY.encode(), {"Content-Type": "text/html"}),
            ("empty", b"", {}),
            ("null", rng.choice([b"null", b"5", b'"x"', b"[]", b"{}", b"true", b"NaN"]), {}),
            ("deep", rng.choice([b"[" * 100_000, b'{"a":' * 50_000]), {}),
            ("NaN", plain.replace(b": 0", b": NaN").replace(b"-0.5", b"-Infinity"), {}),
            ("5,000 digits", re.sub(rb"\d{2,}", b"9" * 5000, plain, count=1), {}),
            ("half a pair", half, {}),
            ("packed", gzip.compress(plain), {"Content-Encoding": "gzip"}),
            ("called packed", plain, {"Content-Encoding": "gzip"}),
            ("packed and cut", gzip.compress(plain)[:100], {"Content-Encoding": "gzip"}),
            ("of another type", plain, {"Content-Type": rng.choice(TYPES)}),
            ("an unknown packing", plain, {"Content-Encoding": rng.choice(["zstd", "x", "br"])}),
        ]
    )


def _broken_http(rng: random.Random, plain: bytes) -> tuple[str, bytes]:
    at = rng.randint(0, len(plain))
    whole = _http(plain)
    longer = _http(plain, 200, {"Content-Length": str(len(plain) + 50)})
    shorter = _http(plain, 200, {"Content-Length": str(len(plain) // 2)})
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    return rng.choice(
        [
            ("nothing", b""),
            ("half a head", whole[: rng.randint(1, 60)]),
            ("half a body", whole[:-at] if at else whole[:30]),
            ("too short", longer),
            ("too long", shorter),
            ("no length", whole.replace(b"Content-Length", b"X-Length")),
            ("no HTTP", rng.choice([b"hello\r\n\r\n", b"\x16\x03\x01\x00", b"SSH-2.0-x\r\n"])),
            ("odd length", _http(plain, 200, {"Content-Length": rng.choice(["-1", "x", "1e3"])})),
            ("a large header", _http(plain, 200, {"X": "y" * 100_000})),
            ("chunks cut", chunked + b"%x\r\n" % len(plain) + plain[:at]),
            ("odd chunks", chunked + b"zz\r\n" + plain),
            ("no end of chunks", chunked + b"%x\r\n%s\r\n" % (len(plain), plain)),
            ("continue", b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + whole),
            ("HTTP/1.0", whole.replace(b"HTTP/1.1", b"HTTP/1.0")),
            ("HTTP/9.9", whole.replace(b"HTTP/1.1", b"HTTP/9.9")),
        ]
    )


# -- what may come of a reply


def texts(wire: str, body: Any) -> set[str]:
    """The answers that a body really gives: the text of each choice, at a good end."""
    if isinstance(body, list) and len(body) == 1:
        [body] = body
    name = "choices" if wire == "openai" else "candidates"
    choices = body.get(name) if isinstance(body, dict) else None
    found: set[str] = set()
    for choice in choices if isinstance(choices, list) else []:
        found |= _texts_of(wire, choice)
    return found


def _texts_of(wire: str, choice: Any) -> set[str]:
    try:
        if wire == "openai":
            end = choice.get("finish_reason", "stop")
            content = choice["message"]["content"]
        else:
            end, content = choice["finishReason"], choice["content"]["parts"]
        good = {"stop", "eos", "end_turn", "complete", "stop_sequence", "eos_token", "finished"}
        if not isinstance(end, str) or end.strip().lower() not in good:
            return set()
        parts = content if isinstance(content, list) else [content]
        text = "".join(_of_part(part) for part in parts if wire == "openai" or type(part) is dict)
        # No file holds half a pair: another character stands there.
        text = text.encode("utf-8", "replace").decode()
        return {text, text.replace("?", "\N{REPLACEMENT CHARACTER}")}
    except (KeyError, IndexError, TypeError, AttributeError):
        return set()


def _of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("thought"):
        return ""
    if part.get("type", "text") not in ("text", "output_text", None):
        return ""
    return part["text"] if isinstance(part.get("text"), str) else ""


names: defaultdict[str, int] = defaultdict(int)
