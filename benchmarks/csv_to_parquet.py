"""A million rows of CSV to Parquet through `batchllm run`, with a strategy that answers at once.

    python -m benchmarks.csv_to_parquet [ROWS] [WORKERS]

Prints rows a second, from the command's start to the table's last byte, and the most memory of the
command and of a worker.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

STRATEGY = """
from batchllm_celery import CallableStrategy, LLMCallStrategy, strategy


async def answer(prompt: str) -> tuple[dict[str, object], dict[str, int]]:
    return {"label": "fine", "length": len(prompt)}, {"input_tokens": 20, "output_tokens": 5}


@strategy("instant")
def instant() -> LLMCallStrategy[dict[str, object]]:
    return CallableStrategy(answer)
"""


def write_rows(path: Path, rows: int) -> None:
    """A CSV file of about 120 bytes a row."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "text", "stars"))
        for n in range(rows):
            text = f"Review {n}: it works, arrived on day {n % 30}, and would buy it again, mostly"
            writer.writerow((f"r{n}", text, n % 5))


def memory_of(process: psutil.Process) -> tuple[float, float]:
    """Megabytes of the command, and of its largest child."""
    try:
        own = process.memory_info().rss
        children = [child.memory_info().rss for child in process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0, 0.0
    return own / 1e6, max(children, default=0) / 1e6


def main() -> None:
    """Run it once."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    workers = sys.argv[2] if len(sys.argv) > 2 else "2"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.csv", rows)
        (folder / "instant_strategy.py").write_text(STRATEGY)
        command = [
            sys.executable, "-m", "batchllm_celery.cli", "run", "rows.csv", "-o", "out.parquet",
            "--strategy", "instant", "--app", "instant_strategy", "--prompt", "Label: {text}",
            "--id-column", "id", "--workers", workers, "--rpm", "unlimited", "--quiet",
        ]  # fmt: skip
        started = time.monotonic()
        environment = {**os.environ, "BATCHLLM_STATE_DIR": str(folder / "state")}
        running = subprocess.Popen(command, cwd=folder, env=environment)
        process, most, most_of_child = psutil.Process(running.pid), 0.0, 0.0
        while running.poll() is None:
            own, child = memory_of(process)
            most, most_of_child = max(most, own), max(most_of_child, child)
            time.sleep(0.5)
        seconds = time.monotonic() - started
        size = (folder / "out.parquet").stat().st_size / 1e6
    print(f"exit {running.returncode}: {rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f}/s")
    print(
        f"memory: command {most:.0f} MB, largest child {most_of_child:.0f} MB; table {size:.1f} MB"
    )


if __name__ == "__main__":
    main()
