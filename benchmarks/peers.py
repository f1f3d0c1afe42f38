"""The whole product next to others, on the same provider over HTTP at equal slots.

    python -m benchmarks.peers                      2,000 items of 1 s at 100 slots a process
    python -m benchmarks.peers --peers ours,ours:2,arq --items 500

Each makes the same aiohttp POST to the same provider process, which keeps the times: from the first
call's arrival to the last answer. async-batch-llm has no queue and one process; the others
have a queue, but neither limiter nor ledger nor results that outlive a worker. `ours:2` is two
processes. CPU counts the workers' processes from their start. The peers' venv is .bench/peers, made
on first use.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.lab import BENCH, ROOT, UNHINDERED, Lab, table, wait

NEEDS = (
    "async-batch-llm==0.28.*", "arq", "taskiq<0.12", "taskiq-redis", "saq", "streaq",
    "dramatiq[redis]", "aiohttp",
)  # fmt: skip
DEFAULT = "async-batch-llm,ours,ours:2,arq,saq,taskiq,streaq,dramatiq"


@dataclass(frozen=True)
class Outcome:
    name: str
    slots: int
    items: int
    most: int
    wall: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.items / self.wall


class Provider:
    """The provider in a process of its own."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> Provider:
        command = [sys.executable, "-m", "benchmarks.peers_provider", str(self._seconds)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def times(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/times") as reply:
            told: dict[str, Any] = json.load(reply)
        return told


def venv() -> str:
    """The peers' bin directory."""
    folder = BENCH / "peers"
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "-q", *NEEDS], check=True)
    return str(folder / "bin")


def measure(name: str, items: int, slots: int, seconds: float) -> Outcome:
    with Provider(seconds) as provider, Lab() as lab:
        run = _ours if name.startswith("ours") else _peer
        cpu = run(name, lab, provider, items, slots)
        told = provider.times()
    assert told["calls"] >= items, told
    processes = int(name.partition(":")[2] or 1)
    wall = told["last"] - told["first"]
    return Outcome(name, processes * slots, items, told["most"], wall, cpu)


def _ours(name: str, lab: Lab, provider: Provider, items: int, slots: int) -> float:
    count = int(name.partition(":")[2] or 1)
    workers = [
        lab.start_worker(slots=slots, PEERS_URL=f"{provider.url}/call") for _ in range(count)
    ]
    lab.wait_for_workers(count)
    batch = lab.producer.submit(
        map(str, range(items)), strategy="post", quota=UNHINDERED, items_per_task=10
    )
    lab.wait(batch, items)
    return sum(_cpu(worker.pid) for worker in workers)


def _peer(name: str, lab: Lab, provider: Provider, items: int, slots: int) -> float:
    binaries, app = venv(), "benchmarks.peers_app"
    environ = os.environ | {
        "PEERS_NAME": name,
        "PEERS_URL": f"{provider.url}/call",
        "PEERS_SLOTS": str(slots),
        "PEERS_ITEMS": str(items),
        "PEERS_SOCKET": str(lab.server.socket),
        "PYTHONPATH": str(ROOT),
    }
    feed = [f"{binaries}/python", "-m", app]
    commands = {
        "async-batch-llm": feed,
        "arq": [f"{binaries}/arq", f"{app}.ArqWorker"],
        "taskiq": [f"{binaries}/taskiq", "worker", f"{app}:broker", "--workers", "1",
                   "--max-async-tasks", str(slots)],
        "saq": [f"{binaries}/saq", f"{app}.settings"],
        "streaq": [f"{binaries}/streaq", "run", f"{app}:streaq_worker"],
        "dramatiq": [f"{binaries}/dramatiq", app, "--processes", "1", "--threads", str(slots)],
    }  # fmt: skip
    if name != "async-batch-llm":
        subprocess.run(feed, env=environ, check=True, cwd=ROOT)
    worker = subprocess.Popen(
        commands[name], env=environ, cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    spent = 0.0

    def over() -> bool:
        nonlocal spent
        spent = max(spent, _cpu(worker.pid)) if worker.poll() is None else spent
        return bool(provider.times()["calls"] >= items)

    try:
        wait(over, interval=0.1)
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    return spent


def _cpu(pid: int) -> float:
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    times = [process.cpu_times() for process in family]
    return float(sum(spent.user + spent.system for spent in times))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--peers", default=DEFAULT)
    options = parser.parse_args()
    outcomes, failed = [], []
    for name in options.peers.split(","):
        try:
            outcomes.append(measure(name, options.items, options.slots, options.seconds))
        except subprocess.CalledProcessError:  # a peer's own trouble; it has said what
            failed.append(name)
    print(report(outcomes))
    if failed:
        raise SystemExit(f"did not run: {', '.join(failed)}")


def report(outcomes: list[Outcome]) -> str:
    base = next((o.rate for o in outcomes if o.name == "async-batch-llm"), None)
    rows = [
        (
            o.name,
            str(o.slots),
            str(o.most),
            f"{o.wall:.1f} s",
            f"{o.rate:,.1f}",
            f"{o.rate / base:.2f}" if base else "-",
            f"{1000 * o.cpu / o.items:.2f} ms",
        )
        for o in outcomes
    ]
    head = ("", "slots", "most in flight", "first to last", "items/s", "x async-batch-llm",
            "CPU an item, start included")  # fmt: skip
    return table([head, *rows])


if __name__ == "__main__":
    main()
