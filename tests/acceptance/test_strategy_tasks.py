"""Strategies as Celery tasks in a host's app with a result backend, on each pool."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import redis
from celery import Celery, chain, chord, group
from celery.exceptions import TaskRevokedError

from batchllm_celery import Producer, install, queue
from batchllm_celery.errors import ItemFailedError, UsageError
from batchllm_celery.ledger.standing import ItemPlace
from tests.acceptance.fleet import ROOT
from tests.support import ValkeyServer, wait_until

SECRET = "SECRET-PROMPT-4711"
NAMESPACE = "tasks"
POOLS = {
    "ours": ("-P", "custom", "-c", "20"),
    "prefork": ("-P", "prefork", "-c", "2"),
    "threads": ("-P", "threads", "-c", "8"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def host(valkey: ValkeyServer, folder: Path) -> Iterator[ModuleType]:
    """The host's module in this process, as in a web application's."""
    told = {
        "BATCHLLM_REDIS_URL": valkey.url,
        "BATCHLLM_NAMESPACE": NAMESPACE,
        "BATCHLLM_OFFER_SECONDS": "0.3",
        "BATCHLLM_LEASE_SECONDS": "2",
        "BATCHLLM_HEARTBEAT_SECONDS": "0.3",
        "BATCHLLM_STATE_DIR": str(folder),
        "JOURNAL": str(folder / "journal"),
        "CELERY_CUSTOM_WORKER_POOL": "batchllm_celery.worker.pool:AsyncioPool",
        "SLOW": "1.5",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        # An app of somebody else in the same process, whose Redis is not there.
        install(Celery("other", broker="redis://host:6379/3", set_as_current=False))
        from tests.acceptance import tasks_app

        # Other tests of this process may have installed apps of their own.
        ours = [one for one in queue.hosts if one.app is tasks_app.app]
        patch.setattr(queue, "hosts", ours)
        yield tasks_app


class Workers:
    """Workers of the host's app; each is killed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, pool: str = "ours") -> subprocess.Popen[bytes]:
        command = ["-m", "celery", "-A", "tests.acceptance.tasks_app", "worker", "-Q", "host,llm"]
        name = f"{pool}{len(self.processes)}"
        quiet = ("--without-mingle", "--without-gossip", "-l", "INFO", "-n", f"{name}@%h")
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command, *quiet, *POOLS[pool]],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        wait_until(lambda: " ready." in (self.folder / f"{name}.log").read_text(), 60)
        return process

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def workers(host: ModuleType, folder: Path) -> Iterator[Workers]:
    started = Workers(folder)
    yield started
    started.kill()


@pytest.fixture(scope="module")
def shared(
    host: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], None]]:
    """Starts one worker of our pool, which serves all tests from then on."""
    started = Workers(tmp_path_factory.mktemp("shared"))

    def start() -> None:
        if not started.processes:
            started.start()

    yield start
    started.kill()


@pytest.fixture
def events(host: ModuleType) -> Iterator[list[dict[str, Any]]]:
    """All that Flower would hear."""
    heard: list[dict[str, Any]] = []
    with host.app.connection_for_read() as connection:
        receiver = host.app.events.Receiver(connection, handlers={"*": heard.append})
        stopping = threading.Event()

        def listen() -> None:
            while not stopping.is_set():
                try:
                    receiver.capture(limit=None, timeout=0.2)
                except TimeoutError:
                    continue

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield heard
        stopping.set()
        thread.join(10)


def calls(folder: Path, word: str) -> int:
    journal = folder / "journal"
    return journal.read_text().count(word) if journal.exists() else 0


@pytest.mark.timeout(90)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_celerys_canvases_hold_on_every_pool(host: ModuleType, workers: Workers, pool: str) -> None:
    """delay, parameters, failures, link, link_error, chain, group, chord, results."""
    workers.start(pool)
    _canvases(host, pool)


def _canvases(host: ModuleType, pool: str) -> None:
    summarise, translate = host.summarise, host.translate
    assert summarise.delay("a").get(timeout=60) == "<a>"
    assert summarise.delay("a", suffix="!").get(timeout=20) == "<a>!"
    assert summarise.bind("?").delay("a").get(timeout=20) == "<a>?"
    assert summarise.apply_async(("routed",), queue="llm").get(timeout=20) == "<routed>"
    with pytest.raises(ItemFailedError) as failed:
        translate.delay(f"fail {pool}").get(timeout=20)
    assert (failed.value.kind, failed.value.message) == (
        "logic_error",
        f"ValueError: refused: fail {pool}",
    )
    flow = chain(host.fetch.s("x"), summarise.s(), translate.s(), host.note.s())
    assert flow().get(timeout=20) == f"noted <<{SECRET} of x>>"
    assert group(summarise.s(f"t{n}") for n in range(3))().get(timeout=20) == [
        "<t0>",
        "<t1>",
        "<t2>",
    ]
    joined = chord([translate.s(f"t{n}") for n in range(3)], host.join.s())
    assert joined().get(timeout=20) == "<t0>|<t1>|<t2>"
    linked = summarise.apply_async(("linked",), link=host.note.s(), priority=9)
    assert linked.get(timeout=20) == "<linked>"
    assert [child.get(timeout=20) for child in linked.children] == ["noted <linked>"]
    assert chain(host.fetch.s("x"), summarise.si("own"))().get(timeout=20) == "<own>"


