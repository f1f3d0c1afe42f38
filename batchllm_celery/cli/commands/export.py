"""`batchllm export`: results as a table."""

from __future__ import annotations

from typing import Any

import click

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.display.wording import plural
from batchllm_celery.cli.request import CommandRequest, columns_of
from batchllm_celery.cli.result_source import results_of
from batchllm_celery.files.tables import write_table


@click.command()
@click.argument("source", metavar="OUT|BATCH")
@options.option(
    "-o", "--out", required=True, metavar="TABLE", help="x.csv, x.parquet, x.jsonl.gz ..."
)
@options.columns
@options.connection
@options.quiet
def export(source: str, **shared: Any) -> int:
    """Write the results in OUT, or those that Redis keeps of BATCH, as CSV, Parquet or JSONL.

    The columns of the source row stand beside the output, its fields, error, tokens and cost.
    """
    request = CommandRequest(**shared)
    with results_of(source, request) as lines:
        written = write_table(lines, str(request.out), columns_of(request))
    if not request.quiet:
        click.echo(f"{plural(written, 'row')} written to {request.out}", err=True)
    return exit_codes.OK
