"""Messages as nobody sends them: a right one, changed at any place, and things that are none."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import redis

from batchllm_celery.connection import broker_url
from batchllm_celery.queue import make_app, publish
from batchllm_celery.settings import Settings

#: What stands for literals that Python's own JSON does not write.
_LITERALS = {
    '"@deep@"': "[" * 100_000 + "]" * 100_000,
    '"@digits@"': "9" * 5000,
    '"@infinite@"': "1e309",
    '"@nan@"': "NaN",
}
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 0.5, 10**30, "", "abc", "a\nb", "\x1b[31m", "\ud800", "x" * 50_000),
    *([], {}, [[]], [None], ["abc", 3], {"a": 1}, [1, 2, 3]),
    *("@deep@", "@digits@", "@infinite@", "@nan@"),
    {"__type__": "uuid", "__value__": 5},
    {"__type__": "nobody", "__value__": 5},
    {"__type__": "bytes", "__value__": "abc"},
    {"__type__": "datetime", "__value__": "yesterday"},
    {"__type__": ["list"], "__value__": {}},
]
_RAW = [
    *(b"", b"{not json", b"\xff\xfe\x00", b"null", b"[]", b"5", b'"text"', b"{}", b"NaN"),
    *(b'{"properties": {}}', b'{"properties": []}', b"[" * 100_000, b"9" * 5000, b"x" * 3_000_000),
]


def right_message(url: str, namespace: str, batch_id: str = "nobody") -> dict[str, Any]:
    """A message as `publish` sends it, taken back out of its queue."""
    app = make_app(Settings(namespace=namespace, redis_url=url), url)
    assert app.conf.broker_url == broker_url(url)
    publish(app, batch_id, [0, 1, 2], queue="model")
    with redis.Redis.from_url(url) as client:
        prefix = f"{namespace}:celery:"
        (key,) = client.scan_iter(f"{prefix}model*")
        message: dict[str, Any] = json.loads(client.rpop(key))
        client.delete(f"{prefix}_kombu.binding.model")
    return message


def odd_messages(right: dict[str, Any], count: int, seed: int) -> Iterator[bytes]:
    """So many of them, the same for the same seed."""
    chance = random.Random(seed)
    for number in range(count):
        if number < len(_RAW):
            yield _RAW[number]
        elif chance.random() < 0.1:
            yield _cut(_encode(right), chance)
        else:
            yield _changed(right, chance)


def _cut(raw: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(raw))
    return chance.choice([raw[:at], raw[at:], raw[:at] + b"\xff" + raw[at:]])


def _changed(right: dict[str, Any], chance: random.Random) -> bytes:
    message: Any = copy.deepcopy(right)
    body = json.loads(base64.b64decode(message["body"]))
    message["properties"]["delivery_tag"] = f"odd-{chance.random()}"
    tree = {"message": message, "body": body}
    for _ in range(chance.choice([1, 1, 1, 2])):
        holder, name = chance.choice(list(_places(tree)))
        if chance.random() < 0.25:
            del holder[name]
        else:
            holder[name] = copy.deepcopy(chance.choice(_VALUES))
    message, body = tree.get("message"), tree.get("body")
    if isinstance(message, dict) and message.get("body") == right["body"]:
        message["body"] = base64.b64encode(_encode(body)).decode()
    return _encode(message)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    names = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    for name in names:
        yield tree, name
        if isinstance(tree[name], dict | list):
            yield from _places(tree[name])


def _encode(value: Any) -> bytes:
    text = json.dumps(value)
    for written, literal in _LITERALS.items():
        text = text.replace(written, literal)
    return text.encode()
