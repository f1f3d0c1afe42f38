"""`batchllm quota show | set`: the limits that a fleet shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.display.console import print_json, to_stdout
from batchllm_celery.cli.display.quota_view import limits_words, quota_table
from batchllm_celery.cli.request import CommandRequest, limits_of, policy_of, settings_of
from batchllm_celery.errors import UsageError
from batchllm_celery.models import Quota, QuotaLimits

if TYPE_CHECKING:
    from batchllm_celery.limiter import QuotaState


@click.group(invoke_without_command=True)
@click.pass_context
def quota(ctx: click.Context) -> int | None:
    """Show the fleet's quotas, or set one."""
    if ctx.invoked_subcommand is None:
        return int(ctx.invoke(show, as_json=False) or 0)
    return None


@quota.command()
@click.argument("name", required=False)
@options.as_json
@options.connection
def show(name: str | None = None, **shared: Any) -> int:
    """Show all quotas, or only NAME: its limits, use and cooldown."""
    from batchllm_celery.producer import Producer

    request = CommandRequest(**shared)
    with Producer(settings_of(request)) as producer:
        producer.check()
        if name is None:
            states = producer.quotas()
        elif (state := producer.quota(name)) is not None:
            states = [state]
        else:
            raise UsageError(f"no quota {name!r} is known; see: batchllm quota show")
    if request.as_json:
        print_json({"quotas": [state.model_dump(mode="json") for state in states]})
    elif states:
        to_stdout().print(quota_table(states))
    else:
        click.echo("No quota yet; set one: batchllm quota set gemini:gemini-2.5-flash --rpm 600")
    return exit_codes.OK


@quota.command("set")
@click.argument("name")
@options.limits
@options.adaptive_concurrency
@options.after_429
@options.option("--day-exhausted", type=click.Choice(["park", "fail"]),
                help="Wait for the day's reset, or fail the items.")  # fmt: skip
@options.connection
def set_(name: str, day_exhausted: str | None, **shared: Any) -> int:
    """Set limits of NAME, also for running batches; limits that are not given stay."""
    from batchllm_celery.producer import Producer

    request = CommandRequest(**shared)
    given = limits_of(request).given() or request.after_429 or day_exhausted
    if not given and request.adaptive_concurrency is None:
        raise UsageError("say what to set, as in: batchllm quota set NAME --rpm 600")
    with Producer(settings_of(request)) as producer:
        producer.check()
        known = producer.quota(name)
        changed = producer.set_quota(_changed(name, known, request, day_exhausted), update=True)
    click.echo(f"{changed.name}: {limits_words(changed.limits)}", err=True)
    return exit_codes.OK


def _changed(
    name: str, known: QuotaState | None, request: CommandRequest, day_exhausted: str | None
) -> Quota:
    before = known.limits.given() if known is not None else {}
    policy = known.policy if known is not None else policy_of(None)
    extra: dict[str, Any] = {"day_exhausted": day_exhausted} if day_exhausted else {}
    adaptive = request.adaptive_concurrency
    if adaptive is None:
        adaptive = known is not None and known.adaptive_concurrency
    return Quota(
        name=name,
        limits=QuotaLimits.model_validate(before | limits_of(request).given()),
        policy=policy_of(request.after_429) if request.after_429 else policy,
        adaptive_concurrency=adaptive,
        **extra,
    )
