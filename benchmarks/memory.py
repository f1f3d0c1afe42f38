"""Resident memory of a worker by calls in flight, without a provider's SDK.

python -m benchmarks.memory                 0, 1,000 and 4,000 calls in flight
"""

from __future__ import annotations

import argparse
import time

from benchmarks.lab import Lab, memory, table, wait


def measure(calls: int, seconds: float) -> tuple[int, int, float]:
    """Calls wanted, calls that were in flight at once, most MiB seen."""
    with Lab() as lab:
        worker = lab.start_worker(slots=max(calls, 1))
        lab.wait_for_workers(1)
        if not calls:
            time.sleep(1.0)
            return 0, 0, memory(worker.pid)
        batch = lab.submit(calls, seconds=seconds, items_per_task=100)
        most = 0.0

        def over() -> bool:
            nonlocal most
            most = max(most, memory(worker.pid))
            return lab.finished(batch) >= calls

        wait(over, [worker], interval=0.1)
        time.sleep(0.5)  # the last notes
        return calls, lab.notes()[0].most_in_flight, most


def report(outcomes: list[tuple[int, int, float]]) -> str:
    rows = [(f"{calls:,}", f"{flying:,}", f"{most:.0f} MiB") for calls, flying, most in outcomes]
    return table([("items", "most in flight", "worker's memory"), *rows])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", default="0,1000,4000")
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    counts = [int(count) for count in options.calls.split(",")]
    print(report([measure(count, options.seconds) for count in counts]))


if __name__ == "__main__":
    main()
