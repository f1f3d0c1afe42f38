"""Long runs of the limiter: real workers against a simulated provider, judged by its own journal.

    python -m benchmarks.quota_runs known-600 known-tokens            ten minutes each, side by side
    python -m benchmarks.quota_runs --minutes 2 bucket-10
    python -m benchmarks.quota_runs --judge                            the figures of all runs kept

Each run has its own Valkey, provider and `celery -A batchllm_celery worker` processes. What the
provider saw is kept in `.bench/quota/NAME.json`. Calls answer after 0.5 s.
"""

from __future__ import annotations

import argparse
import bisect
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchllm_celery import Batch, Quota, QuotaLimits
from batchllm_celery.simulation import SimulationClient, spawn
from benchmarks.lab import BENCH, Lab, table, wait

FOLDER = BENCH / "quota"
LATENCY = 0.5


@dataclass(frozen=True)
class Scenario:
    """One run.

    Args:
        provider: settings of the simulated provider.
        rate: its quota, in requests (or tokens) a second.
        limits: what our quota says; None: nobody knows it.
        skip: seconds that don't count.
        tokens: whether the quota is one of tokens, with sizes 1:20.
        lull: two minutes of full load, then ten minutes at a fifth, then full load again.
        change: seconds of the run -> factor of the provider's quota from then on.
        joins: whether another worker comes in mid-run.
    """

    provider: dict[str, Any]
    rate: float
    limits: QuotaLimits | None = None
    skip: float = 90.0
    workers: int = 2
    tokens: bool = False
    lull: bool = False
    change: dict[float, float] = field(default_factory=dict)
    joins: bool = False


def _bucket(rpm: float, **more: Any) -> dict[str, Any]:
    return {"rpm": rpm, "window": "bucket", **more}


_SLIDING = {"rpm": 600, "window": "sliding"}
_WHOLE = {"retry_hint": "retry-after"}
SCENARIOS = {
    "known-600": Scenario(
        _bucket(600), 10, QuotaLimits(requests_per_minute=600), 5, workers=4, joins=True
    ),
    "known-tokens": Scenario(
        {"tpm": 60_000, "output_tokens": 20},
        1_000,
        QuotaLimits(tokens_per_minute=60_000),
        5,
        workers=4,
        tokens=True,
        joins=True,
    ),
    "bucket-10": Scenario(_bucket(600), 10, skip=30),
    "bucket-10-whole": Scenario(_bucket(600, **_WHOLE), 10, skip=30),
    "bucket-100": Scenario(_bucket(6_000), 100, skip=30),
    "bucket-100-whole": Scenario(_bucket(6_000, **_WHOLE), 100, skip=30),
    "fixed-10": Scenario({"rpm": 600, "window": "fixed"}, 10),
    "sliding-10": Scenario(_SLIDING, 10),
    "sliding-2": Scenario({"rpm": 120, "window": "sliding"}, 2),
    "changing-bucket": Scenario(_bucket(600), 10, change={240.0: 0.5, 480.0: 1.0}),
    "changing-sliding": Scenario(_SLIDING, 10, change={240.0: 0.5, 480.0: 1.0}),
    "lull-bucket": Scenario(_bucket(600), 10, lull=True),
    "lull-sliding": Scenario(_SLIDING, 10, lull=True),
}

#: Seconds of full load before a lull, and of the lull itself.
FOUND, LULL = 120.0, 600.0


# -- one run ---------------------------------------------------------------------------------------


def run(name: str, seconds: float) -> None:
    scenario = SCENARIOS[name]
    if scenario.lull:
        seconds = FOUND + LULL + 75
    with spawn(latency=LATENCY, keep_calls=10**6, **scenario.provider) as provider, Lab() as lab:
        drive = _Drive(name, scenario, provider, lab)
        began = drive.start(seconds)
        drive.until(began, seconds)
        kept = {"began": began, "seconds": seconds, "calls": _calls(provider)}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(kept))
    print(judge(name), flush=True)


