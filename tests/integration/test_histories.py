"""A file that is changed and run again under the same id: who is called, and what the file holds
afterwards. Fourteen histories, for rows with ids, without, and half of them equal; each also with
Redis gone meanwhile, and with an interrupt in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from batchllm_celery import Producer
from batchllm_celery.cli.going_on import begin
from batchllm_celery.connection import Connection
from batchllm_celery.errors import BatchConflictError
from batchllm_celery.files.result_file import OutputError, ResultFile
from batchllm_celery.files.rows import Rows
from batchllm_celery.keys import Keys
from batchllm_celery.models import BatchSpec, StrategySpec
from batchllm_celery.producer.continuing import ChangedRowsError
from batchllm_celery.producer.plan import Rerun
from tests.integration.ledger_support import answer, failure, ledger

KINDS = ("ids", "no ids", "half of them equal")
N = 10
BATCH = "nightly"
Fields = dict[str, Any]


class Job:
    """`batchllm run` in this process: the same steps, and a worker that keeps a journal."""

    def __init__(self, folder: Path, redis_url: str, namespace: str) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.namespace = namespace
        self.out = folder / "out.jsonl"

    def run(
        self,
        rows: list[Fields],
        *rerun: str,
        system: str = "",
        stop_after: int | None = None,
        failing: tuple[str, ...] = (),
    ) -> list[str]:
        """The prompts that were called. `stop_after` so many of them it is interrupted."""
        source = self.folder / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        strategy = StrategySpec(name="echo", params={"system": system})
        spec = BatchSpec(batch_id=BATCH, strategy=strategy, queue="q", keep_results=False)
        sink = ResultFile(self.out, BATCH)
        with contextlib.ExitStack() as opened:
            producer = opened.enter_context(
                Producer(redis_url=self.redis_url, namespace=self.namespace)
            )
            reader = opened.enter_context(contextlib.closing(Rows(str(source), strategy)))
            try:
                beginning = begin(producer, spec, reader, sink, frozenset(map(Rerun, rerun)))
                batch = producer.open(beginning.spec, renew=beginning.renew)
                batch.consume()
            except BaseException:
                sink.abandon()
                raise
            batch.feed(beginning.feed(reader))
            called = asyncio.run(self._work(stop_after, failing))
            if stop_after is not None:
                batch.pause()
            while taken := batch.take(timeout=0.0):
                sink.write(taken)
                if (receipt := sink.sync()) is not None:
                    batch.acknowledge(receipt)
            progress = batch.progress()
            sink.finish(complete=progress.is_over)
            assert progress.is_over or stop_after is not None
        if progress.is_over:
            self.check(rows)
        return called

    async def _work(self, stop_after: int | None, failing: tuple[str, ...]) -> list[str]:
        """What the workers do until the batch is over, or interrupted."""
        called: list[str] = []
        if stop_after == 0:
            return called
        async with Connection(self.redis_url) as connection:
            worker = ledger(connection, self.namespace)
            ready: Any = await connection.client.zrange(
                worker.keys.batch(BATCH).ready, 0, (stop_after or 0) - 1
            )
            claims = (await worker.claims.claim(BATCH, [int(index) for index in ready])).claims
            for claim in claims:
                prompt = str(claim.payload.prompt)
                called.append(prompt)
                assert await worker.claims.begin(claim) is None
                make = failure if prompt in failing else answer
                result = claim.payload.signed(make(claim))
                assert await worker.claims.record(claim, result, spent_tokens=5, cost=0.5)
            await worker.close()
        return called

    def lines(self) -> list[Fields]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def check(self, rows: list[Fields]) -> None:
        """One line for every row, at its place, with its id, its context and the answer to it."""
        lines = sorted(self.lines(), key=lambda line: line["index"])
        assert [line["index"] for line in lines] == list(range(len(rows)))
        for line, row in zip(lines, rows, strict=True):
            if line["success"]:
                assert line["item_id"] == str(row.get("item_id", line["index"]))
                assert (line["context"] or {}) == {k: v for k, v in row.items() if k in CONTEXT}

    def lose_redis(self) -> None:
        with redis.Redis.from_url(self.redis_url) as client:
            keys = list(client.scan_iter(f"{self.namespace}:*"))
            if keys:
                client.delete(*keys)


CONTEXT = ("column", "other_id")


@pytest.fixture
def job(tmp_path: Path, redis_url: str, namespace: str) -> Job:
    return Job(tmp_path, redis_url, namespace)


def rows_of(kind: str, count: int = N) -> list[Fields]:
    if kind == "ids":
        return [{"item_id": f"id-{i}", "prompt": f"text {i}"} for i in range(count)]
    if kind == "no ids":
        return [{"prompt": f"text {i}"} for i in range(count)]
    return [{"prompt": "same" if i % 2 else f"text {i}"} for i in range(count)]


def at_the_top(kind: str) -> list[Fields]:
    top = {"prompt": "brand new"} | ({"item_id": "id-new"} if kind == "ids" else {})
    return [top, *rows_of(kind)]


def in_order(kind: str) -> list[Fields]:
    return sorted(rows_of(kind), key=lambda row: str(row["prompt"]), reverse=True)


def ids_removed_or_added(kind: str) -> list[Fields]:
    if kind == "ids":
        return [{"prompt": row["prompt"]} for row in rows_of(kind)]
    return [{**row, "item_id": f"new-{i}"} for i, row in enumerate(rows_of(kind))]


def ids_renamed(kind: str) -> list[Fields]:
    rows = rows_of(kind)
    return [
        {**row, "item_id": f"other-{i}"} if "item_id" in row else {**row, "other_id": i}
        for i, row in enumerate(rows)
    ]


def with_a_column(kind: str) -> list[Fields]:
    return [{**row, "column": i} for i, row in enumerate(rows_of(kind))]


def edited(kind: str) -> list[Fields]:
    rows = rows_of(kind)
    rows[4] = {**rows[4], "prompt": "edited"}
    return rows


def swapped(kind: str) -> list[Fields]:
    rows = rows_of(kind)
    rows[0]["prompt"], rows[2]["prompt"] = rows[2]["prompt"], rows[0]["prompt"]
    return rows


Change = Callable[[str], list[Fields]]
#: What is changed; calls by kind, negative ones are refused rows; options.
HISTORIES: dict[str, tuple[Change, tuple[int, int, int], dict[str, Any]]] = {
    "nothing": (rows_of, (0, 0, 0), {}),
    "another system": (rows_of, (-N, -N, -N), {"system": "new"}),
    "another system, changed": (rows_of, (N, N, N), {"system": "new", "rerun": "changed"}),
    "another system, none": (rows_of, (0, 0, 0), {"system": "new", "rerun": "none"}),
    "everything": (rows_of, (N, N, N), {"rerun": "all"}),
    "a row at the top": (at_the_top, (1, 1, 1), {}),
    "another order": (in_order, (0, 0, 0), {}),
    "ids removed or added": (ids_removed_or_added, (0, 0, 0), {}),
    "ids renamed": (ids_renamed, (0, 0, 0), {}),
    "truncated": (lambda kind: rows_of(kind)[:6], (0, 0, 0), {}),
    "doubled": (lambda kind: rows_of(kind) * 2, (0, N, N), {}),
    "a text edited": (edited, (-1, -1, -1), {}),
    "a column added": (with_a_column, (0, 0, 0), {}),
    "two texts swapped": (swapped, (-2, 0, 0), {}),
}
CASES = [pytest.param(name, kind, id=f"{name}, {kind}") for name in HISTORIES for kind in KINDS]


@pytest.mark.parametrize("gone", [False, True], ids=["Redis there", "Redis gone"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_changed_input_pays_only_for_what_is_new(
    job: Job, name: str, kind: str, gone: bool
) -> None:
    change, expected, options = HISTORIES[name]
    calls = expected[KINDS.index(kind)]
    options = dict(options)
    rerun = (options.pop("rerun"),) if "rerun" in options else ()
    assert len(job.run(rows_of(kind))) == N
    before = job.out.read_bytes()
    if gone:
        job.lose_redis()
    rows = change(kind)
    if calls < 0:
        for _ in range(2):
            with pytest.raises(ChangedRowsError, match=rf"^{-calls} finished rows? ask"):
                job.run(rows, *rerun, **options)
        assert job.out.read_bytes() == before
        return
    if calls > 1:  # interrupted in the middle; the printed command has no --rerun
        first = job.run(rows, *rerun, stop_after=calls // 2, **options)
        assert len(first) == calls // 2
        if gone:
            job.lose_redis()
        assert len(job.run(rows, **options)) == calls - calls // 2
    else:
        assert len(job.run(rows, *rerun, **options)) == calls
    settled = job.out.read_bytes()
    assert job.run(rows, **options) == []
    assert job.out.read_bytes() == settled


@pytest.mark.parametrize("gone", [False, True], ids=["Redis there", "Redis gone"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_goes_on_or_is_refused(job: Job, kind: str, gone: bool) -> None:
    assert len(job.run(rows_of(kind), stop_after=6)) == 6
    if gone:
        job.lose_redis()
    with pytest.raises(ChangedRowsError, match=r"^6 finished rows"):
        job.run(rows_of(kind), system="new")
    assert len(job.run(rows_of(kind))) == 4


@pytest.mark.parametrize("gone", [False, True], ids=["Redis there", "Redis gone"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_failed_rows_the_mended_one_runs_and_all_of_them_on_request(
    job: Job, kind: str, gone: bool
) -> None:
    failing = tuple(f"text {i}" for i in (0, 2, 4))
    assert len(job.run(rows_of(kind), failing=failing)) == N
    if gone:
        job.lose_redis()
    mended = rows_of(kind)
    mended[4] = {**mended[4], "prompt": "mended"}
    assert job.run(mended, failing=failing) == ["mended"]
    assert job.run(mended, failing=failing) == []
    assert sorted(job.run(mended, "failed")) == ["text 0", "text 2"]
    assert all(line["success"] for line in job.lines())


def test_answers_that_no_row_asks_for_are_kept_beside_the_file(job: Job) -> None:
    job.run(rows_of("ids"))
    job.run(rows_of("ids")[:6])
    gone = (job.folder / "out.gone.jsonl").read_text().splitlines()
    assert [json.loads(line)["item_id"] for line in gone] == [f"id-{i}" for i in range(6, N)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_come_back_find_their_answers(job: Job, kind: str) -> None:
    """A run with --limit, or of a part of the file, costs nothing afterwards."""
    job.run(rows_of(kind))
    assert job.run(rows_of(kind)[:3]) == []
    assert job.run(rows_of(kind)) == []
    assert len(job.lines()) == N
    # What was asked again on purpose is not taken back.
    assert len(job.run(rows_of(kind), "all", stop_after=4)) == 4
    assert len(job.run(rows_of(kind))) == N - 4


def test_a_refusal_names_the_option_and_the_price(job: Job) -> None:
    job.run(rows_of("ids"))
    before = job.out.read_text().replace('"cost": null', '"cost": 0.5')
    job.out.write_text(before)
    with pytest.raises(ChangedRowsError, match=r"\(system\); paying again about \$5.0000"):
        job.run(rows_of("ids"), system="new")


def test_results_of_an_earlier_version_are_kept(job: Job) -> None:
    """They don't say what they answer: known by id, or by place."""
    for kind in ("ids", "no ids"):
        job.run(rows_of(kind), "all")
        lines = job.lines()
        for line in lines:
            line["metadata"] = {}
        job.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        job.lose_redis()
        assert job.run(rows_of(kind), system="new") == []
        (job.folder / "out.gone.jsonl").unlink(missing_ok=True)


