"""What the ledger promises, each with real processes: recovery, budgets, control, poison."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.chaos import Cut, Stage, staged
from tests.acceptance.fleet import assert_one_line_each, descendants, read_results
from tests.support import wait_until


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path, latency=0.3, BATCHLLM_OFFER_SECONDS="1", CHAOS_VISIBILITY="3") as stage:
        yield stage
        stage.assert_nothing_stays(timeout=90)


def recovery_seconds(stage: Stage, timeout: float) -> float:
    """From the death of a worker in mid-call until its item is called for again, when nobody can
    see by its pid that it is dead."""
    stage.fleet.env["CHAOS_ELSEWHERE"] = "1"
    stage.provider.change(latency=60.0)
    stage.rows("lost", 1)
    first, second = stage.ensure_workers(2)
    run = stage.start_run("lost")
    wait_until(lambda: stage.caller("lost") is not None, timeout=40)
    stage.provider.change(latency=0.1)
    if stage.caller("lost") is second:
        first, second = second, first
    wait_until(lambda: " ready." in stage.said(second), timeout=40)
    stage.kill(first)
    died = time.time()
    wait_until(lambda: stage.has_called(second, batch_id="lost"), timeout=timeout)
    stage.finish(run, "lost")
    return stage.journal.calls("lost")[-1].time - died


def test_an_item_of_a_killed_worker_runs_again_within_ten_seconds(stage: Stage) -> None:
    """With a lease of 5 s, on another machine, an item whose worker died is called for again within
    10 s."""
    stage.fleet.env["BATCHLLM_LEASE_SECONDS"] = "5"
    seconds = recovery_seconds(stage, timeout=10)
    print(f"\nrecovered in {seconds:.1f} s (lease 5 s)")
    assert 4 < seconds < 10


@pytest.mark.longrun
def test_an_item_of_a_killed_worker_runs_again_within_a_minute(stage: Stage) -> None:
    """The same at default settings: within 60 s."""
    del stage.fleet.env["BATCHLLM_OFFER_SECONDS"]
    seconds = recovery_seconds(stage, timeout=60)
    print(f"\nrecovered in {seconds:.1f} s (default settings)")
    assert 25 < seconds < 60


def test_a_budget_is_overshot_by_the_calls_in_flight_at_most(stage: Stage) -> None:
    """A token budget of 40 calls' worth: at most the slots' calls more are made; every row has its
    outcome (kind `budget`), and nothing else starts."""
    rows, slots = 200, 8
    stage.rows("spend", rows)
    stage.ensure_workers(2)
    probe = stage.rows("probe", 1)
    assert probe.exists()
    stage.finish(stage.start_run("probe"), "probe")
    (line,) = read_results(stage.out("probe"))
    budget = 40 * (line["token_usage"]["total_tokens"] + 1)
    run = stage.start_run("spend", "--token-budget", str(budget))

    assert run.wait(timeout=60) == 3

    lines = assert_one_line_each(stage.out("spend"), rows)
    tokens = [one["token_usage"]["total_tokens"] for one in lines if one["success"]]
    calls = stage.journal.calls("spend")
    print(f"\nbudget {budget} tokens: {sum(tokens)} spent by {len(calls)} calls, 2 x {slots} slots")
    assert len(calls) == len(tokens)
    assert budget <= sum(tokens) <= budget + 2 * slots * max(tokens)
    assert {one["error"]["kind"] for one in lines if not one["success"]} == {"budget"}


def cancel_many(stage: Stage, rows: int, within: float) -> None:
    """Cancel a batch of `rows` in mid-run, and see it end."""
    stage.rows("many", rows)
    stage.fleet.env["BATCHLLM_MAX_OUTSTANDING"] = str(rows)
    submitted = stage.fleet.run("submit", "many.jsonl", "--strategy", "chaos", "--batch-id", "many")
    assert submitted.returncode == 0, submitted.stderr
    workers = stage.ensure_workers(2)
    wait_until(lambda: all(map(stage.has_called, workers)), timeout=40)
    began = time.time()
    assert stage.fleet.run("cancel", "many").returncode == 0
    returned = time.time()
    with stage.client as client:
        state = client.hget("chaos:{batch:many}:meta", "state")
    assert state == b"cancelled"
    followed = stage.fleet.run("results", "many", "-o", "many.out", "--follow", timeout=200)
    assert followed.returncode == 3
    lines = assert_one_line_each(stage.out("many"), rows)
    stage.assert_nothing_stays(timeout=within)

    calls = stage.journal.calls("many")
    kinds = Counter("ok" if one["success"] else one["error"]["kind"] for one in lines)
    print(f"\n{rows:,} rows: cancelled in {returned - began:.2f} s, last call "
          f"{calls[-1].time - began:+.2f} s, broker empty after {time.time() - began:.1f} s; "
          f"{dict(kinds)}")  # fmt: skip
    assert max(call.time for call in calls) < returned + 1.0
    assert kinds["ok"] == len(calls)
    assert set(kinds) == {"ok", "cancelled"}
    assert stage.assert_books_balance("many", rows)["stopped"] == kinds["cancelled"]


def test_a_cancelled_batch_ends_everywhere_within_a_second(stage: Stage) -> None:
    """No call starts 1 s after `cancel`, every row has its outcome, the broker empties."""
    cancel_many(stage, 3_000, within=60)


@pytest.mark.longrun
@pytest.mark.timeout(600)
def test_a_cancelled_batch_of_a_hundred_thousand_ends_within_a_second(stage: Stage) -> None:
    """The same with 100,000 rows in Redis and their messages in the broker."""
    cancel_many(stage, 100_000, within=120)


def test_a_killed_producer_starts_again_without_a_needless_call(stage: Stage) -> None:
    """`run` killed with kill -9 at k of N and started again: N - k further calls, besides those
    that were in flight."""
    rows = 150
    stage.rows("again", rows)
    stage.fleet.env["BATCHLLM_MAX_OUTSTANDING"] = "40"  # the rest is in nobody's hands but its own
    command = list(stage.run_arguments("again"))
    command[command.index("--workers") + 1] = "2"
    run = stage.fleet.start(*command, name="run-again")
    wait_until(lambda: stage.written("again") >= 30, timeout=40)
    workers = [process.pid for process in descendants(run.pid)]
    since = time.time()
    run.kill()
    run.wait()
    wait_until(lambda: not set(workers) & _alive(stage), timeout=15)
    stage.cuts += [Cut(pid, since, time.time(), "producer killed") for pid in workers]
    before = len(stage.journal.calls("again"))
    known = stage.written("again")

    stage.finish(stage.fleet.start(*command, name="run-again"), "again")

    verdict = stage.judge("again", rows)
    print(f"\nkilled at {known} lines, {before} calls: {verdict}")
    assert verdict.calls == rows + verdict.repeats


def _alive(stage: Stage) -> set[int]:
    from tests.acceptance.fleet import processes_of

    return {process.pid for process in processes_of(stage.folder)}


def quarantine(stage: Stage, *, slots: int, rows: int, deaths: int) -> None:
    """One row that kills its worker among many that don't."""
    stage.fleet.env |= {"BATCHLLM_SLOTS": str(slots), "BATCHLLM_MAX_DELIVERIES": str(deaths)}
    path = stage.rows("poison", rows)
    lines = path.read_text().splitlines()
    poison = json.loads(lines[rows // 3])
    lines[rows // 3] = json.dumps(poison | {"prompt": "poison POISON"})
    path.write_text("\n".join(lines) + "\n")
    died, run = 0, stage.start_run("poison")
    while run.poll() is None:
        for worker in [one for one in stage.ensure_workers(1) if one.poll() is not None]:
            stage.workers.remove(worker)
            died += 1
        time.sleep(0.05)
    assert run.returncode == 1, stage.fleet.said("run-poison")
    assert died == deaths
    by_index = {line["index"]: line for line in assert_one_line_each(stage.out("poison"), rows)}
    failed = [line for line in by_index.values() if not line["success"]]
    assert [line["index"] for line in failed] == [rows // 3]
    assert failed[0]["error"]["kind"] == "worker_lost"
    calls = Counter(call.prompt for call in stage.journal.calls("poison"))
    print(f"\n1 poison item among {rows} rows and {slots} slots, {deaths} deaths: convicted alone; "
          f"{sum(calls.values()) - (rows - 1)} calls of neighbours repeated")  # fmt: skip
    stage.assert_books_balance("poison", rows)


def test_a_poison_item_is_quarantined_and_nobody_else(stage: Stage) -> None:
    """A row that kills its worker in mid-call is failed as `worker_lost` after `max_deliveries`
    deaths; all its neighbours are answered."""
    quarantine(stage, slots=8, rows=80, deaths=2)


@pytest.mark.longrun
@pytest.mark.timeout(600)
def test_a_poison_item_among_a_thousand_slots_is_quarantined_alone(stage: Stage) -> None:
    """The same at the default 5 deaths, among 1,000 slots."""
    stage.provider.change(latency=5.0)
    quarantine(stage, slots=1_000, rows=1_200, deaths=5)


def test_retry_failed_and_resume_after_cancel_leave_one_line_for_every_row(stage: Stage) -> None:
    """Failed rows retried, a cancelled batch resumed: the file has one line for each row, with the
    later outcome; what had succeeded is not called for again."""
    rows = 60
    path = stage.rows("twice", rows)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for row in lines[:10]:
        row["prompt"] += " BROKEN"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    stage.ensure_workers(1)
    run = stage.start_run("twice", "--rpm", "240")  # slow enough to be cancelled in the middle
    wait_until(lambda: stage.written("twice") > 12, timeout=40)
    assert stage.fleet.run("cancel", "twice").returncode == 0
    assert run.wait(timeout=60) == 3
    first = assert_one_line_each(stage.out("twice"), rows)
    kinds = Counter("ok" if one["success"] else one["error"]["kind"] for one in first)
    assert set(kinds) == {"ok", "cancelled", "invalid_request"}

    resumed = stage.start_run("twice")
    assert resumed.wait(timeout=60) == 1, stage.fleet.said("run-twice")
    second = assert_one_line_each(stage.out("twice"), rows)
    assert sum(not line["success"] for line in second) == 10

    (stage.folder / "repaired").touch()
    assert stage.fleet.run("retry-failed", "twice").returncode == 0
    stage.finish(stage.start_run("twice"), "twice")

    assert all(line["success"] for line in assert_one_line_each(stage.out("twice"), rows))
    assert len(stage.journal.calls("twice")) == rows
    outcomes = rows + kinds["cancelled"] + 10
    stage.assert_books_balance("twice", rows, outcomes=outcomes)
    print(f"\n{rows} rows, {kinds['cancelled']} cancelled and resumed, 10 failed and retried: "
          f"{rows} calls, one line each")  # fmt: skip