def _calls(provider: SimulationClient) -> list[tuple[float, int, int, float]]:
    return [
        (call["time"], call["status"], call["input_tokens"] + call["output_tokens"], sent(call))
        for call in provider.calls()
    ]


def sent(call: dict[str, Any]) -> float:
    """When the worker sent it, by the worker's clock."""
    return float((call["user"] or "0 0").split()[1])


class _Drive:
    """The worker processes and the load of one run."""

    def __init__(self, name: str, scenario: Scenario, provider: SimulationClient, lab: Lab) -> None:
        self.scenario, self.provider, self.lab = scenario, provider, lab
        limits = scenario.limits
        self.quota: Quota | str = name if limits is None else Quota(name=name, limits=limits)
        self.full: Batch | None = None

    def start(self, seconds: float) -> float:
        """The moment of the first call."""
        self.flood(seconds)
        for _ in range(self.scenario.workers):
            self.start_worker()
        wait(lambda: self.provider.stats()["calls"], self.lab.workers, interval=0.2)
        first: float = self.provider.stats()["first_call"]
        return first

    def start_worker(self) -> None:
        self.lab.start_worker(
            slots=120, QUOTA_URL=self.provider.openai_url, BATCHLLM_APP="tests.acceptance.quota_app"
        )

    def flood(self, seconds: float) -> None:
        """More work than the provider can take in so many seconds."""
        each = 400 if self.scenario.tokens else 1
        count = int(self.scenario.rate / each * seconds * 1.3) + 300
        self.full = self.submit(self.prompts(count), 10)

    def submit(self, prompts: Iterable[str], per_task: int) -> Batch:
        return self.lab.producer.submit(
            prompts,
            strategy="lite",
            quota=self.quota,
            items_per_task=per_task,
            max_outstanding=10**7,
        )

    def prompts(self, count: int) -> Iterator[str]:
        draw = random.Random(count)
        for index in range(count):
            size = draw.randint(25, 880) * 4 if self.scenario.tokens else 40
            yield f"{index} ".ljust(size, "x")

    def until(self, began: float, seconds: float) -> None:
        """Change what the scenario says, when it says so."""
        for at, act in sorted(self._acts(seconds), key=lambda pair: pair[0]):
            time.sleep(max(began + at - time.time(), 0))
            act()
        time.sleep(max(began + seconds - time.time(), 0))

    def _acts(self, seconds: float) -> Iterator[tuple[float, Callable[[], object]]]:
        for at, factor in self.scenario.change.items():
            rpm = self.scenario.provider["rpm"] * factor
            yield at, lambda rpm=rpm: self.provider.change(rpm=rpm)  # type: ignore[misc]  # a default
        if self.scenario.joins:
            yield seconds / 2, self.start_worker
        if self.scenario.lull:
            assert self.full is not None
            yield FOUND, self.full.cancel
            fifth = int(self.scenario.rate / 5)
            for second in range(int(LULL)):
                yield FOUND + second + 0.5, lambda: self.submit(self.prompts(fifth), 1)
            yield FOUND + LULL, lambda: self.flood(75)


# -- what the journal says -------------------------------------------------------------------------


