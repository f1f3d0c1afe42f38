"""One broken entry in Redis is skipped and named; whatever stands beside it goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from click.testing import CliRunner

from batchllm_celery import Producer
from batchllm_celery.cli import cli
from batchllm_celery.connection import Connection
from batchllm_celery.errors import BatchUnreadableError
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import Beat, Heartbeat, Ledger, new_process_id
from batchllm_celery.models import BatchSpec, BatchState, Quota, QuotaLimits, StrategySpec
from batchllm_celery.settings import Settings
from batchllm_celery.worker.process import Runtime
from tests.integration.ledger_support import rows
from tests.support import wait_until_async

Break = Callable[[redis.Redis, Keys], Any]

_KEYS = [
    *("meta", "item", "fp", "ready", "held", "procs", "attempts", "done"),
    "failed",
    "out",
    "stopped",
]


def _other_type(name: str) -> Break:
    def break_(client: redis.Redis, keys: Keys) -> None:
        key = f"{keys.namespace}:{{batch:bad}}:{name}"
        client.delete(key)
        client.sadd(key, "not yours")
        client.expire(key, 600)

    return break_


def _field(name: str, value: bytes | None) -> Break:
    def break_(client: redis.Redis, keys: Keys) -> None:
        if value is None:
            client.hdel(keys.batch("bad").meta, name)
        else:
            client.hset(keys.batch("bad").meta, name, value)

    return break_


_NUMBERS = ["fed", "ok", "failed", "ttl", "rev", "round", "spent", "cost", "keep", "out_count"]
BATCHES: dict[str, Break] = {
    **{f"{name} is a set": _other_type(name) for name in _KEYS},
    **{f"{name} is no number": _field(name, b"abc") for name in _NUMBERS},
    **{f"{name} is not UTF-8": _field(name, b"\xff\xfe") for name in ("ok", "state", "spec")},
    **{f"no {name}": _field(name, None) for name in ("state", "ttl", "fed", "fail_fast")},
    "ok is nan": _field("ok", b"nan"),
    "ttl is endless": _field("ttl", b"1e309"),
    "total is a word": _field("total", b"all"),
    "deadline is a word": _field("deadline_at", b"tomorrow"),
    "state is a fruit": _field("state", b"banana"),
    "spec is no JSON": _field("spec", b"{"),
    "spec is a list": _field("spec", b"[]"),
    "spec has one field more": _field(
        "spec", b'{"batch_id": "bad", "strategy": {"name": "x"}, "mood": "good"}'
    ),
    "spec is of version 2": _field(
        "spec", b'{"batch_id": "bad", "strategy": {"name": "x"}, "version": 2}'
    ),
}


@pytest.fixture
def settings(redis_url: str, namespace: str) -> Settings:
    return Settings(
        redis_url=redis_url, namespace=namespace, heartbeat_seconds=0.05, offer_seconds=0.1
    )


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as opened:
        yield opened


async def _feed(ledger: Ledger, batch_id: str) -> None:
    spec = BatchSpec(batch_id=batch_id, strategy=StrategySpec(name="napping"))
    await ledger.feeding.create(spec)
    await ledger.feeding.feed(batch_id, 0, rows(3))
    await ledger.feeding.seal(batch_id, 3)


def _ledger(connection: Connection, settings: Settings) -> Ledger:
    keys = Keys(settings.namespace)
    return Ledger(connection, keys, process_id=new_process_id(), settings=settings)


@pytest.mark.parametrize("break_", BATCHES.values(), ids=BATCHES)
async def test_a_broken_batch_keeps_nobody_from_the_others(
    settings: Settings, client: redis.Redis, break_: Break, caplog: pytest.LogCaptureFixture
) -> None:
    """Offer, list, heartbeat and sweep skip it; it is named once, and to whoever asks for it."""
    keys = Keys(settings.namespace)
    async with Connection(str(settings.redis_url)) as connection:
        async with _ledger(connection, settings) as ledger:
            for batch_id in ("first", "bad", "last"):
                await _feed(ledger, batch_id)
            for batch_id in ("first", "bad", "last"):
                await ledger.claims.claim(batch_id, [0])
            break_(client, keys)
            heard: list[Beat] = []
            heartbeat = Heartbeat(
                str(settings.redis_url),
                keys,
                process_id=ledger.process_id,
                batches=lambda: ["first", "bad", "last"],
                notify=heard.extend,
                interval=0.05,
            )
            heartbeat.start()
            await wait_until_async(lambda: {"first", "last"} <= {beat.batch_id for beat in heard})
            heartbeat.stop()
        async with _ledger(connection, settings) as other:
            offered: set[str] = set()

            async def offers() -> bool:
                offered.update(
                    batch_id for batch_id, _ in await other.recovery.requeue("default", 100)
                )
                return {"first", "last"} <= offered

            await wait_until_async(offers)
            listed = {progress.batch_id for progress in await other.batches.newest()}
            assert listed == {"first", "last"}
            assert [(one.kind, one.name) for one in connection.broken.all()] == [("batch", "bad")]
            with pytest.raises(BatchUnreadableError, match="doctor"):
                await other.claims.claim("bad", [1])
            await other.batches.cancel("last")
            assert (await other.batches.progress("last")).state is BatchState.CANCELLED
    named = [r for r in caplog.records if "redis.broken_entry" in r.getMessage()]
    assert 1 <= len(named) <= 2  # the heartbeat's thread, and the rest of the process
    assert caplog.text.count("Traceback") == 0
    client.delete(*client.keys(f"{settings.namespace}:*"))


def _set_quota(**fields: bytes) -> Break:
    def break_(client: redis.Redis, keys: Keys) -> None:
        client.hset(keys.quota("bad").state, mapping=fields)  # type: ignore[arg-type]
        client.expire(keys.quota("bad").state, 600)

    return break_


def _text_at(key: Callable[[Keys], str]) -> Break:
    def break_(client: redis.Redis, keys: Keys) -> None:
        client.delete(key(keys))
        client.set(key(keys), "not yours", ex=600)

    return break_


def _member(key: Callable[[Keys], str]) -> Break:
    return lambda client, keys: client.zadd(key(keys), {b"\xff\xfe": 1})


def _worker(**fields: bytes) -> Break:
    def break_(client: redis.Redis, keys: Keys) -> None:
        mapping = {"worker_id": b"bad", **fields}
        client.hset(keys.worker("bad"), mapping=mapping)  # type: ignore[arg-type]
        client.expire(keys.worker("bad"), 600)
        client.zadd(keys.workers, {"bad": 1})

    return break_


OTHERS: dict[str, tuple[str, str, Break]] = {
    "quota: config is no JSON": ("quota", "bad", _set_quota(config=b"{")),
    "quota: config is a list": ("quota", "bad", _set_quota(config=b"[]")),
    "quota: config is not UTF-8": ("quota", "bad", _set_quota(config=b"\xff\xfe")),
    "quota: setup is noise": ("quota", "bad", _set_quota(setup=b"\xc1\xc1")),
    "quota: a string": ("quota", "bad", _text_at(lambda keys: keys.quota("bad").state)),
    "quota: its waiters": ("quota", "bad", _text_at(lambda keys: keys.quota("bad").waiting)),
    "quota: its name": ("quota", r"\xff\xfe", _member(lambda keys: keys.quotas)),
    "worker: pid is a word": ("worker", "bad", _worker(pid=b"abc")),
    "worker: slots is nothing": ("worker", "bad", _worker(slots=b"")),
    "worker: last_seen is a word": ("worker", "bad", _worker(last_seen=b"now")),
    "worker: host is not UTF-8": ("worker", "bad", _worker(host=b"\xff")),
    "worker: a string": (
        "worker",
        "bad",
        lambda client, keys: (
            client.zadd(keys.workers, {"bad": 1}),
            client.set(keys.worker("bad"), "x", ex=600),
        ),
    ),
    "worker: its name": ("worker", r"\xff\xfe", _member(lambda keys: keys.workers)),
    "batch: its name": ("batch", r"\xff\xfe", _member(lambda keys: keys.batches)),
    "batch: its state": ("batch", "bad", _field("state", b"banana")),
    "all batches": ("list", "batches", _text_at(lambda keys: keys.batches)),
    "all quotas": ("list", "quotas", _text_at(lambda keys: keys.quotas)),
    "all workers": ("list", "workers", _text_at(lambda keys: keys.workers)),
}


@pytest.mark.parametrize(("kind", "name", "break_"), OTHERS.values(), ids=OTHERS)
def test_status_shows_the_others_and_doctor_how_to_remove_it(
    settings: Settings, client: redis.Redis, kind: str, name: str, break_: Break
) -> None:
    """Quotas, workers, and the lists that name everything."""
    keys = Keys(settings.namespace)
    connection = ["--redis-url", str(settings.redis_url), "--namespace", settings.namespace]
    with Producer(settings) as producer:
        for batch_id in ("good", "bad"):
            producer.submit(["one"], strategy="napping", batch_id=batch_id)
        for quota in ("good", "bad"):
            producer.set_quota(Quota(name=quota, limits=QuotaLimits(requests_per_minute=5)))
        _worker_good(client, keys)
        break_(client, keys)
        batches = {progress.batch_id for progress in producer.batches()}
        quotas = {state.name for state in producer.quotas()}
        workers = {worker.worker_id for worker in producer.workers()}
        broken = [(one.kind, one.name) for one in producer.broken()]
    expected = f"{settings.namespace}:{name}" if kind == "list" else name
    assert broken == [(kind, expected)]
    assert ("good" in batches) is (expected != keys.batches)
    assert ("good" in quotas) is (expected != keys.quotas)
    assert ("good" in workers) is (expected != keys.workers)
    shown = CliRunner().invoke(cli, ["status", *connection])
    assert shown.exit_code == 0, shown.output
    assert "Broken in Redis" in shown.output
    advised = CliRunner().invoke(cli, ["doctor", *connection])
    assert "to remove it: redis-cli -s" in advised.output
    client.delete(*client.keys(f"{settings.namespace}:*"))


def _worker_good(client: redis.Redis, keys: Keys) -> None:
    client.hset(keys.worker("good"), mapping={"worker_id": "good", "pid": 1})
    client.expire(keys.worker("good"), 600)
    client.zadd(keys.workers, {"good": 2})
    client.expire(keys.workers, 600)


@pytest.mark.parametrize(
    "spec",
    [
        b'{"batch_id": "newer", "strategy": {"name": "napping"}, "mood": "good"}',
        b'{"batch_id": "newer", "strategy": {"name": "napping"}, "version": 2}',
        b'{"batch_id": "newer", "strategy": {"name": "napping"}, "version": 0}',
        b'{"batch_id": "newer", "strategy": {"name": "napping", "kind": 1}}',
    ],
    ids=["one field more", "version 2", "version 0", "a field more inside"],
)
async def test_what_a_worker_can_not_read_goes_back(
    settings: Settings, client: redis.Redis, spec: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch of a newer version is run by nobody as if it were of this one, and held by nobody."""
    caplog.set_level(logging.ERROR)
    keys = Keys(settings.namespace)
    async with Connection(str(settings.redis_url)) as connection:
        async with _ledger(connection, settings) as ledger:
            await _feed(ledger, "newer")
        client.hset(keys.batch("newer").meta, "spec", spec)
        runtime = Runtime(settings, str(settings.redis_url), lambda *_: None)
        for _ in range(3):
            tally = await runtime.run_items("newer", [0, 1, 2])
            assert (tally.succeeded, tally.failed) == (0, 0)
        assert client.hlen(keys.batch("newer").held) == 0
        assert client.zcard(keys.batch("newer").ready) == 3
        ready: Any = client.zrange(keys.batch("newer").ready, 0, 0, withscores=True)
        assert float(ready[0][1]) > time.time() * 1000 - 5000
        assert runtime.presence().unreadable == "newer"
        await runtime.close()
    assert caplog.text.count("redis.broken_entry") == 1
    await asyncio.sleep(0)


