"""Our own app's workers: admission by items, revoke, a cold shutdown, other pools."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from batchllm_celery import Batch, FailureKind, Producer
from batchllm_celery.keys import Keys
from batchllm_celery.ledger.claims import Claims
from batchllm_celery.models import Quota, QuotaLimits
from batchllm_celery.queue import ITEMS_HEADER, RUN_ITEMS, make_app
from batchllm_celery.settings import Settings
from batchllm_celery.worker.process import Runtime
from tests.integration import worker_app  # noqa: F401 - registers its strategy here too
from tests.support import ValkeyServer, wait_until, wait_until_async

ROOT = Path(__file__).parents[2]
Start = Callable[..., "subprocess.Popen[bytes]"]
UNHINDERED = Quota(name="wide", limits=QuotaLimits(requests_per_minute=1_000_000))


@pytest.fixture
def producer(redis_url: str, namespace: str) -> Iterator[Producer]:
    with Producer(redis_url=redis_url, namespace=namespace) as opened:
        yield opened


@pytest.fixture
def start(redis_url: str, namespace: str, tmp_path: Path) -> Iterator[Start]:
    """Starts workers as `batchllm worker` does; with options plain `celery worker`s."""
    workers: list[subprocess.Popen[bytes]] = []

    def worker(
        *options: str,
        slots: int = 4,
        url: str = redis_url,
        app: str = "tests.integration.worker_app",
    ) -> subprocess.Popen[bytes]:
        name = f"w{len(workers)}@{namespace}"
        python = (sys.executable, "-W", "ignore", "-m")
        command = [*python, "batchllm_celery.worker", f"w{len(workers)}-{namespace}", "INFO"]
        if options:
            quiet = ("--without-mingle", "--without-gossip", "--without-heartbeat", "-n", name)
            command = [*python, "celery", "-A", "batchllm_celery", "worker", *quiet, *options]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ
            | {
                "BATCHLLM_REDIS_URL": url,
                "BATCHLLM_NAMESPACE": namespace,
                "BATCHLLM_APP": app,
                "BATCHLLM_SLOTS": str(slots),
                "BATCHLLM_LEASE_SECONDS": "3",
                "BATCHLLM_HEARTBEAT_SECONDS": "0.3",
                "BATCHLLM_OFFER_SECONDS": "0.5",
                "PYTHONPATH": str(ROOT),
            },
        )
        workers.append(process)
        return process

    yield worker
    for process in workers:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _submit(producer: Producer, count: int, seconds: float, **options: Any) -> Batch:
    return producer.submit(
        [f"prompt {n}" for n in range(count)],
        strategy="napping",
        params={"seconds": seconds},
        **options,
    )


def _calling(url: str, namespace: str, batch: Batch) -> int:
    with redis.Redis.from_url(url) as client:
        holders = client.hvals(Keys(namespace).batch(batch.id).held)
    return sum(holder.startswith(b"p ") for holder in holders)


async def test_items_handed_back_before_they_began_are_given_back(
    producer: Producer, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stays held by a process that never ran it, and the message ends without an error."""
    batch = await asyncio.to_thread(_submit, producer, 10, 0.01)
    settings = Settings(redis_url=redis_url, namespace=namespace)
    runtime = Runtime(settings, redis_url, lambda *_: None, slots=50)
    start = runtime.items.start

    def start_and_hand_back(*arguments: Any) -> Any:
        task = start(*arguments)
        runtime.items.hand_back(lambda item: True)
        return task

    monkeypatch.setattr(runtime.items, "start", start_and_hand_back)
    tally = await runtime.run_items(batch.id, range(10))
    assert (tally.returned, tally.succeeded, tally.failed) == (10, 0, 0)
    with redis.Redis.from_url(redis_url) as client:
        held = Keys(namespace).batch(batch.id).held
        await asyncio.to_thread(wait_until, lambda: not client.exists(held))
    await runtime.close()


