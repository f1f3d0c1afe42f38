"""Real processes for acceptance tests: the command line, workers, a provider that keeps a log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support import wait_until

ROOT = Path(__file__).parents[2]


class Fleet:
    """Commands and workers of one test: same Redis, same namespace, same provider; nothing of it
    outlives the test."""

    def __init__(self, folder: Path, redis_url: str | None, namespace: str, **env: str) -> None:
        self.folder = folder
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("BATCHLLM_", "GEMINI_"))},
            "BATCHLLM_STATE_DIR": str(folder / "state"),
            "BATCHLLM_NAMESPACE": namespace,
            "PYTHONPATH": str(ROOT),
            "GEMINI_API_KEY": "KEY-MARKER-7731",
            **env,
        }
        if redis_url is not None:
            self.env["BATCHLLM_REDIS_URL"] = redis_url
        self.processes: list[subprocess.Popen[str]] = []

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "batchllm_celery.cli", *arguments]

    def run(
        self, *arguments: str, timeout: float = 90, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `batchllm ARGUMENTS` to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=self.env,
            cwd=self.folder,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(self, *arguments: str, name: str = "command") -> subprocess.Popen[str]:
        """Start `batchllm ARGUMENTS`; its output goes to NAME.out and NAME.err in the folder."""
        return self._popen(self.command(*arguments), name)

    def start_celery_worker(self, *arguments: str, name: str = "celery") -> subprocess.Popen[str]:
        """Start a plain `celery -A batchllm_celery worker`."""
        command = [sys.executable, "-m", "celery", "-A", "batchllm_celery", "worker"]
        return self._popen([*command, "-n", f"{name}@%h", *arguments], name)

    def _popen(self, command: Sequence[str], name: str) -> subprocess.Popen[str]:
        out = (self.folder / f"{name}.out").open("a")
        err = (self.folder / f"{name}.err").open("a")
        with out, err:
            process = subprocess.Popen(
                command,
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def said(self, name: str) -> str:
        """What a started command has printed so far, both streams."""
        return "".join((self.folder / f"{name}.{s}").read_text() for s in ("out", "err"))

    def all_output(self) -> str:
        """All that any process of this fleet wrote to a log, inputs and results apart."""
        logs = [
            p
            for p in self.folder.rglob("*")
            if p.is_file() and p.suffix in (".out", ".err", ".log")
        ]
        return "".join(path.read_text(errors="replace") for path in logs)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL, each by its id."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below `pid`."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def processes_of(folder: Path) -> list[psutil.Process]:
    """Living processes that were told of this folder: workers, servers and supervisors of a run."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        told = " ".join(process.info["cmdline"] or []) + str(
            (process.info["environ"] or {}).get("BATCHLLM_STATE_DIR", "")
        )
        if str(folder) in told and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def assert_nothing_left(folder: Path, timeout: float = 10.0) -> None:
    """No process of a run in `folder` is left after `timeout` seconds."""
    wait_until(lambda: not processes_of(folder), timeout=timeout, interval=0.2)


def write_rows(path: Path, count: int, prefix: str = "") -> Path:
    """A JSONL file of `count` rows whose prompts name their index."""
    with path.open("w") as file:
        for index in range(count):
            row = {
                "item_id": f"row-{index}",
                "prompt": f"{prefix}question number {index}",
                "context": {"n": index},
            }
            file.write(json.dumps(row) + "\n")
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_one_line_each(path: Path, count: int) -> list[dict[str, Any]]:
    """Every row has exactly one line, and each answer carries its own row's context."""
    lines = read_results(path)
    repeated = {index: n for index, n in Counter(line["index"] for line in lines).items() if n > 1}
    assert not repeated
    assert {line["index"] for line in lines} == set(range(count))
    for line in lines:
        if line["context"] is not None:
            assert line["context"]["n"] == line["index"]
    return lines