@pytest.mark.timeout(90)
def test_no_prompt_and_no_answer_is_where_others_look(
    host: ModuleType,
    shared: Callable[[], None],
    events: list[dict[str, Any]],
    valkey: ValkeyServer,
    folder: Path,
) -> None:
    """Not in the broker, not in Flower's events, not in the logs: also not where a signature waits
    in another task's message, as a callback, or in a chord's body."""
    summarise = host.summarise
    word = "HIDDEN-0815"
    sent = [
        summarise.delay(f"{word} 1"),
        summarise.delay(f"fail {word}"),
        chain(host.note.s("x"), summarise.si(f"{word} 2"), host.translate.si(f"{word} 3"))(),
        chord([host.note.s("x")], summarise.si(f"{word} 4"))(),
        host.note.apply_async(("x",), link=summarise.si(f"{word} 5"), link_error=host.mourn.s()),
        group(summarise.s(f"{word} 6"), host.note.s("y"))(),
    ]
    with redis.Redis.from_url(valkey.url) as client:
        stored = {
            key: client.type(key) for key in client.scan_iter(f"{NAMESPACE}:celery:*", count=1000)
        }
        texts = []
        for key, kind in stored.items():
            if kind == b"list":
                texts += client.lrange(key, 0, -1)
            elif kind == b"hash":
                texts += client.hvals(key)
        assert texts
        assert not [text for text in texts if _holds(text, word)]
    shared()
    assert sent[0].get(timeout=60) == f"<{word} 1>"
    assert sent[2].get(timeout=30) == f"<{word} 3>"
    assert sent[3].get(timeout=30) == f"<{word} 4>"
    assert sent[5].get(timeout=30) == [f"<{word} 6>", "noted y"]
    wait_until(lambda: calls(folder, f"{word} 5") == 1)
    with pytest.raises(ItemFailedError):
        sent[1].get(timeout=30)
    done = {"task-succeeded", "task-failed"}
    wait_until(lambda: len({e["uuid"] for e in events if e["type"] in done}) >= 10)
    assert word not in json.dumps(events, default=str)
    of_ours = [e for e in events if e["type"] == "task-received" and e["name"][:8] == "batchllm"]
    assert {e["name"] for e in of_ours} == {"batchllm.summarise", "batchllm.translate"}
    assert all("[" in e["args"] for e in of_ours)
    shown = {e["result"] for e in events if e["type"] == "task-succeeded" and "ok" in e["result"]}
    assert shown == {"1 ok, 0 failed, 0 tokens"}
    logs = folder.parent.rglob("ours*.log")
    assert word not in "".join(log.read_text() for log in logs)


def _holds(text: bytes, word: str) -> bool:
    import base64

    if word.encode() in text:
        return True
    try:
        body = json.loads(text)
        body = body[0] if isinstance(body, list) else body
        return word.encode() in base64.b64decode(body["body"])
    except (ValueError, KeyError, TypeError):
        return False


@pytest.mark.timeout(90)
def test_celerys_canvases_hold_on_our_pool(host: ModuleType, shared: Callable[[], None]) -> None:
    """The same; this worker serves the tests that follow."""
    shared()
    _canvases(host, "ours")


@pytest.mark.timeout(90)
def test_a_killed_worker_costs_no_answer(
    host: ModuleType, workers: Workers, shared: Callable[[], None], folder: Path
) -> None:
    """kill -9 of one of two workers in mid-call: each task gets its one answer in seconds, although
    the broker would deliver its message again in an hour; links are called once."""
    shared()
    first = workers.start()
    sent = [
        host.summarise.apply_async((f"slow killed {n}",), link=host.note.s()) for n in range(12)
    ]
    wait_until(lambda: calls(folder, "slow killed") == 12)
    os.kill(first.pid, signal.SIGKILL)
    assert [one.get(timeout=40) for one in sent] == [f"<slow killed {n}>" for n in range(12)]
    assert 12 < calls(folder, "slow killed") < 24
    for one in sent:
        wait_until(partial(getattr, one, "children"))
        assert [child.get(timeout=20) for child in one.children] == [f"noted {one.get()}"]


