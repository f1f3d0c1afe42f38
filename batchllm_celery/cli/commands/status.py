"""`batchllm status`: batches, quotas and workers of a fleet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.display.console import print_json, to_stdout
from batchllm_celery.cli.display.progress import RateMeter
from batchllm_celery.cli.display.quota_view import doing, quota_table
from batchllm_celery.cli.display.tables import FittingTable
from batchllm_celery.cli.display.wording import count, duration, money, plural, rate, short
from batchllm_celery.cli.request import CommandRequest, settings_of
from batchllm_celery.cli.signals import Interrupts
from batchllm_celery.models import BatchState

if TYPE_CHECKING:
    from batchllm_celery.connection import BrokenEntry
    from batchllm_celery.ledger import WorkerInfo
    from batchllm_celery.limiter import QuotaState
    from batchllm_celery.models import BatchProgress
    from batchllm_celery.producer import Producer

SHOWN_BATCHES = 20
WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class Status:
    """A fleet at one moment."""

    batches: list[BatchProgress]
    quotas: list[QuotaState]
    workers: list[WorkerInfo]
    rates: dict[str, float]
    """Items a second by batch id, over the last half minute of `--watch`."""
    broken: list[BrokenEntry] = field(default_factory=list)
    """Entries of Redis that could not be read."""

    def to_json(self) -> dict[str, Any]:
        return {
            "batches": [
                progress.model_dump(mode="json")
                | {"items_per_second": self.rates.get(progress.batch_id)}
                for progress in self.batches
            ],
            "quotas": [quota.model_dump(mode="json") for quota in self.quotas],
            "workers": [asdict(worker) for worker in self.workers],
            "broken": [asdict(entry) for entry in self.broken],
        }


class StatusReader:
    """Reads a fleet's status; from the second time on it knows the rates."""

    def __init__(self, producer: Producer, batch_id: str | None) -> None:
        self._producer = producer
        self._batch_id = batch_id
        self._meters: dict[str, RateMeter] = {}

    def read(self) -> Status:
        """The status of the fleet now.

        Raises:
            BatchNotFoundError: the batch that was asked for is unknown.
        """
        if self._batch_id is None:
            batches, quotas = self._producer.batches(), self._producer.quotas()
        else:
            batch = self._producer.attach(self._batch_id)
            quota = self._producer.quota(batch.spec.quota) if batch.spec.quota else None
            batches, quotas = [batch.progress()], [quota] if quota else []
        rates = {
            progress.batch_id: self._meters.setdefault(progress.batch_id, RateMeter()).update(
                progress.finished
            )
            for progress in batches
        }
        workers = self._producer.workers()
        return Status(batches, quotas, workers, rates, self._producer.broken())


@click.command()
@click.argument("batch_id", metavar="[BATCH]", required=False)
@options.option("--watch", "-w", is_flag=True, help="Again every second, until Ctrl-C.")
@options.as_json
@options.connection
def status(batch_id: str | None, watch: bool, **shared: Any) -> int:
    """Show batches, quotas and workers; or BATCH alone with the quota it draws on."""
    from batchllm_celery.producer import Producer

    request = CommandRequest(**shared)
    with Producer(settings_of(request)) as producer:
        producer.check()
        reader = StatusReader(producer, batch_id)
        seen = reader.read()
        if watch:
            return _watch(reader, as_json=request.as_json)
        if request.as_json:
            print_json(seen.to_json())
        else:
            show(to_stdout(), seen)
    return exit_codes.OK


def _watch(reader: StatusReader, *, as_json: bool) -> int:
    with Interrupts().counted() as interrupts:
        if as_json:
            _every_second(interrupts, lambda: print_json(reader.read().to_json()))
        else:
            console = to_stdout()
            with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
                _every_second(interrupts, lambda: live.update(render(reader.read()), refresh=True))
    return exit_codes.OK


def _every_second(interrupts: Interrupts, do: Callable[[], None]) -> None:
    while not interrupts.count:
        do()
        until = time.monotonic() + WATCH_SECONDS
        while not interrupts.count and time.monotonic() < until:
            time.sleep(0.05)


