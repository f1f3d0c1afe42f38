"""Random histories of one batch: crashes, lost replies, late outcomes, control, all at once."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from batchllm_celery.errors import FailureKind
from batchllm_celery.ledger import Claim, Ledger
from batchllm_celery.models import BatchState, RetryState, TokenUsage
from tests.integration.ledger_support import (
    BATCH,
    Snapshot,
    StutteringConnection,
    answer,
    beat,
    failure,
    ledger,
    lose,
    rows,
    spec,
)

ROWS = 6
PROCESSES = st.integers(0, 2)
INDEXES = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=4)
FATAL = FailureKind.AUTHENTICATION


class OneBatch(RuleBasedStateMachine):
    """Three processes work on six rows; every script call runs twice."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.namespace = f"t{uuid.uuid4().hex[:10]}"
        self.loop = asyncio.Runner()
        self.connection = StutteringConnection(url)
        self.processes: list[Ledger] = [self.new_process() for _ in range(3)]
        self.claims: list[tuple[Ledger, Claim]] = []
        self.unused: set[Claim] = set()  # calls that started and whose answer nobody has
        self.opened: Counter[int] = Counter()  # index -> times that it wanted an outcome
        self.prompts = [f"say {n}" for n in range(ROWS)]
        self.fed = 0

    def new_process(self) -> Ledger:
        return ledger(self.connection, self.namespace, max_deliveries=3)

    def run(self, work: Any) -> Any:
        return self.loop.run(self.and_sweeps(work))

    async def and_sweeps(self, work: Any) -> Any:
        result = await work
        for process in self.processes:
            await asyncio.gather(*process.background.under_way)
        return result

    def shot(self) -> Snapshot:
        return Snapshot(self.url, self.namespace)

    @initialize(keep=st.booleans())
    def create(self, keep: bool) -> None:
        self.keep = keep
        self.run(self.processes[0].feeding.create(spec(keep_results=keep)))

    @rule(process=PROCESSES, count=st.integers(1, 3))
    def feed(self, process: int, count: int) -> None:
        first, end = self.fed, min(ROWS, self.fed + count)
        if end > first:
            self.run(self.processes[process].feeding.feed(BATCH, first, self.row_slice(first, end)))
            self.opened.update(range(first, end))
            self.fed = end

    def row_slice(self, first: int, end: int) -> list[Any]:
        chosen = rows(end - first, first)
        for row, prompt in zip(chosen, self.prompts[first:end], strict=True):
            row.prompt = prompt
        return chosen

    @rule(process=PROCESSES, index=st.integers(0, ROWS - 1), change=st.booleans())
    def feed_again(self, process: int, index: int, change: bool) -> None:
        if index >= self.fed:
            return
        if change:
            open_before = index not in self.shot().done
            self.prompts[index] += "!"
            self.opened[index] += 0 if open_before else 1
        self.run(
            self.processes[process].feeding.feed(BATCH, index, self.row_slice(index, index + 1))
        )

    @rule(process=PROCESSES)
    def seal(self, process: int) -> None:
        if self.fed == ROWS:
            self.run(self.processes[process].feeding.seal(BATCH, ROWS))

    @rule(process=PROCESSES, indexes=INDEXES)
    def claim(self, process: int, indexes: list[int]) -> None:
        of = self.processes[process]
        before = {
            c.index
            for owner, c in self.claims
            if owner is of and of.claims.holding.has(BATCH, c.index)
        }
        reply = self.run(of.claims.claim(BATCH, indexes))
        assert before.isdisjoint(claim.index for claim in reply.claims)
        for claim in reply.claims:
            assert claim.payload.prompt == self.prompts[claim.index]
        self.claims += [(of, claim) for claim in reply.claims]

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        of, claim = self.pick(data)
        before = self.shot()
        # Who begins again has made no call meanwhile (its permit went stale), or it was refused.
        self.unused.discard(claim)
        verdict = self.run(of.claims.begin(claim))
        if verdict is None:
            assert claim.index not in before.done, "a call for an answered item"
            assert before.held[claim.index].endswith(f"{claim.token} {of.process_id}")
            self.unused.add(claim)

    def pick(self, data: st.DataObject) -> tuple[Ledger, Claim]:
        return self.claims[data.draw(st.integers(0, len(self.claims) - 1))]

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def attempt_failed(self, data: st.DataObject) -> None:
        of, claim = self.pick(data)
        if not claim.settled:
            usage = TokenUsage(input_tokens=1)
            self.run(of.claims.save(claim, claim.attempts + 1, 0, RetryState({"k": 1}), usage))
            self.unused.discard(claim)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), kind=st.sampled_from([None, FailureKind.VALIDATION, FATAL, "stop"]))
    def record(self, data: st.DataObject, kind: Any) -> None:
        of, claim = self.pick(data)
        before = self.shot()
        current = claim.round == self.round_of(claim.index)  # recorded, its entry is gone
        if kind is None:
            claim.calling = False
            result = answer(claim)
        elif kind == "stop":
            state = before.meta["state"]
            result = failure(claim, FailureKind(state) if is_stopped(state) else FATAL)
        else:
            result = failure(claim, kind)
        recorded = self.run(of.claims.record(claim, result, spent_tokens=1, cost=0.5))
        self.claims.remove((of, claim))
        after = self.shot()
        if recorded and (kind != "stop" or result.error_kind is FATAL):
            self.unused.discard(claim)
        if recorded:
            assert claim.index not in before.done, "a second outcome"
            assert len(after.outcomes) > len(before.outcomes)
        if kind is None and claim.index not in before.done:
            fresh = claim.payload.prompt == self.prompts[claim.index]
            assert recorded == (fresh and current), "a paid answer was thrown away"

    def round_of(self, index: int) -> int:
        with redis.Redis.from_url(self.url) as client:
            entry: Any = client.hget(self.processes[0].keys.batch(BATCH).attempts, str(index))
        return int(entry.split(b" ")[1]) if entry else 0

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        of, claim = self.pick(data)
        self.run(of.claims.release([claim]))
        self.claims.remove((of, claim))

    @rule(process=PROCESSES)
    def crash(self, process: int) -> None:
        """Its claims stay in Redis and nobody answers for them any more."""
        gone = self.processes[process]
        self.claims = [(of, claim) for of, claim in self.claims if of is not gone]
        self.processes[process] = self.new_process()
        self.run(lose(self.processes[process], gone.process_id))

    @rule(process=PROCESSES)
    def silent_for_a_lease(self, process: int) -> None:
        """It is stopped, or cut off, and will come back with what it holds."""
        others = self.processes[(process + 1) % 3]
        self.run(lose(others, self.processes[process].process_id))

    @rule(process=PROCESSES)
    def heartbeat(self, process: int) -> None:
        self.run(beat(self.processes[process]))

    @rule(process=PROCESSES)
    def pause(self, process: int) -> None:
        self.run(self.processes[process].batches.pause(BATCH))

    @rule(process=PROCESSES)
    def cancel(self, process: int) -> None:
        self.run(self.processes[process].batches.cancel(BATCH))

    @rule(process=PROCESSES)
    def resume(self, process: int) -> None:
        stopped = self.shot()
        self.connection.stutter = False  # a person's decision is not repeated by itself
        reopened = self.run(self.processes[process].batches.resume(BATCH))
        self.connection.stutter = True
        if is_stopped(stopped.meta["state"]):
            assert reopened.items == len(stopped.stopped)
            self.opened.update(stopped.stopped)

    @rule(process=PROCESSES)
    def retry_failed(self, process: int) -> None:
        failed = self.shot().failed
        self.connection.stutter = False
        reopened = self.run(self.processes[process].batches.retry(BATCH))
        self.connection.stutter = True
        assert reopened.items == len(failed)
        self.opened.update(failed)

    @invariant()
    def holds(self) -> None:
        shot = self.shot()
        if not shot.meta:
            return
        shot.check()
        outcomes = Counter(shot.outcomes)
        for index in range(self.fed):
            expected = self.opened[index] - (index not in shot.done)
            assert outcomes[index] == expected, "not exactly one outcome per item and round"

    def teardown(self) -> None:
        if hasattr(self, "keep"):
            self.finish()
        self.run(self.connection.close())
        self.loop.close()

    def finish(self) -> None:
        """Whatever has happened: a fresh process brings every item to its outcome."""
        for of in self.processes:
            self.run(lose(self.processes[0], of.process_id))
        last = self.new_process()
        self.processes.append(last)
        if self.fed < ROWS:
            self.run(last.feeding.feed(BATCH, self.fed, self.row_slice(self.fed, ROWS)))
            self.opened.update(range(self.fed, ROWS))
            self.fed = ROWS
        self.resume_with(last)
        self.run(last.feeding.seal(BATCH, ROWS))
        for _ in range(ROWS):  # suspects come one at a time
            reply = self.run(last.claims.claim(BATCH, list(range(ROWS))))
            for claim in reply.claims:
                assert self.run(last.claims.begin(claim)) is None
                assert self.run(last.claims.record(claim, answer(claim), spent_tokens=1, cost=None))
        progress = self.run(last.batches.progress(BATCH))
        assert progress.is_over
        assert progress.state is BatchState.FINISHED
        assert progress.in_flight == 0
        assert progress.maybe_billed >= len(self.unused), "a call that may be billed is not counted"
        self.holds()

    def resume_with(self, of: Ledger) -> None:
        stopped = self.shot()
        self.connection.stutter = False
        self.run(of.batches.resume(BATCH))
        self.connection.stutter = True
        if is_stopped(stopped.meta["state"]):
            self.opened.update(stopped.stopped)


def is_stopped(state: str) -> bool:
    return state not in ("open", "paused", "finished")


@pytest.mark.timeout(600)  # thousands of calls: slow machines need minutes
def test_random_histories_lose_nothing_and_answer_everything_once(redis_url: str) -> None:
    """Whatever happens in whatever order, each item has exactly one outcome per round."""
    run_state_machine_as_test(
        lambda: OneBatch(redis_url),  # type: ignore[arg-type]  # a factory is documented as well
        settings=settings(
            max_examples=int(os.environ.get("BATCHLLM_TEST_HISTORIES", "20")),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
