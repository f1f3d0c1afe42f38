"""The chaos harness: fleets of real workers, a provider that keeps its own books, faults, a judge.

The judge believes three books that know nothing of each other: the provider's journal (who called
for what, when, and who hung up), the harness's list of cuts (whom it killed, froze or cut off,
when), and what is left in Redis and in the result file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from batchllm_celery.keys import Keys
from batchllm_celery.simulation import SimulationClient, spawn
from tests.acceptance.fleet import (
    Fleet,
    assert_nothing_left,
    assert_one_line_each,
    write_rows,
)
from tests.support import ValkeyServer, keys_without_ttl, wait_until

APP = "tests.acceptance.chaos_app"
NAMESPACE = "chaos"
#: How long an answer may take from the provider's wire into the ledger, on a machine that has a
#: processor for each process that wants one; on another one longer, by as much as it is overbooked.
ANSWER_TO_LEDGER_SECONDS = 1.5


@dataclass(slots=True)
class Call:
    """One call as the provider saw it."""

    prompt: str
    pid: int
    time: float
    status: int
    hung_up: float | None = None
    """When its client went away before the answer."""


class ProviderJournal:
    """The provider's log file, read as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._by_number: dict[int, Call] = {}
        self.calls_of: dict[int, int] = defaultdict(int)
        """Process -> calls."""

    def refresh(self) -> ProviderJournal:
        with self._path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._read += whole
        for line in data[:whole].splitlines():
            self._take(json.loads(line))
        return self

    def _take(self, entry: dict[str, Any]) -> None:
        if entry.get("aborted"):
            self._by_number[entry["number"]].hung_up = entry["time"]
            return
        call = Call(entry["prompt"], int(entry["user"] or 0), entry["time"], entry["status"])
        self._by_number[entry["number"]] = call
        self.calls_of[call.pid] += 1

    def calls(self, prefix: str = "") -> list[Call]:
        """All calls so far whose prompt begins with `prefix`, in order of arrival."""
        self.refresh()
        return [call for call in self._by_number.values() if call.prompt.startswith(prefix)]


@dataclass(frozen=True, slots=True)
class Cut:
    """A process was killed, frozen or cut off; calls that it had in flight may be repeated."""

    pid: int
    since: float
    until: float
    why: str
    patience: float = field(default_factory=lambda: ANSWER_TO_LEDGER_SECONDS * _overbooked())
    """Seconds that an answer may have been on its way into the ledger when the cut came."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge counted; he raises where something is wrong."""

    rows: int
    calls: int
    repeats: int
    hung_up: int
    """Repeats whose earlier call the provider saw hung up on: in flight without any doubt."""
    latest: float
    """Of the other ones: the longest that an answered call was unrecorded before its cut (s)."""
    maybe_billed: int
    cuts: dict[str, int]

    def __str__(self) -> str:
        cuts = ", ".join(f"{count} x {why}" for why, count in sorted(self.cuts.items()))
        return (
            f"{self.rows:,} rows, {self.calls:,} calls, {self.repeats} repeated "
            f"({self.hung_up} hung up on, the rest cut off within {self.latest:.2f} s of their "
            f"answer), maybe_billed {self.maybe_billed}; {cuts or 'no cuts'}"
        )


