"""`batchllm failures`: what failed, by kind and message."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from rich.text import Text

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.display.console import print_json, to_stdout
from batchllm_celery.cli.display.wording import count, plural
from batchllm_celery.cli.request import CommandRequest
from batchllm_celery.cli.result_source import results_of
from batchllm_celery.files.failures import group_failures


@click.command()
@click.argument("source", metavar="OUT|BATCH")
@options.as_json
@options.connection
def failures(source: str, **shared: Any) -> int:
    """Group the failures in OUT, or of BATCH, by kind and message: counts and three examples."""
    request = CommandRequest(**shared)
    with results_of(source, request) as lines:
        total, groups = group_failures(lines())
    failed = sum(group.count for group in groups)
    if request.as_json:
        print_json({"total": total, "failed": failed, "groups": [asdict(one) for one in groups]})
        return exit_codes.OK
    console = to_stdout()
    text = Text.assemble((f"{count(failed)} of {plural(total, 'result')} failed\n", "bold"))
    for group in groups:
        text.append(f"{count(group.count):>7} ", style="bold").append(group.kind, style="red")
        text.append(f"  {group.message[:300]}\n")
        more = " ..." if group.count > len(group.examples) else ""
        text.append(f"        e.g. {', '.join(group.examples)}{more}\n", style="dim")
    console.print(text, end="", soft_wrap=True, highlight=False)
    return exit_codes.OK
