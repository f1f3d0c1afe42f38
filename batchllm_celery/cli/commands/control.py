"""`batchllm cancel | pause | resume | retry-failed`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.display.wording import plural
from batchllm_celery.cli.request import CommandRequest, settings_of

if TYPE_CHECKING:
    from batchllm_celery.models import BatchProgress
    from batchllm_celery.producer import Batch, Producer

_batch = click.argument("batch_id", metavar="BATCH")


@contextlib.contextmanager
def _attached(batch_id: str, request: CommandRequest) -> Iterator[tuple[Producer, Batch]]:
    from batchllm_celery.producer import Producer

    with Producer(settings_of(request)) as producer:
        producer.check()
        yield producer, producer.attach(batch_id)


def _report(progress: BatchProgress) -> int:
    total = "?" if progress.total is None else f"{progress.total:,}"
    click.echo(
        f"{progress.batch_id} is {progress.state}: {progress.succeeded:,} succeeded, "
        f"{progress.failed:,} failed of {total}",
        err=True,
    )
    return exit_codes.OK


@click.command()
@_batch
@options.connection
def cancel(batch_id: str, **shared: Any) -> int:
    """End BATCH: calls in flight finish, all other items get the outcome `cancelled`."""
    with _attached(batch_id, CommandRequest(**shared)) as (_, batch):
        return _report(batch.cancel())


@click.command()
@_batch
@options.connection
def pause(batch_id: str, **shared: Any) -> int:
    """Start no more calls of BATCH until it is resumed."""
    with _attached(batch_id, CommandRequest(**shared)) as (_, batch):
        return _report(batch.pause())


@click.command()
@_batch
@options.connection
def resume(batch_id: str, **shared: Any) -> int:
    """Continue BATCH after a pause, a cancel, its deadline or its budget."""
    with _attached(batch_id, CommandRequest(**shared)) as (_, batch):
        return _report(batch.resume())


@click.command("retry-failed")
@_batch
@options.connection
def retry_failed(batch_id: str, **shared: Any) -> int:
    """Run the failed items of BATCH again; their new outcomes replace the old ones."""
    with _attached(batch_id, CommandRequest(**shared)) as (producer, batch):
        again = batch.retry_failed()
        served = any(batch.spec.queue in worker.queues.split(",") for worker in producer.workers())
    click.echo(f"{plural(again, 'item')} of {batch_id} will be run again", err=True)
    if again and not served:
        click.echo(
            "No worker serves its queue now. A batch of `run` goes on with its own command and "
            f"--batch-id {batch_id} --retry-failed; for one of `submit` start some: "
            f"batchllm worker --queue {batch.spec.queue}",
            err=True,
        )
    return exit_codes.OK
