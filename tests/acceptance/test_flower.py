"""Flower beside a fleet: what it shows is what happened, and none of it is secret."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from batchllm_celery.cli.commands.flower import flower as command
from batchllm_celery.errors import UsageError
from tests.acceptance.conftest import StartProvider
from tests.acceptance.fleet import Fleet, read_results, write_rows
from tests.acceptance.servers import CHROMIUM, Flower, start_flower, valkey_on_tcp
from tests.support import wait_until

GEMINI = ("--model", "gemini:gemini-2.5-flash")
ITEMS = 500
MARKERS = ("PROMPTMARKER8842", "KEY-MARKER-7731", "Answer ", "FLOWERPASS-5512")
OUTCOME = re.compile(r"([\d,]+) ok, ([\d,]+) failed, ([\d,]+) tokens")


def outcome_of(task: dict[str, Any]) -> tuple[int, int, int]:
    """(ok, failed, tokens) as the task's text says."""
    found = OUTCOME.match(task["exception"] if task["state"] == "FAILURE" else task["result"])
    assert found, task
    ok, failed, tokens = (int(number.replace(",", "")) for number in found.groups())
    return ok, failed, tokens


def indexes_of(task: dict[str, Any]) -> range:
    """The items that the task's arguments name: `reviews[7]` or `reviews[200:210]`."""
    found = re.fullmatch(r"reviews\[(\d+)(?::(\d+))?\]", task["args"])
    assert found, task["args"]
    first = int(found[1])
    return range(first, int(found[2]) if found[2] else first + 1)


def everything_shown(flower: Flower) -> Iterator[tuple[str, str]]:
    """Each page and each answer of the API: (path, text)."""
    tasks = flower.tasks()
    (worker,) = flower.json("/api/workers?refresh=1")
    failed = next(uuid for uuid, task in tasks.items() if task["state"] == "FAILURE")
    paths = ["/", "/workers", "/tasks", "/broker", "/metrics", "/workers?json=1"]
    paths += ["/api/workers?refresh=1", "/api/tasks?limit=100000", "/api/task/types"]
    paths += ["/api/queues/length", f"/worker/{worker}"]
    paths += [f"/{page}/{uuid}" for uuid in (failed, *list(tasks)[:5]) for page in ("task",)]
    paths += [f"/api/task/info/{uuid}" for uuid in (failed, *list(tasks)[:5])]
    for path in paths:
        yield path, flower.get(path)


@pytest.fixture
def watched(fleet: Fleet, provide: StartProvider) -> Flower:
    """Flower beside a worker that runs a batch of 500: some items fail for good, some are retried,
    some refused by the quota."""
    provider = provide(latency=0.2, error_rate=0.1, block_rate=0.04)
    fleet.env["GOOGLE_GEMINI_BASE_URL"] = provider.url
    write_rows(fleet.folder / "rows.jsonl", ITEMS, prefix="PROMPTMARKER8842 ")
    fleet.start("worker", name="worker")
    flower = start_flower(fleet)
    wait_until(lambda: flower.sees_workers(1), timeout=40, interval=0.2)
    fleet.start("submit", "rows.jsonl", *GEMINI, "--rpm", "3000", "--batch-id", "reviews")
    wait_until(lambda: len(provider.calls) > 100, timeout=60)
    provider.refuse(3, retry_after=2.0)
    return flower


