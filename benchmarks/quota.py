"""What a fleet makes of a quota: ours, naive backoff, and async-batch-llm in as many processes.

    python -m benchmarks.quota                    600 items, 600 a minute, 4 processes, all rows
    python -m benchmarks.quota ours naive         only these

The provider refuses what exceeds a bucket of one second and says when to come back (RetryInfo);
answers take 0.5 s. "Used" is the share of the quota from 5 s after the first call until nine tenths
of the items were let in; ideal is the time in which the quota lets all of them in. Long runs are
in `quota_runs.py`. async-batch-llm 0.28 runs in `.bench/abl`:

    python -m venv .bench/abl && .bench/abl/bin/pip install async-batch-llm==0.28.* aiohttp
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from batchllm_celery import Quota, QuotaLimits
from batchllm_celery.simulation import SimulationClient, spawn
from benchmarks.lab import BENCH, Lab, table, wait

RPM, PROCESSES, SLOTS, LATENCY = 600.0, 4, 30, 0.5
PATIENCE = 300.0
RIVALS = Path(__file__).with_name("quota_rivals.py")

Runner = Callable[[SimulationClient, int], None]


@dataclass(frozen=True)
class Outcome:
    name: str
    items: int
    done: int
    calls: int
    refused: int
    seconds: float
    used: float

    def row(self) -> tuple[str, ...]:
        ideal = (self.items - RPM / 60) / (RPM / 60)
        took = f"{self.seconds:.0f} s ({self.seconds / ideal:.2f} x ideal)"
        if self.done < self.items:
            took = f"{self.done} of {self.items} after {PATIENCE:.0f} s"
        share = self.refused / max(self.calls, 1)
        return (self.name, f"{self.used:.1%}", f"{self.refused}", f"{share:.2%}", took)


# -- ours ------------------------------------------------------------------------------------------


def ours(quota: Quota | str, strategy: str = "lite") -> Runner:
    def runner(provider: SimulationClient, items: int) -> None:
        with Lab() as lab:
            lab.producer.submit(_prompts(items), strategy=strategy, quota=quota, items_per_task=10)
            for _ in range(PROCESSES):
                lab.start_worker(
                    slots=SLOTS,
                    QUOTA_URL=provider.openai_url,
                    BATCHLLM_APP="tests.acceptance.quota_app",
                    BATCHLLM_SIMULATED_URL=provider.url,
                )
            _until_done(provider, items)

    return runner


def _prompts(items: int) -> Iterator[str]:
    return (f"{index} ".ljust(40, "x") for index in range(items))


# -- the rivals ------------------------------------------------------------------------------------


def rival(*kind: str) -> Runner:
    def runner(provider: SimulationClient, items: int) -> None:
        with _processes(kind, provider, items):
            _until_done(provider, items)

    return runner


@contextmanager
def _processes(kind: tuple[str, ...], provider: SimulationClient, items: int) -> Iterator[None]:
    python, each = BENCH / "abl" / "bin" / "python", items // PROCESSES
    name, *options = kind
    command = [str(python), str(RIVALS), name, provider.openai_url]
    processes = [
        subprocess.Popen(
            [*command, str(each * n), str(each), str(SLOTS), *options], stderr=subprocess.DEVNULL
        )
        for n in range(PROCESSES)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _until_done(provider: SimulationClient, items: int) -> None:
    end = time.monotonic() + PATIENCE
    wait(lambda: provider.stats()["answered"] >= items or time.monotonic() > end, interval=0.5)


# -- rows ------------------------------------------------------------------------------------------

PART = str(RPM / PROCESSES)
KNOWN = Quota(name="known", limits=QuotaLimits(requests_per_minute=RPM))
ROWS: dict[str, tuple[str, Runner]] = {
    "ours": ("ours, quota known", ours(KNOWN)),
    "ours-genai": ("ours, quota known, google-genai's client", ours(KNOWN, "simulated")),
    "ours-unknown": ("ours, quota unknown", ours("unknown")),
    "naive": ("exponential backoff, each call for itself", rival("naive")),
    "abl-full": ("async-batch-llm 0.28, each process the full quota", rival("abl", str(RPM))),
    "abl-part": ("async-batch-llm 0.28, each process 1/4 of it", rival("abl", PART)),
    "abl-tuned": ("the same with a cooldown of 2 s in place of 300 s", rival("abl", PART, "2")),
}


def measure(name: str, items: int) -> Outcome:
    label, runner = ROWS[name]
    with spawn(rpm=RPM, latency=LATENCY, keep_calls=10**6) as provider:
        runner(provider, items)
        arrivals = sorted(provider.stats(arrivals=True)["arrivals"])
    first = arrivals[0][0]
    let_in = [at - first for at, status, _ in arrivals if status == 200]
    most = let_in[int(items * 0.9)] if len(let_in) > items * 0.9 else PATIENCE
    used = sum(5 <= at < most for at in let_in) / (most - 5) / (RPM / 60)
    refused = sum(status == 429 for _, status, _ in arrivals)
    return Outcome(label, items, len(let_in), len(arrivals), refused, let_in[-1], used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    parser.add_argument("--items", type=int, default=600)
    options = parser.parse_args()
    outcomes = []
    for name in options.rows:
        outcomes.append(measure(name, options.items))
        print(json.dumps(outcomes[-1].row()), flush=True)
    head = ("how", "quota used", "429s", "share of calls", "until the last was let in")
    print(table([head, *(outcome.row() for outcome in outcomes)]))


if __name__ == "__main__":
    main()