@pytest.mark.timeout(90)
def test_revoke_cancels_the_item(
    host: ModuleType, shared: Callable[[], None], folder: Path
) -> None:
    """One that waits is never called; one that runs ends by `terminate`; neither runs elsewhere."""
    shared()
    sent = host.summarise.apply_async(("never called",), countdown=2)
    running = host.summarise.delay("slow revoked")
    wait_until(lambda: calls(folder, "slow revoked") == 1)
    sent.revoke()
    running.revoke(terminate=True)
    for one in (sent, running):
        with pytest.raises(TaskRevokedError):
            one.get(timeout=30)
    kinds = wait_until(lambda: _kinds(host, [sent, running]))
    assert kinds == ["cancelled", "cancelled"]
    assert (calls(folder, "never called"), calls(folder, "slow revoked")) == (0, 1)


def _kinds(host: ModuleType, tasks: list[Any]) -> list[str]:
    """Kinds of these tasks' failures in the ledger, when all have them."""
    found = {}
    with Producer(app=host.app) as producer:
        for batch in producer.batches():
            for result in producer.attach(batch.batch_id).results(follow=False):
                found[result.item_id] = str(result.error_kind)
    return [found[task.id] for task in tasks] if all(t.id in found for t in tasks) else []


@pytest.mark.timeout(90)
def test_an_expired_task_is_not_called(
    host: ModuleType, shared: Callable[[], None], folder: Path
) -> None:
    """As Celery has it: revoked; the ledger has its one outcome."""
    shared()
    sent = host.summarise.apply_async(("too late",), expires=0.5, countdown=1.0)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=60)
    assert wait_until(lambda: _kinds(host, [sent])) == ["deadline"]
    assert calls(folder, "too late") == 0


def test_what_can_not_be_sent_is_refused(host: ModuleType) -> None:
    """With what to do, before anything is stored."""
    summarise = host.summarise
    for send, words in (
        (lambda: summarise.apply_async((7,)), "must be text, not int"),
        (lambda: summarise.apply_async(()), "takes a prompt"),
        (lambda: summarise.delay("a", prefix="x"), "it takes suffix"),
        (lambda: summarise.apply_async(("a",), priority=10), "0 .usual. to 9"),
        (lambda: summarise.task.chunks([("a",)], 10), r"submit\(texts\) is a batch"),
        (lambda: ItemPlace.parse("x"), "BATCH:NUMBER"),
    ):
        with pytest.raises(UsageError, match=words):
            send()


def test_eager_tasks_run_here(host: ModuleType) -> None:
    """`task_always_eager`, `apply` and a direct call need no worker and no Redis."""
    summarise = host.summarise
    assert summarise.task.apply(("a",), {"suffix": "!"}).get() == "<a>!"
    assert summarise.task("b") == "<b>"
    host.app.conf.task_always_eager = True
    try:
        assert summarise.delay("c", suffix="?").get() == "<c>?"
        assert chain(host.fetch.s("x"), summarise.s())().get() == f"<{SECRET} of x>"
        assert summarise.delay("fail").state == "FAILURE"
    finally:
        host.app.conf.task_always_eager = False


@pytest.mark.timeout(90)
def test_the_end_of_a_batch_is_told_once_a_round(
    host: ModuleType, workers: Workers, shared: Callable[[], None], folder: Path
) -> None:
    """To a task of the host, by its name or a signature, with the batch's id; by one of all workers
    that see it. A retry is a new round."""
    shared()
    workers.start()
    with Producer(app=host.app) as producer:
        batch = producer.submit(
            ["a", "fail"], strategy=host.summarise, batch_id="told", on_finished="host.report"
        )
        signed = host.report.s(kind="signed")
        producer.submit(["a"], strategy=host.summarise, batch_id="signed", on_finished=signed)
        first = host.app.AsyncResult("finished-told-0")
        assert first.get(timeout=40) == "over told"
        assert host.app.AsyncResult("finished-signed-0").get(timeout=40) == "signed signed"
        assert batch.retry_failed() == 1
        assert host.app.AsyncResult("finished-told-1").get(timeout=40) == "over told"
        with pytest.raises(ValueError, match="name of a Celery task"):
            producer.submit(["a"], strategy=host.summarise, on_finished={})
    assert (calls(folder, "over told"), calls(folder, "signed signed")) == (2, 1)


@pytest.mark.timeout(60)
def test_a_message_with_its_prompt_in_clear_is_refused_by_name(
    host: ModuleType, shared: Callable[[], None]
) -> None:
    """Its task fails, and says how to send it."""
    from celery import Celery

    other = Celery("other", broker=host.app.conf.broker_url, set_as_current=False)
    other.conf.update(
        result_backend=host.app.conf.result_backend,
        broker_transport_options=host.app.conf.broker_transport_options,
        result_backend_transport_options=host.app.conf.result_backend_transport_options,
    )
    sent = other.send_task("batchllm.summarise", args=("clear",), queue="host")
    shared()
    with pytest.raises(UsageError, match="must come from a process that has the strategy"):
        sent.get(timeout=40)
