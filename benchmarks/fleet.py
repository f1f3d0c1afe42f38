"""How near a fleet comes to its ideal: many processes, a slow Redis, the price of submitting.

    python -m benchmarks.fleet                        20,000 items of 1 s on 10 workers x 32 slots
    python -m benchmarks.fleet --latency 0,2.5        with a Redis so many milliseconds away
    python -m benchmarks.fleet --workers 1,2,4 --items 6400

Limiter (a limit out of reach) and ledger are on. The time runs from the first call's start to the
last call's end; all workers are up before the batch is submitted. The latency is of a round trip,
by a delaying proxy between the workers and Redis, for Celery's commands and ours alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.lab import Lab, cpu, table
from tests.support import ValkeyServer


@dataclass(frozen=True)
class Outcome:
    workers: int
    slots: int
    items: int
    seconds: float
    per_message: int
    latency: float
    submitted: float
    wall: float
    cpu: float

    @property
    def ideal(self) -> float:
        return self.items * self.seconds / (self.workers * self.slots)


def measure(options: argparse.Namespace, workers: int, per_message: int, latency: float) -> Outcome:
    """One fleet; `latency` in milliseconds."""
    proxies: list[subprocess.Popen[str]] = []

    def url(server: ValkeyServer) -> str:
        return _through_proxy(server, latency, proxies) if latency else server.url

    try:
        with Lab(url) as lab:
            return _measure(lab, options, workers, per_message, latency)
    finally:
        for proxy in proxies:
            proxy.terminate()
            proxy.wait()


def _measure(
    lab: Lab, options: argparse.Namespace, workers: int, per_message: int, latency: float
) -> Outcome:
    fleet = [lab.start_worker(slots=options.slots) for _ in range(workers)]
    lab.wait_for_workers(workers)
    began = time.monotonic()
    batch = lab.submit(options.items, seconds=options.seconds, items_per_task=per_message)
    submitted = time.monotonic() - began
    lab.wait(batch, options.items)
    spent = sum(cpu(worker.pid) for worker in fleet)
    time.sleep(0.5)  # the last notes
    notes = lab.notes()
    wall = max(note.last for note in notes) - min(note.first for note in notes)
    return Outcome(
        workers, options.slots, options.items, options.seconds, per_message, latency,
        options.items / submitted, wall, spent - sum(note.cpu for note in notes),
    )  # fmt: skip


def _through_proxy(
    server: ValkeyServer, latency: float, proxies: list[subprocess.Popen[str]]
) -> str:
    command = [sys.executable, "-m", "benchmarks.delay_proxy"]
    proxy = subprocess.Popen(
        [*command, str(server.socket), str(latency / 2000)], stdout=subprocess.PIPE, text=True
    )
    proxies.append(proxy)
    assert proxy.stdout is not None
    return f"redis://127.0.0.1:{int(proxy.stdout.readline())}/0"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--workers", default="10")
    parser.add_argument("--per-message", default="100")
    parser.add_argument("--latency", default="0")
    options = parser.parse_args()
    cases = [
        (int(workers), int(size), float(latency))
        for workers in options.workers.split(",")
        for size in options.per_message.split(",")
        for latency in options.latency.split(",")
    ]
    print(report([measure(options, *case) for case in cases]))


def report(outcomes: list[Outcome]) -> str:
    head = ("workers x slots", "items a message", "Redis away", "items", "ideal", "first to last",
            "over", "CPU an item", "submitted")  # fmt: skip
    rows = [
        (
            f"{o.workers} x {o.slots}",
            str(o.per_message),
            f"{o.latency:g} ms",
            f"{o.items:,} of {o.seconds:g} s",
            f"{o.ideal:.1f} s",
            f"{o.wall:.1f} s",
            f"{100 * (o.wall / o.ideal - 1):.1f} %",
            f"{1000 * o.cpu / o.items:.2f} ms",
            f"{o.submitted:,.0f}/s",
        )
        for o in outcomes
    ]
    return table([head, *rows])


if __name__ == "__main__":
    main()