@pytest.mark.parametrize("key", ["out", "done", "failed", "fp"])
async def test_no_call_begins_that_could_not_be_recorded(
    settings: Settings, client: redis.Redis, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key of another type is noticed before a call: when its last check is a second old, and at
    once by a process that meets the batch for the first time. Nothing is counted as begun."""
    keys = Keys(settings.namespace)
    async with (
        Connection(str(settings.redis_url)) as connection,
        _ledger(connection, settings) as one,
        _ledger(connection, settings) as two,
    ):
        await _feed(one, "bad")
        claims = (await one.claims.claim("bad", [0, 1])).claims
        assert await one.claims.begin(claims[0]) is None
        name = getattr(keys.batch("bad"), key)
        client.delete(name)
        client.sadd(name, "not yours")
        client.expire(name, 600)
        with pytest.raises(BatchUnreadableError):
            await two.claims.claim("bad", [2])
        monkeypatch.setattr("batchllm_celery.ledger.claims.CHECK_SECONDS", 0.0)
        for _ in range(2):
            with pytest.raises(BatchUnreadableError):
                await one.claims.begin(claims[1])
    assert client.hget(keys.batch("bad").calls, "1") is None
    assert client.hlen(keys.batch("bad").held) == 2
    client.delete(*client.keys(f"{settings.namespace}:*"))
