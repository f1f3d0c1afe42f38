"""Chaos, the long form (`make chaos`): hundreds of kills over ten thousand rows, then every other
fault on top, until the provider's books say that nothing was lost and nothing paid for in vain."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.acceptance.chaos import Stage, Verdict, staged
from tests.support import keys_without_ttl, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

KILLS = 300
ROWS_PER_BATCH = 2_200
LEASE = 5.0


@dataclass
class Storm:
    """Kills workers after a random number of calls each, and replaces them at once."""

    stage: Stage
    random: random.Random
    env: dict[str, str] = field(default_factory=dict)
    kills: int = 0
    deaths_due: dict[int, int] = field(default_factory=dict)
    """Process -> calls after which it is killed."""

    def start_worker(self) -> None:
        worker = self.stage.start_worker(**self.env)
        self.deaths_due[worker.pid] = self.random.randint(4, 60)

    def blow(self) -> bool:
        """Kill whose time has come; whether any was."""
        due = [one for one in self.stage.workers if self._is_due(one)]
        for worker in due:
            self.stage.kill(worker)
            self.start_worker()
        self.kills += len(due)
        return bool(due)

    def _is_due(self, worker: subprocess.Popen[str]) -> bool:
        assert worker.poll() is None, "a worker ended that nobody killed"
        return self.stage.has_called(worker, self.deaths_due[worker.pid])

    def run(self, batch_id: str, faults: Faults) -> Verdict:
        """One batch under this storm and `faults`."""
        self.stage.rows(batch_id, ROWS_PER_BATCH)
        faults.run = self.stage.start_run(batch_id)
        while faults.run.poll() is None:
            if self.blow():
                faults.strike(self, batch_id)
            time.sleep(0.02)
        self.stage.finish(faults.run, batch_id)
        return self.stage.judge(batch_id, ROWS_PER_BATCH)


class Faults:
    """What else happens, in turn, each time a worker was killed."""

    run: subprocess.Popen[str]

    def __init__(self, *kinds: str, every: int = 8) -> None:
        self.kinds = kinds
        self.every = every
        self.struck = 0
        self._strikes = 0

    def strike(self, storm: Storm, batch_id: str) -> None:
        self._strikes += 1
        if self.kinds and self._strikes % self.every == 0:
            kind = self.kinds[self.struck % len(self.kinds)]
            self.struck += 1
            getattr(self, f"_{kind}")(storm, batch_id)

    def _producer(self, storm: Storm, batch_id: str) -> None:
        self.run.kill()
        self.run.wait()
        said = partial(storm.stage.fleet.said, f"run-{batch_id}")
        before = said().count("Batch ")
        self.run = storm.stage.start_run(batch_id)
        # Without Redis at its very start `run` refuses, as it should.
        wait_until(lambda: said().count("Batch ") > before, timeout=60)

    def _valkey(self, storm: Storm, batch_id: str) -> None:
        storm.stage.kill_valkey(away=storm.random.choice((0.0, 1.0)))

    def _valkey_beyond_lease(self, storm: Storm, batch_id: str) -> None:
        storm.stage.kill_valkey(away=LEASE + 2.0)

    def _connections(self, storm: Storm, batch_id: str) -> None:
        storm.stage.cut_connections()

    def _drain(self, storm: Storm, batch_id: str) -> None:
        wait_until(lambda: any(map(storm.stage.has_called, storm.stage.workers)), timeout=60)
        (worker, *_) = filter(storm.stage.has_called, storm.stage.workers)
        storm.stage.drain(worker)
        storm.start_worker()

    def _cold(self, storm: Storm, batch_id: str) -> None:
        wait_until(lambda: any(map(storm.stage.has_called, storm.stage.workers)), timeout=60)
        (worker, *_) = filter(storm.stage.has_called, storm.stage.workers)
        storm.stage.kill(worker, signal.SIGQUIT)
        storm.start_worker()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    # The items are innocent: under this many kills the default 5 would convict some.
    settings = {
        "BATCHLLM_LEASE_SECONDS": str(LEASE),
        "BATCHLLM_MAX_DELIVERIES": "50",
        "CHAOS_VISIBILITY": "20",
    }
    with staged(tmp_path, latency=0.4, **settings) as stage:
        yield stage


def test_three_hundred_kills_over_ten_thousand_rows(stage: Stage) -> None:
    """At least 300 SIGKILLs of workers over at least 10,000 rows, with kills of producer and
    Valkey, cut connections, drains and cold shutdowns among them: nothing is lost, nothing has two
    outcomes, only calls cut off in flight were repeated, and each is counted."""
    began, storm = time.monotonic(), Storm(stage, random.Random(4))
    for _ in range(4):
        storm.start_worker()
    plans = {
        "workers": Faults(),
        "producer": Faults("producer"),
        "valkey": Faults("valkey", "valkey_beyond_lease", "valkey"),
        "mixed": Faults("connections", "drain", "cold", "producer", "valkey"),
        "elsewhere": Faults("connections"),
    }
    verdicts = []
    for batch_id, faults in plans.items():
        storm.env = {"CHAOS_ELSEWHERE": "1"} if batch_id == "elsewhere" else {}
        verdicts.append(_told(storm, batch_id, faults, began))
    while storm.kills < KILLS:
        verdicts.append(_told(storm, f"more-{len(verdicts)}", Faults(), began))
    stage.assert_nothing_stays(timeout=90)
    _sum_up(storm, verdicts, began)
    assert sum(one.rows for one in verdicts) >= 10_000


def _told(storm: Storm, batch_id: str, faults: Faults, began: float) -> Verdict:
    verdict = storm.run(batch_id, faults)
    print(f"\n{time.monotonic() - began:5.0f} s  {batch_id}: {verdict}"
          f"; {storm.kills} kills in all, {faults.struck} other faults", flush=True)  # fmt: skip
    return verdict


def _sum_up(storm: Storm, verdicts: list[Verdict], began: float) -> None:
    total = {
        name: sum(getattr(one, name) for one in verdicts)
        for name in ("rows", "calls", "repeats", "hung_up", "maybe_billed")
    }
    print(f"\n{time.monotonic() - began:.0f} s, {storm.kills} SIGKILLs of workers: {total}")
    assert keys_without_ttl(storm.stage.valkey.url, "chaos") == []