def test_flower_shows_what_the_batch_did_and_nothing_secret(fleet: Fleet, watched: Flower) -> None:
    """Every task is listed with its own items and the right state; counts and tokens add up to the
    batch's; retries and refusals are told; markers of prompt, answer and keys are nowhere."""
    seen_states: set[str] = set()

    def over() -> bool:
        tasks = watched.tasks()
        seen_states.update(task["state"] for task in tasks.values())
        return (
            sum(
                len(indexes_of(task))
                for task in tasks.values()
                if task["state"] in ("SUCCESS", "FAILURE")
            )
            == ITEMS
        )

    wait_until(over, timeout=60, interval=0.1)
    followed = fleet.run("results", "reviews", "-o", "out.jsonl", "--follow")
    assert followed.returncode == 1, followed.stderr
    lines = {line["index"]: line for line in read_results(fleet.folder / "out.jsonl")}
    tasks = watched.tasks()

    listed = [index for task in tasks.values() for index in indexes_of(task)]
    assert sorted(listed) == list(range(ITEMS))
    for task in tasks.values():
        its = [lines[index] for index in indexes_of(task)]
        ok, failed, tokens = outcome_of(task)
        assert (ok, failed) == (
            sum(line["success"] for line in its),
            sum(not line["success"] for line in its),
        )
        assert tokens == sum(line["token_usage"]["total_tokens"] for line in its)
        assert task["state"] == ("FAILURE" if failed else "SUCCESS")
        assert task["name"] == "batchllm.gemini"
        assert task["worker"].startswith("batchllm")
        assert task["runtime"] is None or task["runtime"] > 0
        if any(line["attempts"] > 1 for line in its):
            assert "retried" in f"{task['exception']} {task['result']}"
    assert any(task["state"] == "FAILURE" for task in tasks.values())
    assert "RETRY" in seen_states
    assert any("refused by the quota" in str(task) for task in tasks.values())

    for path, text in everything_shown(watched):
        for marker in MARKERS:
            assert marker not in text, (marker, path)
    if CHROMIUM:
        broken = next(uuid for uuid, task in tasks.items() if task["state"] == "FAILURE")
        pages = watched.browse("/tasks", "--dump-dom") + watched.browse(
            f"/task/{broken}", "--dump-dom"
        )
        assert "reviews[" in pages
        assert not [marker for marker in MARKERS if marker in pages]


def assert_closed_to_others(flower: Flower, process: psutil.Process) -> None:
    """Without the password there is no page and no API; it listens on loopback alone; no process
    list shows the password."""
    for path in ("/workers", "/tasks", "/api/tasks", "/api/workers"):
        assert flower.status(path, authorised=False) == 401
        assert flower.status(path, authorised=True) == 200
    listening = [one.laddr.ip for one in process.net_connections("tcp") if one.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    assert flower.password not in " ".join(process.cmdline())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--address", "0.0.0.0"), "choose --basic-auth"),
        (("--address", "0.0.0.0", "--basic-auth", "nobody"), "USER:PASSWORD"),
    ],
)
def test_flower_is_not_opened_to_everybody_by_mistake(
    arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another address than loopback without a password of one's own is refused."""
    monkeypatch.delenv("BATCHLLM_FLOWER_BASIC_AUTH", raising=False)
    with pytest.raises(UsageError, match=words):
        command.main(list(arguments), standalone_mode=False)


@pytest.mark.parametrize("where", ["embedded", "tcp"])
def test_flower_finds_the_fleet_wherever_its_valkey_is(lone_fleet: Fleet, where: str) -> None:
    """With no Redis configured Flower meets the workers at the embedded Valkey; over TCP with a
    password, which no page shows, at that one. It is open to this machine and its password only."""
    with valkey_on_tcp(password="VALKEYPASS3321") as url:
        if where == "tcp":
            lone_fleet.env["BATCHLLM_REDIS_URL"] = url
        (lone_fleet.folder / "rows.txt").write_text("one\ntwo\n")
        lone_fleet.start("worker", name="worker")
        flower = start_flower(lone_fleet)
        assert_closed_to_others(flower, psutil.Process(lone_fleet.processes[-1].pid))
        wait_until(lambda: flower.sees_workers(1), timeout=40, interval=0.2)
        submitted = lone_fleet.run("submit", "rows.txt", *GEMINI, "--dry-run")
        assert submitted.returncode == 0, submitted.stderr
        wait_until(
            lambda: [task["state"] for task in flower.tasks().values()] == ["SUCCESS"] * 2,
            timeout=30,
            interval=0.2,
        )
        for path in ("/broker", "/workers", "/api/workers?refresh=1", "/api/queues/length"):
            assert "VALKEYPASS3321" not in flower.get(path), path
        lone_fleet.stop()
