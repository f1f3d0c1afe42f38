"""What the whole product costs: CPU of the worker and Redis round trips per item.

    python -m benchmarks.whole_product                20,000 items at 100 and at 1 a message
    python -m benchmarks.whole_product --items 4000 --per-message 100

One worker of 100 slots, as `batchllm worker` starts it; every item is claimed, asks the limiter (a
quota whose limit is out of reach), is answered at once, and recorded. All messages wait in the
queue before the worker starts. CPU counts the worker process, all its threads, from the first call
to the last record; round trips are the scripts that Redis ran, Celery's commands not counted.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from benchmarks.lab import Lab, cpu, table


@dataclass(frozen=True)
class Outcome:
    items: int
    per_message: int
    cpu: float
    wall: float
    calls: int


def measure(items: int, per_message: int, slots: int) -> Outcome:
    with Lab() as lab:
        batch = lab.submit(items, seconds=0.0, items_per_task=per_message)
        lab.forget_calls()
        worker = lab.start_worker(slots=slots)
        lab.wait(batch, items)
        ended, spent, calls = time.time(), cpu(worker.pid), lab.script_calls()
        notes = lab.notes()[0]
        return Outcome(items, per_message, spent - notes.cpu, ended - notes.first, calls)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--per-message", default="100,1")
    parser.add_argument("--slots", type=int, default=100)
    options = parser.parse_args()
    sizes = [int(size) for size in options.per_message.split(",")]
    print(report([measure(options.items, size, options.slots) for size in sizes]))


def report(outcomes: list[Outcome]) -> str:
    head = ("items a message", "items", "CPU an item", "round trips an item", "items/s")
    rows = [
        (
            str(o.per_message),
            f"{o.items:,}",
            f"{1000 * o.cpu / o.items:.3f} ms",
            f"{o.calls / o.items:.2f}",
            f"{o.items / o.wall:,.0f}",
        )
        for o in outcomes
    ]
    return table([head, *rows])


if __name__ == "__main__":
    main()