def test_results_that_went_to_another_file_are_named(job: Job) -> None:
    job.run(rows_of("ids"))
    job.out.unlink()
    (job.folder / ".out.jsonl.batch").unlink()
    with pytest.raises(OutputError, match="10 results of batch nightly were written to another"):
        job.run(rows_of("ids"))


def test_a_cut_between_file_and_redis_pays_nothing_twice(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has its new places, Redis the old ones: the next run sees which is the newer."""
    job.run(rows_of("no ids"))
    rows = [{"prompt": "brand new"}, *rows_of("no ids")[2:]]
    with monkeypatch.context() as patch:
        patch.setattr(Producer, "open", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.run(rows, "changed")
    assert job.run(rows, "changed") == ["brand new"]


# -- in Python, without a file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["nothing", "a row at the top", "another order", "truncated"])
def test_kept_results_move_with_their_rows(
    job: Job, redis_url: str, namespace: str, name: str, kind: str
) -> None:
    change, expected, _ = HISTORIES[name]
    with Producer(redis_url=redis_url, namespace=namespace) as producer:
        producer.submit(rows_of(kind), strategy="echo", batch_id=BATCH, queue="q")
        assert len(asyncio.run(job._work(None, ()))) == N
        rows = change(kind)
        batch = producer.submit(rows, strategy="echo", batch_id=BATCH, queue="q")
        assert len(asyncio.run(job._work(None, ()))) == expected[KINDS.index(kind)]
        results = sorted(batch.results(follow=False), key=lambda result: result.index)
        assert [result.output for result in results] == [
            f"answer to {row['prompt']}" for row in rows
        ]
        with pytest.raises(ChangedRowsError, match="rerun='changed' or 'none'"):
            producer.submit(
                rows, strategy="echo", params={"system": "x"}, batch_id=BATCH, queue="q"
            )
        # What was taken away is nobody's: nothing is guessed.
        given = [result.to_json() for result in results]
        client = redis.Redis.from_url(redis_url)
        client.delete(Keys(namespace).batch(BATCH).out)
        client.close()
        moved_on = rows[1:]
        with pytest.raises(BatchConflictError, match="known="):
            producer.submit(moved_on, strategy="echo", batch_id=BATCH, queue="q")
        producer.submit(moved_on, strategy="echo", batch_id=BATCH, queue="q", known=given)
        assert asyncio.run(job._work(None, ())) == []


# -- any history

TEXTS = st.sampled_from([f"t{i}" for i in range(5)])
IDS = st.one_of(st.none(), st.sampled_from([f"i{i}" for i in range(5)]))


def test_any_history_keeps_its_promises(job: Job) -> None:
    """Random edits, interrupts, losses of Redis: every row gets one line, no paid answer to a
    question that is asked still is paid for again, and a refusal changes nothing."""

    class Edits(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            job.lose_redis()
            for path in job.folder.iterdir():
                path.unlink()
            self.rows: list[Fields] = [{"prompt": "t0"}]
            self.system = ""

        @rule(at=st.integers(0, 5), text=TEXTS, own=IDS)
        def insert(self, at: int, text: str, own: str | None) -> None:
            if own is None or own not in {row.get("item_id") for row in self.rows}:
                self.rows.insert(at, {"prompt": text} | ({"item_id": own} if own else {}))

        @rule(at=st.integers(0, 5))
        def delete(self, at: int) -> None:
            if len(self.rows) > 1:
                del self.rows[at : at + 1]

        @rule(at=st.integers(0, 5), text=TEXTS)
        def edit(self, at: int, text: str) -> None:
            self.rows[at : at + 1] = [{**row, "prompt": text} for row in self.rows[at : at + 1]]

        @rule()
        def turn(self) -> None:
            self.rows.reverse()

        @rule()
        def lose_redis(self) -> None:
            job.lose_redis()

        @rule(
            rerun=st.sampled_from([(), (), ("changed",), ("none",), ("failed",), ("all",)]),
            stop_after=st.one_of(st.none(), st.integers(0, 2)),
            failing=st.sampled_from([(), ("t1",)]),
        )
        def run(
            self, rerun: tuple[str, ...], stop_after: int | None, failing: tuple[str, ...]
        ) -> None:
            before = job.out.read_bytes() if job.out.exists() else b""
            paid = [
                line["output"].removeprefix("answer to ")
                for line in (job.lines() if before else [])
                if line["success"]
            ]
            try:
                called = job.run(self.rows, *rerun, stop_after=stop_after, failing=failing)
            except ChangedRowsError:
                assert "changed" not in rerun
                assert job.out.read_bytes() == before
                return
            if not rerun and stop_after is None and not any("item_id" in r for r in self.rows):
                for text in set(called):
                    asked = sum(row["prompt"] == text for row in self.rows)
                    # A failure of the same text may stand in an answer's place, never be paid.
                    assert called.count(text) <= max(0, asked - paid.count(text))

    run_state_machine_as_test(
        Edits,
        settings=settings(
            max_examples=12,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
