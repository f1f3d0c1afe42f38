"""`batchllm demo`: a whole batch on this machine, under fire if wanted, and its books."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.display.console import say, to_stdout
from batchllm_celery.cli.processes import environment_of
from batchllm_celery.errors import BatchLLMError, BatchNotFoundError
from batchllm_celery.settings import Settings
from batchllm_celery.simulation.answers import digest_of

BATCH = "demo"
WORKERS = 4
#: Rows a second: 400 rows take 45 s, and a few more for the start.
PACE = 9.0
#: Seconds after the first answer in which something is killed. Killed for ever, on a slow machine
#: in which a worker takes longer to start than to be killed, the fleet would never be done.
FIRE_SECONDS = 60.0
#: Seconds between two looks.
_LOOK = 0.2
#: Seconds until a demo that does not end is ended.
_LONGEST = 600.0


@dataclass
class Books:
    """What each of three witnesses says, none of which knows of the others."""

    rows: int
    seconds: float = 0.0
    workers_killed: int = 0
    valkey_killed: int = 0
    calls: int = 0
    """Calls that the provider took in, by its journal."""
    asked: int = 0
    """Rows among them."""
    journal_tokens: int = 0
    """Of one call of each row."""
    succeeded: int = 0
    failed: int = 0
    maybe_billed: int = 0
    ledger_tokens: int = 0
    lines: int = 0
    right: int = 0
    """Rows that stand in the file once, with the answer that the provider gave to their prompt."""
    file_tokens: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def repeats(self) -> int:
        return self.calls - self.asked

    def check(self) -> None:
        """Note in which way the books differ."""
        all_rows = {
            "rows that the provider answered": self.asked,
            "rows that the ledger calls answered": self.succeeded,
            "lines of the file": self.lines,
            "right lines of the file": self.right,
        }
        self.problems += [
            f"{name}: {n} of {self.rows}" for name, n in all_rows.items() if n != self.rows
        ]
        if self.repeats > self.maybe_billed:
            self.problems.append(
                f"{self.repeats} calls were repeated, and the ledger knows of {self.maybe_billed}"
            )
        if not self.journal_tokens == self.ledger_tokens == self.file_tokens:
            tokens = (self.journal_tokens, self.ledger_tokens, self.file_tokens)
            self.problems.append("tokens: provider {:,}, ledger {:,}, file {:,}".format(*tokens))


@click.command()
@click.option("--kill", is_flag=True,
              help="Kill a random worker every --every seconds, once Valkey.")  # fmt: skip
@click.option("--every", type=options.Number(min=0.5), default=3.0, show_default=True,
              metavar="SECONDS", help="Time between two kills.")  # fmt: skip
@click.option("--rows", type=click.IntRange(min=1, max=100_000), default=400, show_default=True)
@click.option("--seed", type=int, help="Which workers are killed; default: others each time.")
@click.option("--svg", type=click.Path(dir_okay=False, writable=True), metavar="FILE",
              help="Write the last frame as a picture, too.")  # fmt: skip
def demo(kill: bool, every: float, rows: int, seed: int | None, svg: str | None) -> int:
    """Answer 400 rows in a minute with four workers and a simulated provider, on this machine.

    With --kill a random worker is killed (SIGKILL) every 3 s, and Valkey once. At the end three
    books are compared that know nothing of each other: the provider's journal, the ledger in
    Redis, and the result file. It needs no key and no server, and leaves nothing behind.

    Exit code: 0 if the books agree, 1 if not.
    """
    folder = Path(tempfile.mkdtemp(prefix="batchllm-demo-"))
    console = to_stdout()
    try:
        books = _run(folder, kill, every, rows, random.Random(seed), console)
        books.check()
    except BaseException:
        say(f"What is left of the demo: {folder}")
        raise
    frame = _frame(books)
    console.print(frame)
    if svg is not None:
        _draw(frame, Path(svg))
    if books.problems:
        say(f"The files of the demo: {folder}")
        return exit_codes.SOME_FAILED
    shutil.rmtree(folder, ignore_errors=True)
    return exit_codes.OK


def _run(
    folder: Path, kill: bool, every: float, rows: int, chance: random.Random, console: Console
) -> Books:
    from batchllm_celery.producer import Producer

    settings = _settings(folder)
    with Producer(settings) as producer:
        producer.check()
        started = time.monotonic()
        with _job(folder, settings, rows, chance) as job:
            fire = _Fire(producer, folder, every if kill else 0.0, chance, console)
            _follow(job, producer, fire, started)
        books = Books(rows, time.monotonic() - started, fire.workers_killed, fire.valkey_killed)
        progress = producer.attach(BATCH).progress()
        books.succeeded, books.failed = progress.succeeded, progress.failed
        books.maybe_billed = progress.maybe_billed
        books.ledger_tokens = progress.input_tokens + progress.output_tokens
    read_journal(folder / "journal.jsonl", books)
    read_results(folder / "results.jsonl", books)
    return books


def _settings(folder: Path) -> Settings:
    # A death is noticed within the lease: 30 s by default, half of this demo.
    return Settings(
        redis_url=None,
        state_dir=folder / "state",
        namespace=BATCH,
        slots=20,
        lease_seconds=3.0,
        heartbeat_seconds=0.5,
        offer_seconds=1.0,
        simulated_url=None,
    )


@contextlib.contextmanager
def _job(folder: Path, settings: Settings, rows: int, chance: random.Random) -> Any:
    """`batchllm run`, as a person would type it."""
    prompts = [f"Row {n}: how much is {n} times {chance.randint(2, 99)}?" for n in range(rows)]
    (folder / "rows.txt").write_text("\n".join(prompts) + "\n")
    provider = {"latency": 1.0, "jitter": 0.5, "log_file": str(folder / "journal.jsonl")}
    command = [
        *(sys.executable, "-m", "batchllm_celery.cli", "run", str(folder / "rows.txt")),
        *("-o", str(folder / "results.jsonl"), "--batch-id", BATCH, "--model", "simulated"),
        *("--rpm", f"{PACE * 60:g}", "--workers", str(WORKERS), "--max-attempts", "10"),
        *("--simulation", json.dumps(provider), "--quiet"),
    ]
    environment = {
        name: value
        for name, value in environment_of(settings).items()
        if not name.startswith("BATCHLLM_") or name.removeprefix("BATCHLLM_").lower() in _KEPT
    }
    with (folder / "run.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_KEPT = frozenset(Settings.model_fields)


class _Fire:
    """Kills one of the fleet's workers now and then, and once its Valkey."""

    def __init__(
        self, producer: Any, folder: Path, every: float, chance: random.Random, console: Console
    ) -> None:
        self.workers_killed = self.valkey_killed = 0
        self._producer, self._folder, self._every = producer, folder, every
        self._chance, self._console = chance, console
        self._next = self._ends = 0.0

    def look(self, finished: int, rows: int) -> None:
        """Kill somebody if it is time."""
        now = time.monotonic()
        if not self._every or not finished or finished >= rows or now < self._next:
            return
        self._ends = self._ends or now + FIRE_SECONDS
        if now > self._ends:
            return
        self._next = now + self._every
        if not self.valkey_killed and self.workers_killed and finished > rows * 0.4:
            self.valkey_killed += 1
            self._kill("Valkey", self._valkey(), finished, rows)
            return
        here = socket.gethostname()
        pids = [one.pid for one in self._producer.workers() if one.host == here]
        if len(living := sorted(filter(_lives, pids))) > 1:  # somebody goes on
            self.workers_killed += 1
            self._kill("worker", self._chance.choice(living), finished, rows)

    def _valkey(self) -> int:
        from batchllm_celery.embedded import EmbeddedServer

        server = EmbeddedServer.acquire(self._folder / "state")
        try:
            return server.pid
        finally:
            server.release()

    def _kill(self, what: str, pid: int, finished: int, rows: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self._console.print(f"  {finished:>4} of {rows} rows   kill -9 {pid} ({what})", style="red")


def _lives(pid: int) -> bool:
    """Whether a worker of the register does; one that was killed stays in it for a while."""
    return "celery" in _command_of(pid)


def _command_of(pid: int) -> str:
    found = subprocess.run(
        ["ps", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return "" if found.stdout.startswith("Z") else found.stdout


def _follow(job: Any, producer: Any, fire: _Fire, started: float) -> None:
    batch = None
    while job.poll() is None:
        time.sleep(_LOOK)
        if time.monotonic() - started > _LONGEST:
            raise BatchLLMError(f"the demo did not end within {_LONGEST:g} s")
        try:
            batch = batch or producer.attach(BATCH)
        except BatchNotFoundError:
            continue
        progress = batch.progress()
        if progress.total:
            fire.look(progress.finished, progress.total)


# -- the books


def read_journal(path: Path, books: Books) -> None:
    """Count what the provider answered."""
    tokens: dict[str, int] = {}
    for line in path.read_text().splitlines():
        call = json.loads(line)
        if call.get("status") != 200:
            continue
        books.calls += 1
        tokens[call["prompt"]] = call["input_tokens"] + call["output_tokens"]
    books.asked, books.journal_tokens = len(tokens), sum(tokens.values())


def read_results(path: Path, books: Books) -> None:
    """Count the lines of the file; its prompts are in `rows.txt` beside it."""
    prompts = (path.parent / "rows.txt").read_text().splitlines()
    results = [json.loads(line) for line in path.read_text().splitlines()]
    books.lines = len(results)
    times = Counter(result["index"] for result in results)
    for result in results:
        wanted = digest_of(prompts[result["index"]])
        once = times[result["index"]] == 1
        books.right += once and result["success"] and wanted in str(result["output"])
        books.file_tokens += result["token_usage"]["total_tokens"]


def _frame(books: Books) -> Panel:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("provider's journal", "ledger in Redis", "result file"):
        table.add_column(name, justify="right")
    rows = f"{books.rows:,}"
    table.add_row("rows", rows, rows, f"{books.lines:,} lines")
    table.add_row(
        "answered", f"{books.asked:,}", f"{books.succeeded:,}", f"{books.right:,}, once each"
    )
    table.add_row("failed", "-", f"{books.failed:,}", f"{books.lines - books.right:,}")
    table.add_row(
        "calls made again",
        f"{books.repeats:,}",
        f"at most {books.maybe_billed:,}",
        "-",
    )
    tokens = (books.journal_tokens, books.ledger_tokens, books.file_tokens)
    table.add_row("tokens", *(f"{count:,}" for count in tokens))
    killed = "nobody killed"
    if books.workers_killed or books.valkey_killed:
        killed = f"{books.workers_killed} workers killed (SIGKILL)"
        killed += ", Valkey killed once" if books.valkey_killed else ""
    verdict = Text("The three books agree.", style="bold green")
    if books.problems:
        verdict = Text("The books differ: " + "; ".join(books.problems), style="bold red")
    head = Text(f"{books.rows:,} rows, {WORKERS} workers, {books.seconds:.0f} s, {killed}")
    return Panel(Group(head, table, verdict), title="batchllm demo", expand=False, padding=(1, 2))


def _draw(frame: Panel, path: Path) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=104, file=nowhere, force_terminal=True)
        console.print(Text("$ batchllm demo --kill", style="bold"))
        console.print(frame)
        console.save_svg(str(path), title="batchllm")