def show(console: Console, seen: Status) -> None:
    """Print a status."""
    console.print(render(seen))


def render(seen: Status) -> RenderableType:
    """The status as tables."""
    if not (seen.batches or seen.quotas or seen.workers or seen.broken):
        return Text("Nothing yet: no batch, no quota, no worker.")
    parts: list[RenderableType] = []
    if seen.batches:
        parts.append(_batches(seen))
    if seen.quotas:
        parts.append(quota_table(seen.quotas))
    parts.append(_workers(seen))
    parts += [
        Text(f"{worker.worker_id} can't read {worker.unreadable}", style="red")
        for worker in seen.workers
        if worker.unreadable
    ]
    parts += [Text(line, style="yellow") for line in unrunnable(seen.workers)]
    if seen.broken:
        named = ", ".join(f"{entry.kind} {entry.name} ({entry.reason})" for entry in seen.broken)
        parts.append(Text(f"Broken in Redis: {named}; see: batchllm doctor", style="red"))
    return Group(*parts)


def unrunnable(workers: list[WorkerInfo]) -> list[str]:
    """A line for each strategy that some of the workers can't run, and why."""
    found: dict[tuple[str, str], list[float]] = {}
    for worker in workers:
        for name, (reason, since) in json.loads(worker.unrunnable or "{}").items():
            found.setdefault((name, reason), []).append(since)
    return [
        f"unrunnable here: {name}: {reason} ({len(times)} of {plural(len(workers), 'worker')}, "
        f"since {time.strftime('%H:%M', time.localtime(min(times)))})"
        for (name, reason), times in sorted(found.items())
    ]


def _batches(seen: Status) -> FittingTable:
    table = FittingTable(
        "Batch", "State", "Done", "✓", "✗", "In flight", "Tokens", "Cost", "Rate", "ETA"
    )
    now = time.time()
    for progress in seen.batches[:SHOWN_BATCHES]:
        speed = seen.rates.get(progress.batch_id, 0.0) or _average(progress, now)
        left = (progress.total or 0) - progress.finished
        running = left > 0 and speed > 0 and not progress.state.stopped
        total = "?" if progress.total is None else count(progress.total)
        table.add_row(
            progress.batch_id,
            doing(progress, None, now) or str(progress.state),
            f"{count(progress.finished)}/{total}",
            count(progress.succeeded),
            count(progress.failed),
            count(progress.in_flight),
            short(progress.input_tokens + progress.output_tokens),
            "-" if progress.cost is None else money(progress.cost),
            rate(speed) if running else "-",
            duration(left / speed) if running else "-",
        )
    if len(seen.batches) > SHOWN_BATCHES:
        table.caption = f"and {len(seen.batches) - SHOWN_BATCHES:,} older ones"
    return table


def _average(progress: BatchProgress, now: float) -> float:
    """Items a second since the submission, for a batch whose rate was not measured."""
    since = now - progress.submitted_at
    return progress.finished / since if progress.submitted_at and since > 1 else 0.0


def _running(worker: WorkerInfo) -> str:
    """Slots in use, and the items that wait for one in that process."""
    waiting = max(0, worker.running - worker.slots)
    in_use = f"{count(worker.running - waiting)}/{count(worker.slots)}"
    return f"{in_use}, {count(waiting)} waiting" if waiting else in_use


def _workers(seen: Status) -> RenderableType:
    workers = seen.workers
    if not workers:
        halted = (BatchState.PAUSED, BatchState.PARKED)
        if any(
            not (batch.is_over or batch.state.stopped or batch.state in halted)
            for batch in seen.batches
        ):
            return Text("No worker is running; start some: batchllm worker", style="yellow")
        return Text("No worker is running, and no batch waits for one.", style="dim")
    now = time.time()
    table = FittingTable("Worker", "Host", "Pid", "Running", "Queues", "Seen")
    for worker in workers:
        table.add_row(
            worker.worker_id,
            worker.host,
            str(worker.pid),
            _running(worker),
            worker.queues,
            f"{duration(max(0.0, now - worker.last_seen))} ago",
        )
    return table