@dataclass(frozen=True)
class Journal:
    """Calls of one run: (seconds since the first one, status, tokens, when it was sent)."""

    name: str
    scenario: Scenario
    seconds: float
    calls: list[tuple[float, int, int, float]]

    @classmethod
    def read(cls, name: str) -> Journal:
        kept = json.loads((FOLDER / f"{name}.json").read_text())
        calls = sorted((at - kept["began"], *rest) for at, *rest in kept["calls"])
        return cls(name, SCENARIOS[name], kept["seconds"], [tuple(call) for call in calls])

    def amount(self, since: float, until: float) -> float:
        """Requests (or tokens) a second that the provider let in."""
        inside = [c for c in self.calls if since <= c[0] < until and c[1] == 200]
        total = sum(c[2] for c in inside) if self.scenario.tokens else len(inside)
        return total / (until - since)

    def used(self, since: float, until: float, factor: float = 1.0) -> float:
        return self.amount(since, until) / self.scenario.rate / factor

    def refused(self, since: float, until: float) -> float:
        statuses = [c[1] for c in self.calls if since <= c[0] < until]
        return statuses.count(429) / max(len(statuses), 1)

    def most_within(self, window: float) -> float:
        """The largest amount that arrived in any window of so many seconds, refused or not."""
        times = [c[0] for c in self.calls]
        sums = [0.0]
        for call in self.calls:
            sums.append(sums[-1] + (call[2] if self.scenario.tokens else 1))
        return max(sums[bisect.bisect_left(times, at + window)] - sums[i]
                   for i, at in enumerate(times))  # fmt: skip

    def jitter(self) -> tuple[float, float]:
        """How much later than the quickest a call arrived after it was sent: 99 % and most."""
        ways = sorted(c[0] - c[3] for c in self.calls)
        return ways[int(len(ways) * 0.99)] - ways[0], ways[-1] - ways[0]

    def mean_reached(self, at: float, factor: float, share: float) -> float | None:
        """Seconds after `at` from which a 30 s mean holds so much of the changed quota."""
        for second in range(int(self.seconds - at - 30)):
            if self.used(at + second, at + second + 30, factor) >= share:
                return second
        return None


def judge(name: str) -> str:
    """One line of figures."""
    journal = Journal.read(name)
    scenario, end = journal.scenario, journal.seconds
    if scenario.lull:
        back = FOUND + LULL
        return (
            f"{name}: refused in the minute after the lull {journal.refused(back, back + 60):.2%}, "
            f"used {journal.used(back, back + 60):.1%}; before it {journal.refused(90, FOUND):.2%}"
        )
    line = (
        f"{name}: used {journal.used(scenario.skip, end):.2%}, "
        f"refused {journal.refused(scenario.skip, end):.3%} after {scenario.skip:.0f} s "
        f"({journal.refused(0, scenario.skip):.1%} before), {len(journal.calls)} calls"
    )
    if scenario.limits is not None:
        line += "".join(f"; {_window(journal, seconds)}" for seconds in (10.0, 60.0))
        line += "; jitter p99 {:.3f} s, most {:.3f} s".format(*journal.jitter())
    if scenario.change:
        line = f"{name}: refused {journal.refused(90, end):.2%}"
        for at, factor in scenario.change.items():
            share = 0.95 if factor < 1 else 0.9
            when = journal.mean_reached(at, factor, share)
            line += f"; x{factor} at {at:.0f} s: 30 s mean of {share:.0%} from {when} s on"
    return line


def _window(journal: Journal, seconds: float) -> str:
    rate = journal.scenario.rate
    one = 900 if journal.scenario.tokens else 1
    allowed = rate * seconds + rate * Quota(name="q").burst_seconds + one
    most = journal.most_within(seconds)
    excess = max(most - allowed, 0) / rate
    return f"most in {seconds:.0f} s: {most:.0f} of {allowed:.0f} (needs jitter {excess:.3f} s)"


def judge_all() -> str:
    return "\n".join(judge(path.stem) for path in sorted(FOLDER.glob("*.json")))


def side_by_side(names: Sequence[str], minutes: float) -> None:
    """Each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.quota_runs", "--alone", "--minutes", str(minutes)]
    processes = []
    for name in names:
        processes.append(subprocess.Popen([*command, name]))
        time.sleep(3)  # starting is dear: one after the other
    for process in processes:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*SCENARIOS, []])
    parser.add_argument("--minutes", type=float, default=10.2)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--judge", action="store_true")
    options = parser.parse_args()
    if options.judge:
        print(table([("runs",), *((line,) for line in judge_all().splitlines())]))
    elif options.alone:
        run(options.names[0], options.minutes * 60)
    else:
        side_by_side(options.names or list(SCENARIOS), options.minutes)


if __name__ == "__main__":
    main()
