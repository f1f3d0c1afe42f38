"""`batchllm worker`: processes of a fleet, until told to stop."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from batchllm_celery.cli import exit_codes, job, options
from batchllm_celery.cli.fleet import Fleet, environment_of
from batchllm_celery.cli.session import Interrupts
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
@options.option("--queue", metavar="LANE,...", help="Lanes to serve.  [default: default]")
@options.option("--heartbeat-file", type=click.Path(dir_okay=False),
                help="Touched while the event loop turns, for probes (process 2: FILE.2, ...); "
                     "FILE.ready while Redis answers too.")  # fmt: skip
@options.option("--drain-seconds", type=click.FloatRange(min=0),
                help="How long calls in flight may take after SIGTERM.  [default: 30]")  # fmt: skip
@options.option("--unrunnable-after", type=click.FloatRange(min=0), metavar="SECONDS",
                help="Until items that no live worker can run fail.  [default: 600]")  # fmt: skip
@options.option("--loglevel", default="INFO", show_default=True)
@options.base_url
@options.connection
def worker(processes: int, loglevel: str, **chosen: Any) -> int:
    """Work for a fleet. Plain `celery -A batchllm_celery worker` does the same, as one process.

    SIGTERM and Ctrl-C drain: calls in flight end and are recorded, nothing new starts, exit 0.
    A second one stops at once. Workers that find no Redis wait for it.
    """
    settings = _settings(chosen)
    openers(settings)  # an extra that is missing ends the command, not each worker
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


def _settings(chosen: dict[str, Any]) -> Settings:
    settings = job.settings_of(chosen)
    changes = {
        name: chosen[name] for name in ("drain_seconds", "heartbeat_file", "unrunnable_after")
    }
    named = {name: value for name, value in changes.items() if value is not None}
    if "heartbeat_file" in named:
        named["heartbeat_file"] = Path(named["heartbeat_file"])
    return settings.model_copy(update=named)


def _environment(settings: Settings, number: int) -> dict[str, str]:
    file = settings.heartbeat_file
    if file is not None and number > 1:
        settings = settings.model_copy(update={"heartbeat_file": Path(f"{file}.{number}")})
    environment = environment_of(settings)
    # A module beside the caller is found by the workers as it was found by us.
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path.cwd()), environment.get("PYTHONPATH")])
    )
    return environment


def _check_redis(settings: Settings) -> None:
    """Refuse what waiting can't cure. A Redis that is away is waited for by the workers."""
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
