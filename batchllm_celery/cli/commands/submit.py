"""`batchllm submit`: enqueue a batch for a fleet."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import click

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.batch_follower import BackgroundThread
from batchllm_celery.cli.display.console import log_to, say, to_stderr
from batchllm_celery.cli.display.wording import plural
from batchllm_celery.cli.request import (
    CommandRequest,
    check_price,
    check_strategy,
    default_quota_name,
    each_model,
    given_strategy,
    open_rows,
    quota_of,
    rerun_words,
    resume_command,
    settings_of,
    spec_of,
)
from batchllm_celery.cli.signals import Interrupts
from batchllm_celery.errors import UsageError
from batchllm_celery.files.rows import Rows
from batchllm_celery.models import BatchSpec, Quota
from batchllm_celery.settings import Settings


@click.command()
@options.inputs
@options.model
@options.rows
@options.quota
@options.batch
@options.bounds
@options.connection
@options.quiet
@options.verbose
def submit(sources: tuple[str, ...], **shared: Any) -> int:
    """Enqueue every row of INPUT for the workers of a fleet; print the batch's id.

    The id is printed as soon as the batch is in Redis, so that `batchllm results ID --follow` can
    start while rows are still read. Exit code: 0 enqueued, 2 not enqueued.
    """
    request = CommandRequest(**shared)
    log_to(to_stderr(), verbose=request.verbose)
    with contextlib.ExitStack() as stack, Interrupts().counted() as interrupts:
        settings = settings_of(request)
        rows = open_rows(request, sources, given_strategy(request), stack)
        strategy = rows.strategy
        instance = None
        if request.model or settings.app:
            instance = check_strategy(strategy, settings)
        spec = spec_of(
            request, strategy, source=sources[0], queue="default", keep_results=True,
            own_models=rows.native.own_models and bool(rows.native.models),
        )  # fmt: skip
        if instance is not None:
            check_price(spec, instance, settings)
        quota = quota_of(request, default_quota_name(strategy))
        total = _submit(settings, spec, quota, request, rows, interrupts, stack)
    if total is None:
        command = resume_command(spec.batch_id, sys.argv[1:])
        say(f"Interrupted before all rows were enqueued. Continue with: {command}")
        return exit_codes.INTERRUPTED
    if not request.quiet:
        bad = f" ({plural(rows.bad, 'bad row')})" if rows.bad else ""
        click.echo(f"{plural(total, 'item')} enqueued{bad}", err=True)
    return exit_codes.OK


def _submit(
    settings: Settings,
    spec: BatchSpec,
    quota: Quota | None,
    request: CommandRequest,
    rows: Rows,
    interrupts: Interrupts,
    stack: contextlib.ExitStack,
) -> int | None:
    from batchllm_celery.producer import Producer
    from batchllm_celery.producer.producer import find_batch, prepare_batch

    producer = stack.enter_context(Producer(settings))
    producer.check()
    producer.check_runnable(spec)
    found = find_batch(producer, spec.batch_id) if request.batch_id else None
    renew = False
    feed: Iterable[Any] = rows
    if found is not None:
        spec, renew, feed = prepare_batch(producer, spec, found, rows, rerun_words(request))
    batch = producer.open(spec, quota=quota, quota_update=request.quota_update, renew=renew)
    each_model(producer, spec, request, rows, settings)
    click.echo(batch.id)
    sys.stdout.flush()
    if not request.quiet and not producer.workers():
        click.echo("No worker is running yet; start some: batchllm worker", err=True)
    stop, totals = threading.Event(), []
    feeder = BackgroundThread("feeder", lambda: totals.append(batch.feed(feed, stop=stop)))
    feeder.start()
    while feeder.is_alive():
        if interrupts.count:
            stop.set()
        if interrupts.count >= 2:
            return None
        time.sleep(0.05)
    if feeder.failure is not None:
        raise feeder.failure
    if not totals:
        raise UsageError("the rows were not enqueued")
    return totals[0]