@dataclass
class Stage:
    """A Valkey, a provider process with a journal, and the fleet of one test around them."""

    folder: Path
    valkey: ValkeyServer
    provider: SimulationClient
    latency: float
    fleet: Fleet
    journal: ProviderJournal
    cuts: list[Cut] = field(default_factory=list)
    workers: list[subprocess.Popen[str]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    started: int = 0

    # -- workers ----------------------------------------------------------------------------------

    def start_worker(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """One plain Celery worker of one process."""
        self.started += 1
        name = f"w{self.started}"
        command = [sys.executable, "-m", "celery", "-A", APP, "worker", "-n", f"{name}@%h"]
        options = ["--without-mingle", "--without-gossip", "--loglevel", "INFO", *arguments]
        kept, self.fleet.env = self.fleet.env, self.fleet.env | env
        try:
            worker = self.fleet._popen([*command, *options], name)
        finally:
            self.fleet.env = kept
        self.workers.append(worker)
        self.names[worker.pid] = name
        return worker

    def said(self, worker: subprocess.Popen[str]) -> str:
        """A worker's log."""
        return self.fleet.said(self.names[worker.pid])

    def ensure_workers(self, count: int) -> list[subprocess.Popen[str]]:
        """So many living workers at least; all of them."""
        while len(self.workers) < count:
            self.start_worker()
        return list(self.workers)

    def has_called(
        self, worker: subprocess.Popen[str], times: int = 1, batch_id: str | None = None
    ) -> bool:
        """Whether a worker has made so many calls, in all or for one batch."""
        if batch_id is None:
            return self.journal.refresh().calls_of[worker.pid] >= times
        calls = self.journal.calls(f"{batch_id} ")
        return sum(call.pid == worker.pid for call in calls) >= times

    def caller(self, batch_id: str) -> subprocess.Popen[str] | None:
        """The worker that made the batch's latest call."""
        latest = [call.pid for call in self.journal.calls(f"{batch_id} ")][-1:]
        return next((worker for worker in self.workers if [worker.pid] == latest), None)

    def kill(self, worker: subprocess.Popen[str], how: signal.Signals = signal.SIGKILL) -> None:
        """End a worker by a signal that may cut off its calls, and note it."""
        since = time.time()
        os.kill(worker.pid, how)
        worker.wait(timeout=60)
        self.cuts.append(Cut(worker.pid, since, time.time(), how.name))
        self.workers.remove(worker)

    def drain(self, worker: subprocess.Popen[str]) -> None:
        """SIGTERM: nothing may be repeated for that, so it is no cut."""
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=60) == 0
        self.workers.remove(worker)

    @contextlib.contextmanager
    def frozen(self, worker: subprocess.Popen[str]) -> Iterator[None]:
        """SIGSTOP; SIGCONT at the end."""
        since = time.time()
        os.kill(worker.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(worker.pid, signal.SIGCONT)
            self.cuts.append(Cut(worker.pid, since, time.time(), "SIGSTOP"))

    # -- Redis and the broker ---------------------------------------------------------------------

    @property
    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.valkey.url)

    def kill_valkey(self, away: float = 0.0) -> None:
        """kill -9 of Valkey, which comes back with its AOF after `away` seconds. No cut: the
        workers live, and nothing that Redis acknowledged is lost."""
        self.valkey.kill()
        time.sleep(away)
        self.valkey.start()

    def cut_connections(self) -> int:
        """Close every connection to Redis, the broker's included."""
        with self.client as client:
            closed = [client.execute_command("CLIENT", "KILL", "TYPE", kind)
                      for kind in ("normal", "pubsub")]  # fmt: skip
        return sum(int(one) for one in closed)

    def messages_left(self) -> dict[str, int]:
        """What lies in the broker, waiting or taken and not acknowledged."""
        prefix = f"{NAMESPACE}:celery:"
        found = {}
        with self.client as client:
            for key in client.scan_iter(match=f"{prefix}*", count=1000):
                name, kind = key.decode().removeprefix(prefix), client.type(key)
                if kind == b"list" and "pidbox" not in name and "celeryev" not in name:
                    found[name] = int(client.llen(key))
                elif name == "unacked":
                    found[name] = int(client.hlen(key))
        return {name: count for name, count in found.items() if count}

    # -- the producer -----------------------------------------------------------------------------

    def rows(self, batch_id: str, count: int, mark: str = "") -> Path:
        """An input file; every prompt begins with the batch's id."""
        return write_rows(self.folder / f"{batch_id}.jsonl", count, f"{batch_id} {mark}")

    def start_run(self, batch_id: str, *options: str) -> subprocess.Popen[str]:
        """`batchllm run` of the batch's rows over the workers that are there."""
        return self.fleet.start(*self.run_arguments(batch_id, *options), name=f"run-{batch_id}")

    def run_arguments(self, batch_id: str, *options: str) -> tuple[str, ...]:
        return (
            "run", f"{batch_id}.jsonl", "-o", f"{batch_id}.out", "--strategy", "chaos",
            "--batch-id", batch_id, "--workers", "0", *options,
        )  # fmt: skip

    def out(self, batch_id: str) -> Path:
        return self.folder / f"{batch_id}.out"

    def written(self, batch_id: str) -> int:
        """Lines in the result file."""
        out = self.out(batch_id)
        return out.read_bytes().count(b"\n") if out.exists() else 0

    def finish(self, run: subprocess.Popen[str], batch_id: str, timeout: float = 120) -> None:
        """Wait for `run`, which must have ended well."""
        assert run.wait(timeout=timeout) == 0, self.fleet.said(f"run-{batch_id}")

    # -- the judge --------------------------------------------------------------------------------

    def judge(self, batch_id: str, rows: int) -> Verdict:
        """0 lost, 0 with two outcomes, every repeated call excused by a cut and counted."""
        lines = assert_one_line_each(self.out(batch_id), rows)
        assert [line for line in lines if not line["success"]] == []
        meta = self.assert_books_balance(batch_id, rows)
        assert meta["ok"] == rows
        calls = self.journal.calls(f"{batch_id} ")
        earlier = _repeated(calls, rows)
        excused = [(call, self._excuse(call)) for call in earlier]
        unexcused = [
            (call, [cut for cut in self.cuts if cut.pid == call.pid])
            for call, cut in excused
            if cut is None
        ]
        assert not unexcused, unexcused
        assert len(earlier) <= meta["maybe_billed"]
        return Verdict(
            rows=rows,
            calls=len(calls),
            repeats=len(earlier),
            hung_up=sum(call.hung_up is not None for call in earlier),
            latest=max(
                (
                    cut.since - call.time - self.latency
                    for call, cut in excused
                    if cut is not None and call.hung_up is None
                ),
                default=0.0,
            ),
            maybe_billed=meta["maybe_billed"],
            cuts=_count(cut.why for cut in self.cuts),
        )

    def _excuse(self, call: Call) -> Cut | None:
        """The cut that found `call` in flight: on the wire, or answered and not yet recorded."""
        for cut in self.cuts:
            earliest = cut.since - self.latency - cut.patience
            # What a killed process had sent may be read a little later.
            latest = cut.until + (0 if cut.why == "SIGSTOP" else cut.patience)
            if cut.pid == call.pid and earliest <= call.time <= latest:
                return cut
        return None

    def assert_books_balance(self, batch_id: str, rows: int, outcomes: int | None = None) -> Any:
        """Counters, bitmaps, stream and sets of a finished batch agree; its numbers."""
        keys = Keys(NAMESPACE).batch(batch_id)
        with self.client as client:
            raw = client.hgetall(keys.meta)
            meta = {k.decode(): _number(v) for k, v in raw.items()}
            assert meta["ok"] + meta["failed"] == meta["total"] == meta["fed"] == rows
            assert client.bitcount(keys.done) == rows
            assert client.bitcount(keys.failed) == meta["failed"]
            assert meta["out_count"] == (rows if outcomes is None else outcomes)
            assert client.zcard(keys.ready) == client.hlen(keys.held) == 0
            assert client.hlen(keys.attempts) == 0
            assert meta["item_bytes"] == 0
            assert client.hlen(keys.item) <= meta["failed"]
        return meta

    def assert_nothing_stays(self, timeout: float = 60) -> None:
        """No message is left in the broker (given a worker that lives), no key without a TTL."""
        if all(worker.poll() is not None for worker in self.workers):
            self.start_worker()
        left: dict[str, int] = {}

        def empty() -> bool:
            nonlocal left
            left = self.messages_left()
            return not left

        try:
            wait_until(empty, timeout=timeout, interval=0.2)
        except AssertionError as error:
            raise AssertionError(f"messages left in the broker: {left}") from error
        assert keys_without_ttl(self.valkey.url, NAMESPACE) == []


def _repeated(calls: list[Call], rows: int) -> list[Call]:
    """Of every prompt all paid calls but the last; each row has at least one."""
    by_prompt: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if call.status == 200:
            by_prompt[call.prompt].append(call)
    assert len(by_prompt) == rows
    return [call for group in by_prompt.values() for call in group[:-1]]


def _overbooked() -> float:
    """How many processes share a processor, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _number(value: bytes) -> Any:
    try:
        return int(value)
    except ValueError:
        return value.decode(errors="replace")


def _count(words: Any) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for word in words:
        counts[word] += 1
    return dict(counts)


@contextlib.contextmanager
def staged(folder: Path, *, latency: float = 0.3, **env: str) -> Iterator[Stage]:
    """A stage of its own Valkey and provider; afterwards nothing of it is left."""
    valkey = ValkeyServer().start()
    log = valkey.folder / "provider.journal"
    log.touch()
    try:
        with spawn(latency=latency, log_file=log) as provider:
            fleet = Fleet(folder, valkey.url, NAMESPACE, **{
                "CHAOS_PROVIDER": provider.openai_url,
                "CHAOS_VISIBILITY": "5",
                "CHAOS_REPAIRED": str(folder / "repaired"),
                "BATCHLLM_APP": APP,
                "BATCHLLM_SLOTS": "8",
                **env,
            })  # fmt: skip
            stage = Stage(folder, valkey, provider, latency, fleet, ProviderJournal(log))
            try:
                yield stage
            finally:
                fleet.stop()
                assert_nothing_left(folder, timeout=20)
    finally:
        valkey.stop()


class Proxy:
    """A network of one worker: delays what passes, and can stop passing anything.

    During a partition connections stay open and silent, as on a real network; what was sent
    meanwhile arrives when it ends, however old it is.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self.url = f"unix://{folder / 'p.sock'}"
        self.delay = 0.0
        self._listen, self._target = folder / "p.sock", target
        self._open = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._on_loop(self._loop.stop)
        self._thread.join(timeout=10)

    @contextlib.contextmanager
    def partitioned(self) -> Iterator[None]:
        """Nothing passes inside the block."""
        self._on_loop(self._open.clear)
        try:
            yield
        finally:
            self._on_loop(self._open.set)

    def _on_loop(self, call: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(call)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._open.set()
        start = asyncio.start_unix_server(self._connect, path=str(self._listen))
        server = self._loop.run_until_complete(start)
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(str(self._target))
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
