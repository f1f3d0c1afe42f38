"""`batchllm submit`: enqueue to a fleet that is there."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

import click

from batchllm_celery.cli import exit_codes, job, options
from batchllm_celery.cli.console import log_to, say, to_stderr
from batchllm_celery.cli.run import open_rows, resume_command
from batchllm_celery.cli.session import Interrupts, Job
from batchllm_celery.cli.wording import plural
from batchllm_celery.errors import UsageError
from batchllm_celery.models import BatchSpec, Quota
from batchllm_celery.settings import Settings


@click.command()
@click.argument("source", metavar="INPUT")
@options.model
@options.rows
@options.quota
@options.batch
@options.bounds
@options.connection
@options.quiet
@options.verbose
def submit(source: str, **chosen: Any) -> int:
    """Enqueue every row of INPUT for the workers of a fleet; print the batch's id.

    The id is printed as soon as the batch is known to Redis, so that `batchllm results ID --follow`
    can start while rows are still being read. Exit code: 0 enqueued, 2 not.
    """
    console = to_stderr()
    log_to(console, verbose=chosen["verbose"])
    with contextlib.ExitStack() as stack, Interrupts().counted() as interrupts:
        settings = job.settings_of(chosen)
        strategy = job.strategy_of(chosen)
        rows = open_rows(source, chosen, strategy, stack)
        instance = None
        if chosen["model"] or settings.app:
            instance = job.check_strategy(strategy, settings)
        spec = job.spec_of(chosen, strategy, source=source, queue="default", keep_results=True)
        if instance is not None:
            job.check_price(spec, instance, settings)
        quota = job.quota_of(chosen, job.default_quota_name(strategy))
        total = _submit(settings, spec, quota, chosen, rows, interrupts, stack)
    if total is None:
        command = resume_command(spec.batch_id, sys.argv[1:])
        say(f"Interrupted before all rows were enqueued. Go on with: {command}")
        return exit_codes.INTERRUPTED
    if not chosen["quiet"]:
        bad = f" ({plural(rows.bad, 'bad row')})" if rows.bad else ""
        click.echo(f"{plural(total, 'item')} enqueued{bad}", err=True)
    return exit_codes.OK


def _submit(
    settings: Settings,
    spec: BatchSpec,
    quota: Quota | None,
    chosen: dict[str, Any],
    rows: Any,
    interrupts: Interrupts,
    stack: contextlib.ExitStack,
) -> int | None:
    from batchllm_celery.producer import Producer

    producer = stack.enter_context(Producer(settings))
    producer.check()
    producer.check_runnable(spec)
    batch = producer.open(spec, quota=quota, quota_update=chosen["quota_update"])
    click.echo(batch.id)
    sys.stdout.flush()
    if not chosen["quiet"] and not producer.workers():
        click.echo("No worker is running yet; start some: batchllm worker", err=True)
    stop, totals = threading.Event(), []
    feeder = Job("feeder", lambda: totals.append(batch.feed(rows, stop=stop)))
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
