"""`batchllm flower`: runs Flower on the fleet's broker, reachable from this machine."""

from __future__ import annotations

import os
import re
import secrets
import sys
from typing import Any

import click

from batchllm_celery.cli import options
from batchllm_celery.cli.processes import environment_of
from batchllm_celery.cli.request import CommandRequest, settings_of
from batchllm_celery.errors import UsageError

#: Columns of the list of tasks; Flower's default has no arguments and no result.
COLUMNS = "uuid,name,args,state,received,runtime,worker,result,exception"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@click.command()
@options.option("--port", type=click.IntRange(1, 65535), default=5555, show_default=True,
                envvar="BATCHLLM_FLOWER_PORT")  # fmt: skip
@options.option("--address", default="127.0.0.1", show_default=True,
                envvar="BATCHLLM_FLOWER_ADDRESS",
                help="An address other than loopback needs --basic-auth.")  # fmt: skip
@options.option("--basic-auth", metavar="USER:PASSWORD", envvar="BATCHLLM_FLOWER_BASIC_AUTH",
                help="Default: user batchllm, a random password that is printed.")  # fmt: skip
@options.connection
def flower(port: int, address: str, basic_auth: str | None, **shared: Any) -> int:
    """Watch the fleet's queue in a browser. It shows no prompts and no answers.

    Flower's /metrics and /healthcheck are open to everybody who can reach the port: keep it on
    loopback, or behind a proxy.
    """
    if address not in _LOOPBACK and basic_auth is None:
        raise UsageError(f"--address {address} is not loopback: choose --basic-auth USER:PASSWORD")
    if basic_auth is not None:
        _check_basic_auth(basic_auth)
    settings = settings_of(CommandRequest(**shared))
    from batchllm_celery.producer import Producer

    with Producer(settings) as producer:
        producer.check()
    if basic_auth is None:
        basic_auth = f"batchllm:{secrets.token_urlsafe(12)}"
        click.echo(
            f"Flower on http://{address}:{port}  user batchllm  password {basic_auth[9:]}", err=True
        )
    # In the environment, because all users of this machine can read arguments.
    environment = {"FLOWER_TASKS_COLUMNS": COLUMNS} | environment_of(settings)
    environment["FLOWER_BASIC_AUTH"] = basic_auth
    arguments = ["-A", "batchllm_celery", "flower", f"--address={address}", f"--port={port}"]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "celery", *arguments], environment)


def _check_basic_auth(basic_auth: str) -> None:
    """Refuse what Flower can't read: a comma separates users, and only ASCII works."""
    if not re.fullmatch(r"[!-~]+:[!-~]+", basic_auth) or "," in basic_auth:
        raise UsageError(
            "--basic-auth must be USER:PASSWORD of printable ASCII characters without a comma "
            "or a space"
        )
