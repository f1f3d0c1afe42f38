"""`batchllm worker`: worker processes of a fleet, until a signal stops them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.processes import Fleet, environment_of
from batchllm_celery.cli.request import CommandRequest, settings_of
from batchllm_celery.cli.signals import Interrupts
from batchllm_celery.errors import RedisUnavailableError
from batchllm_celery.observability.switched_on import openers
from batchllm_celery.settings import Settings


@click.command()
@options.option("--processes", type=click.IntRange(min=1), default=1, show_default=True,
                help="Worker processes on this machine.")  # fmt: skip
@options.option(
    "--slots", type=click.IntRange(min=1), help="Items in flight per process.  [default: 100]"
)
@options.option("--app", metavar="MODULE", help="Module(s) that register strategies.")
@options.option("--queue", metavar="NAME,...", help="Queues to serve.  [default: default]")
@options.option("--heartbeat-file", type=click.Path(dir_okay=False),
                help="Touched while the event loop runs, for probes (process 2: FILE.2, ...); "
                     "FILE.ready is touched while Redis answers too.")  # fmt: skip
@options.option("--drain-seconds", type=options.Number(min=0),
                help="Seconds for calls in flight after SIGTERM.  [default: 30]")  # fmt: skip
@options.option("--unrunnable-after", type=options.Number(min=0), metavar="SECONDS",
                help="Until what no live worker can run fails.  [default: 600]")  # fmt: skip
@options.option("--loglevel", default="INFO", show_default=True,
                type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
                                  case_sensitive=False))  # fmt: skip
@options.base_url
@options.connection
def worker(
    processes: int,
    heartbeat_file: str | None,
    drain_seconds: float | None,
    unrunnable_after: float | None,
    loglevel: str,
    **shared: Any,
) -> int:
    """Work for a fleet. Plain `celery -A batchllm_celery worker` does the same with one process.

    SIGTERM and Ctrl-C drain: calls in flight end and are recorded, no new call starts, exit code 0.
    A second signal stops at once. Workers wait for a Redis that can't be reached.
    """
    own = {
        "drain_seconds": drain_seconds,
        "unrunnable_after": unrunnable_after,
        "heartbeat_file": None if heartbeat_file is None else Path(heartbeat_file),
    }
    settings = settings_of(CommandRequest(**shared)).model_copy(
        update={name: value for name, value in own.items() if value is not None}
    )
    openers(settings)  # a missing extra is one error here, instead of one of each worker
    _check_redis(settings)
    fleet = Fleet(processes, lambda number: _environment(settings, number), loglevel=loglevel)
    with Interrupts().counted() as interrupts:
        try:
            fleet.start()
            while not interrupts.count:
                fleet.poll()
                time.sleep(0.2)
            return _drain(fleet, interrupts, settings.drain_seconds)
        finally:
            fleet.kill()


def _environment(settings: Settings, number: int) -> dict[str, str]:
    file = settings.heartbeat_file
    if file is not None and number > 1:
        settings = settings.model_copy(update={"heartbeat_file": Path(f"{file}.{number}")})
    environment = environment_of(settings)
    # Workers find modules in the current folder, as this process does.
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path.cwd()), environment.get("PYTHONPATH")])
    )
    return environment


def _check_redis(settings: Settings) -> None:
    """Raise errors that waiting can't cure. The workers wait for a Redis that can't be reached."""
    from batchllm_celery.producer import Producer
    from batchllm_celery.worker.startup import can_pass, error_of

    try:
        with Producer(settings) as producer:
            producer.check()
    except RedisUnavailableError:
        if settings.redis_url is None or not can_pass(error_of(settings.redis_url)):
            raise


def _drain(fleet: Fleet, interrupts: Interrupts, seconds: float) -> int:
    fleet.drain()
    until = time.monotonic() + seconds + 10.0
    while not fleet.ended() and interrupts.count < 2 and time.monotonic() < until:
        time.sleep(0.1)
    return exit_codes.OK if fleet.ended() else exit_codes.INTERRUPTED
