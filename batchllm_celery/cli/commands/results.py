"""`batchllm results`: the results of a batch so far, or until it is over."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import click

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.batch_follower import no_more
from batchllm_celery.cli.display.console import to_stderr
from batchllm_celery.cli.display.progress import Display, RateMeter, View, open_display
from batchllm_celery.cli.display.summary import exit_code
from batchllm_celery.cli.request import CommandRequest, settings_of
from batchllm_celery.cli.signals import Interrupts
from batchllm_celery.files.result_file import OutputError, Sink, open_sink

if TYPE_CHECKING:
    from batchllm_celery.models import BatchProgress
    from batchllm_celery.producer import Batch

#: Results that are read at once.
CHUNK = 1000
#: Seconds between two reads of the counters, and the longest wait for a result.
POLL_SECONDS = 0.5


@click.command()
@click.argument("batch_id", metavar="BATCH")
@options.option("--follow", "-f", is_flag=True, help="Until the batch is over.")
@options.out
@options.connection
@options.quiet
def results(batch_id: str, follow: bool, **shared: Any) -> int:
    """Print the results of BATCH, one JSON object a line, or write them to -o OUT.jsonl.

    Reading removes nothing: results of `submit` can be read until the batch expires. Results of
    `run` are in the file that it wrote. Exit code: 0; with --follow the same as of `run`.
    """
    from batchllm_celery.producer import Producer

    request = CommandRequest(**shared)
    with contextlib.ExitStack() as stack, Interrupts().counted() as interrupts:
        producer = stack.enter_context(Producer(settings_of(request)))
        producer.check()
        batch = producer.attach(batch_id)
        _refuse_if_elsewhere(batch)
        sink = open_sink(
            request.out, batch.id, overwrite=request.overwrite, ordered=request.ordered
        )
        shows = follow and request.out not in (None, "-")
        display = open_display(to_stderr(), quiet=request.quiet or not shows)
        try:
            progress = _copy(batch, sink, display, interrupts, follow=follow)
        finally:
            display.close()
        sink.finish(complete=not follow or no_more(progress))
    if interrupts.count:
        return exit_codes.INTERRUPTED
    return exit_code(progress) if follow else exit_codes.OK


def _refuse_if_elsewhere(batch: Batch) -> None:
    """Refuse a batch of `run`, which removes results from Redis once they are in its file."""
    progress = batch.progress()
    if progress.unread == 0 and progress.finished and no_more(progress):
        raise OutputError(
            f"the {progress.finished:,} results of batch {batch.id} are in the file that `run` "
            "wrote; they are not in Redis any more"
        )


def _copy(
    batch: Batch, sink: Sink, display: Display, interrupts: Interrupts, *, follow: bool
) -> BatchProgress:
    """Write the results so far; with `follow`, all until the batch is over."""
    meter, after = RateMeter(), "0-0"
    progress, polled_at = batch.progress(), time.monotonic()
    while not interrupts.count:
        ending = not follow or no_more(progress)
        found = batch.read(after, CHUNK, 0.0 if ending else POLL_SECONDS)
        if found:
            after = found[-1].receipt
            sink.write(found)
            sink.sync()
        elif ending:
            break
        if not found or time.monotonic() - polled_at > POLL_SECONDS:
            progress, polled_at = batch.progress(), time.monotonic()
        display.update(View(progress, progress.total, meter.update(progress.finished)))
    return progress