async def test_what_a_claim_brings_to_a_draining_worker_goes_back(
    producer: Producer, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to stop while its claim was under way: it starts none of the items, nor waits with them
    for the quota."""
    quota = Quota(name="slow", limits=QuotaLimits(requests_per_minute=1))
    batch = await asyncio.to_thread(_submit, producer, 10, 0.01, quota=quota)
    settings = Settings(redis_url=redis_url, namespace=namespace)
    runtime = Runtime(settings, redis_url, lambda *_: None, slots=50)
    await runtime.open()
    claim = runtime.services.ledger.claims.claim

    async def claim_and_drain(*arguments: Any) -> Any:
        reply = await claim(*arguments)
        runtime.drain()
        return reply

    monkeypatch.setattr(runtime.services.ledger.claims, "claim", claim_and_drain)
    async with asyncio.timeout(10):
        tally = await runtime.run_items(batch.id, range(10))
    assert tally.returned == 10
    with redis.Redis.from_url(redis_url) as client:
        keys = Keys(namespace).batch(batch.id)
        assert not client.exists(keys.held)
        assert client.zcard(keys.ready) == 10
    await runtime.close()


async def test_a_days_end_leaves_nothing_held(
    producer: Producer, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of items park at once and are handed back while they do: all are free for others."""
    quota = Quota(name="naps", limits=QuotaLimits(requests_per_day=20))
    batch = await asyncio.to_thread(_submit, producer, 300, 0.01, quota=quota)
    settings = Settings(redis_url=redis_url, namespace=namespace, slots=300)
    runtime = Runtime(settings, redis_url, lambda *_: None)
    begin_all = Claims._begin_all

    async def begin_slowly(*args: Any) -> Any:
        await asyncio.sleep(0.05)
        return await begin_all(*args)

    monkeypatch.setattr(Claims, "_begin_all", begin_slowly)
    tally = await runtime.run_items(batch.id, range(300))
    assert tally.failed == 0
    assert (tally.succeeded, tally.returned) == (20, 280)  # none of the day's calls is wasted
    with redis.Redis.from_url(redis_url) as client:
        held = Keys(namespace).batch(batch.id).held
        await asyncio.to_thread(wait_until, lambda: not client.exists(held))
    assert not len(runtime.services.ledger.claims.holding)
    await runtime.close()


async def test_a_failed_look_for_lost_work_is_not_the_last(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop that offers it again goes on, whatever one look ran into."""
    settings = Settings(redis_url=redis_url, namespace=namespace, offer_seconds=0.05)
    runtime = Runtime(settings, redis_url, lambda *_: None, slots=4)
    await runtime.open()
    looks = 0

    async def offer(*_: object, **__: object) -> list[Any]:
        nonlocal looks
        looks += 1
        raise redis.ConnectionError("gone for a moment")

    monkeypatch.setattr(runtime.services.ledger.recovery, "requeue", offer)
    await wait_until_async(lambda: looks >= 2)
    await runtime.close()


def test_a_straggler_does_not_hold_up_its_neighbours(producer: Producer, start: Start) -> None:
    """While one item of a message takes long, items of other messages use the other slots."""
    slow = _submit(producer, 1, 30.0)
    quick = _submit(producer, 40, 0.01, items_per_task=10)
    start(slots=2)
    assert quick.wait(timeout=40).finished == 40
    assert slow.progress().finished == 0


def _commands(url: str) -> dict[str, int]:
    with redis.Redis.from_url(url) as client:
        statistics: Any = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): row["calls"] for name, row in statistics.items()}


def test_local_functions_have_no_brake_unless_a_quota_is_named(
    producer: Producer, start: Start
) -> None:
    """Without a provider nothing is known that could be exceeded; a name is taken at its word."""
    start(slots=20)
    for quota in (None, "named"):
        batch = producer.submit([f"{n}" for n in range(20)], strategy="unmetered", quota=quota)
        assert batch.wait(timeout=60).succeeded == 20
    free, named = producer.quota("unmetered"), producer.quota("named")
    assert free is not None
    assert named is not None
    assert (free.configured, free.allowed_per_minute) == (False, None)
    assert named.allowed_per_minute is not None


def _has_lmpop(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            client.execute_command("LMPOP", 1, "nothing", "LEFT")
        except redis.ResponseError:
            return False
    return True


def test_many_small_messages_are_fetched_and_acknowledged_together(
    producer: Producer, start: Start, redis_url: str
) -> None:
    """A message of one item does not cost a fetch, a note and an acknowledgement of its own."""
    if not _has_lmpop(redis_url):
        pytest.skip("this server gives one message at a time")
    batch = _submit(producer, 400, 0.0, items_per_task=1, quota=UNHINDERED)
    before = _commands(redis_url)
    start(slots=100)
    assert batch.wait(timeout=60).succeeded == 400
    after = _commands(redis_url)
    assert after["brpop"] - before.get("brpop", 0) < 100
    assert after["exec"] - before.get("exec", 0) < 200  # notes and acknowledgements


def test_messages_of_other_tasks_are_fetched_one_by_one(
    producer: Producer, start: Start, redis_url: str, tmp_path: Path
) -> None:
    """An app with tasks of its own loses no more of them with a worker than Celery does."""
    (tmp_path / "shop.py").write_text(
        "from celery import shared_task\n\n@shared_task(name='shop.mail')\ndef mail(): ...\n"
    )
    batch = _submit(producer, 100, 0.0, items_per_task=1, quota=UNHINDERED)
    before = _commands(redis_url).get("lmpop", 0)
    start(slots=20, app="tests.integration.worker_app,shop")
    assert batch.wait(timeout=60).succeeded == 100
    assert _commands(redis_url).get("lmpop", 0) == before


def test_messages_that_are_not_ours_or_name_nothing_harm_nobody(
    producer: Producer, start: Start, redis_url: str, namespace: str
) -> None:
    """An unknown task is thrown away once, and a message without items is only acknowledged."""
    app = make_app(Settings(redis_url=redis_url, namespace=namespace), redis_url)
    for _ in range(5):
        app.send_task("nobodys.task")
        app.send_task(RUN_ITEMS, args=("no-such-batch", []), headers={ITEMS_HEADER: 0})
    batch = _submit(producer, 100, 0.0, items_per_task=10, quota=UNHINDERED)
    worker = start(slots=20)
    assert batch.wait(timeout=60).succeeded == 100
    with redis.Redis.from_url(redis_url) as client:
        wait_until(lambda: not client.exists(f"{namespace}:celery:unacked"))
    assert worker.poll() is None
    app.close()


def test_a_redis_that_gives_one_message_at_a_time_will_do(start: Start, namespace: str) -> None:
    """Fetching many at once needs Redis 7.0, and a user who may."""
    server = ValkeyServer().start()
    try:
        with redis.Redis.from_url(server.url) as client:
            had_it = _has_lmpop(server.url)
            if had_it:
                client.execute_command("ACL", "SETUSER", "default", "-lmpop")
        with Producer(redis_url=server.url, namespace=namespace) as producer:
            batch = _submit(producer, 100, 0.0, items_per_task=1, quota=UNHINDERED)
            start(slots=20, url=server.url)
            assert batch.wait(timeout=60).succeeded == 100
        assert not had_it or "lmpop" in _commands(server.url)  # it was tried
    finally:
        server.stop()


def test_a_revoked_task_is_cancelled_and_its_items_run_elsewhere(
    producer: Producer, start: Start, redis_url: str, namespace: str
) -> None:
    """`revoke(terminate=True)` gives the item back within a second; it is offered again."""
    batch = _submit(producer, 1, 3.0)
    start()
    app = make_app(Settings(redis_url=redis_url, namespace=namespace), redis_url)
    wait_until(lambda: _calling(redis_url, namespace, batch) == 1)
    active = wait_until(lambda: app.control.inspect(timeout=0.5).active())
    (task,) = [task for tasks in active.values() for task in tasks]
    app.control.revoke(task["id"], terminate=True)
    wait_until(lambda: _calling(redis_url, namespace, batch) == 0, timeout=1.0)
    assert batch.wait(timeout=30).succeeded == 1
    app.close()


def test_a_cold_shutdown_is_quick_and_loses_nothing(
    producer: Producer, start: Start, redis_url: str, namespace: str
) -> None:
    """SIGQUIT ends a worker with calls in flight within 5 s; their items run elsewhere."""
    batch = _submit(producer, 4, 6.0)
    first = start()
    wait_until(lambda: _calling(redis_url, namespace, batch) == 4)
    first.send_signal(signal.SIGQUIT)
    first.wait(timeout=5)
    start()
    assert batch.wait(timeout=40).succeeded == 4


@pytest.mark.parametrize("pool", ["threads", "solo", "prefork"])
def test_other_pools_answer_too(producer: Producer, start: Start, pool: str) -> None:
    """Celery's own pools run our items through one loop thread per process."""
    batch = _submit(producer, 6, 0.01, items_per_task=2)
    start("-P", pool, "-c", "2")
    assert batch.wait(timeout=40).succeeded == 6


@pytest.mark.parametrize("how", ["rights", "password"])
def test_a_denial_in_mid_run_costs_no_item(start: Start, namespace: str, how: str) -> None:
    """Redis denies the worker's rights or its password for a while, and then no more."""
    server = ValkeyServer().start()
    everything = ["on", "allkeys", "allchannels", "+@all", ">pw"]
    # (Of our own keys: without the broker's Celery ends the process, for another to be started.)
    own = ["resetkeys", f"~{namespace}:celery:*"]
    taken = {"rights": own, "password": ["resetpass", ">another"]}[how]
    given = {"rights": ["allkeys"], "password": [">pw"]}[how]
    try:
        with (
            redis.Redis.from_url(server.url) as admin,
            Producer(redis_url=server.url, namespace=namespace) as producer,
        ):
            admin.execute_command("ACL", "SETUSER", "app", *everything)
            batch = _submit(producer, 200, 0.1, quota=UNHINDERED)
            worker = start(slots=10, url=server.url.replace("unix://", "unix://app:pw@"))
            wait_until(lambda: batch.progress().succeeded >= 20)
            admin.execute_command("ACL", "LOG", "RESET")
            admin.execute_command("ACL", "SETUSER", "app", *taken)
            if how == "password":  # who is connected stays so
                admin.execute_command("CLIENT", "KILL", "USER", "app")
            wait_until(lambda: len(admin.execute_command("ACL", "LOG")) >= 1)
            lasted = time.monotonic() + 4
            wait_until(lambda: time.monotonic() >= lasted)
            admin.execute_command("ACL", "SETUSER", "app", *given)
            assert batch.wait(timeout=60).succeeded == 200
            assert worker.poll() is None
    finally:
        server.stop()


PREFORK = ("-P", "prefork", "-c", "2")


@pytest.mark.parametrize("pool", [(), PREFORK])
def test_a_hosts_time_limits_do_not_reach_our_task(
    producer: Producer, start: Start, pool: tuple[str, ...]
) -> None:
    """Calls of 3 s under limits of 1 and 2 s: each is made once, and answered."""
    batch = _submit(producer, 2, 3.0, items_per_task=1)
    start(*pool, "--time-limit", "2", "--soft-time-limit", "1")
    progress = batch.wait(timeout=60)
    assert (progress.succeeded, progress.maybe_billed) == (2, 0)


@pytest.mark.parametrize("pool", ["prefork", "custom"])
def test_calls_that_a_time_limit_cuts_off_end_their_item(
    redis_url: str, namespace: str, tmp_path: Path, pool: str
) -> None:
    """Where a limit bites all the same the worker says so, an item is called `max_deliveries` times
    at most, and its outcome names the limit."""
    settings = Settings(redis_url=redis_url, namespace=namespace, max_deliveries=2)
    app = Celery("limited", broker=redis_url.replace("unix://", "redis+socket://"))
    with Producer(app=app, redis_url=redis_url, settings=settings) as producer:
        batch = _submit(producer, 2, 30.0, items_per_task=1, quota=UNHINDERED)
        command = ["celery", "-A", "tests.integration.limited_app", "worker", "-P", pool, "-c", "2"]
        log = tmp_path / "log"
        with log.open("wb") as output:
            worker = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", *command, "--without-mingle"],
                cwd=tmp_path,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ
                | {
                    "CELERY_CUSTOM_WORKER_POOL": "batchllm_celery.worker.pool:AsyncioPool",
                    "LIMITED_BROKER": redis_url.replace("unix://", "redis+socket://"),
                    "BATCHLLM_REDIS_URL": redis_url,
                    "BATCHLLM_NAMESPACE": namespace,
                    "BATCHLLM_LEASE_SECONDS": "3",
                    "BATCHLLM_HEARTBEAT_SECONDS": "0.3",
                    "BATCHLLM_OFFER_SECONDS": "0.3",
                    "PYTHONPATH": str(ROOT),
                },
            )
            try:
                progress = batch.wait(timeout=60)
            finally:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        results = list(batch.results())
    assert "worker.time_limit seconds=2" in log.read_text()
    assert progress.failed == 2
    assert progress.maybe_billed == 4
    for result in results:
        assert result.error_kind is FailureKind.CUT_OFF
        assert "time limit=2" in (result.error or "")


async def test_a_strategy_that_cancels_every_task_ends_no_background_work(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """As code does that takes the loop for its own: the items that it cut off would hang."""

    def ours() -> set[str]:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        names = {getattr(task.get_coro(), "__qualname__", "") for task in tasks}
        return names & {"Limiter._listen", "Runtime._requeue_forever", "touch_forever"}

    settings = Settings(
        redis_url=redis_url, namespace=namespace, heartbeat_file=tmp_path / "heartbeat"
    )
    runtime = Runtime(settings, redis_url, lambda *_: None)
    await runtime.open()
    assert len(ours()) == 3
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await wait_until_async(lambda: not ours(), interval=0)
    await wait_until_async(lambda: len(ours()) == 3)
    await runtime.close()
    assert not ours()
