"""All questions, one after the other: `make bench`, or `python -m benchmarks --quick`.

Each question is a script that runs by itself too; see docs/benchmarks.md for what was measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Question:
    """A heading, its command, and its command for those in a hurry."""

    text: str
    command: str
    quick: str


QUESTIONS = (
    Question(
        "Pools: ours, threads, gevent, prefork",
        "benchmarks/pools.py",
        "benchmarks/pools.py --items 1000 --slots 200 --pools ours,threads",
    ),
    Question(
        "CPU and round trips of the whole product",
        "-m benchmarks.whole_product",
        "-m benchmarks.whole_product --items 3000",
    ),
    Question(
        "Memory by calls in flight", "-m benchmarks.memory", "-m benchmarks.memory --calls 1000"
    ),
    Question(
        "A fleet of 10 workers x 32 slots, and the rate of submitting",
        "-m benchmarks.fleet --per-message 10,100",
        "-m benchmarks.fleet --per-message 10 --items 1600 --workers 4",
    ),
    Question(
        "A Redis 2.5 ms away",
        "-m benchmarks.fleet --workers 1 --slots 100 --items 6000 --latency 0,2.5",
        "-m benchmarks.fleet --workers 1 --slots 100 --items 1000 --latency 0,2.5",
    ),
    Question(
        "1, 2 and 4 processes",
        "-m benchmarks.fleet --workers 1,2,4 --slots 100 --items 4000 --per-message 10",
        "-m benchmarks.fleet --workers 1,2 --slots 100 --items 1000 --per-message 10",
    ),
    Question("Next to others, over HTTP", "-m benchmarks.peers", "-m benchmarks.peers --items 400"),
    Question("The ledger's scripts", "-m benchmarks.ledger", "-m benchmarks.ledger"),
    Question(
        "Providers without a quota",
        "-m benchmarks.congestion",
        "-m benchmarks.congestion --seconds 120 --only decode",
    ),
    Question("The limiter's scripts", "-m benchmarks.limiter_cost", "-m benchmarks.limiter_cost"),
)


def main() -> None:
    """Run every question; one that fails does not stop the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small sizes: minutes, rough figures")
    parser.add_argument("--only", help="questions whose heading contains this")
    options = parser.parse_args()
    failed = [
        question.text
        for question in QUESTIONS
        if (not options.only or options.only.lower() in question.text.lower())
        and not ask(question, options.quick)
    ]
    if failed:
        raise SystemExit(f"without an answer: {', '.join(failed)}")


def ask(question: Question, quick: bool) -> bool:
    """Run one question's script; whether it ended well."""
    command = question.quick if quick else question.command
    print(f"\n## {question.text}\n\n    python {command}\n", flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-W", "ignore", *command.split()], cwd=ROOT)
    print(f"\n({time.monotonic() - began:.0f} s)", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    main()
