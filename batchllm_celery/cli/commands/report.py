"""`batchllm report`: a batch on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.request import CommandRequest
from batchllm_celery.cli.result_source import results_of
from batchllm_celery.errors import UsageError


@click.command()
@click.argument("source", metavar="OUT|BATCH")
@options.option("-o", "--out", metavar="HTML", help="The page.  [default: OUT.report.html]")
@options.connection
@options.quiet
def report(source: str, **shared: Any) -> int:
    """Write one self-contained HTML page about the results in OUT, or of BATCH.

    Plots of time, tokens and cost, failures with examples, the fields of structured outputs. Needs
    the extra: pip install 'batchllm-celery[report]'.
    """
    from batchllm_celery.files.report import write_report

    request = CommandRequest(**shared)
    out = request.out or f"{source}.report.html"
    with results_of(source, request) as lines:
        page = write_report(lines(), source)
    try:
        Path(out).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out} can't be written: {error.strerror}") from None
    if not request.quiet:
        click.echo(f"Report written to {out}", err=True)
    return exit_codes.OK
