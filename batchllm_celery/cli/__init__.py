"""The `batchllm` command.

This module imports nothing heavy. A command's module is loaded when the command is named; celery,
redis and the providers' SDKs are loaded when it runs.
"""

from __future__ import annotations

import io
import logging
import sys
from importlib import import_module

import click

from batchllm_celery.cli.exit_codes import INTERRUPTED, USAGE

#: Command -> (module, its help), so that the help is printed without loading a module.
_COMMANDS = {
    "run": ("run", "The whole job: submit, work, follow, write the results."),
    "submit": ("submit", "Enqueue a batch to a running fleet; print its id."),
    "worker": ("worker", "Work for a fleet with one or more processes."),
    "status": ("status", "Batches, their counters and ETA, quotas, workers."),
    "results": ("results", "The results of a batch so far, or until it is over."),
    "export": ("export", "Results as CSV, Parquet or compressed JSONL."),
    "failures": ("failures", "What failed, by kind and message, with examples."),
    "report": ("report", "One HTML page about a batch: plots, failures, outputs."),
    "cancel": ("control", "End a batch; calls that have not started are not made."),
    "pause": ("control", "Start no more calls of a batch."),
    "resume": ("control", "Continue a paused or stopped batch."),
    "retry-failed": ("control", "Run the failed items of a batch again."),
    "estimate": ("estimate", "Items, tokens, cost and duration, without a call."),
    "simulate": ("simulate", "A simulated provider to practise on."),
    "demo": ("demo", "400 rows in a minute; --kill: under fire. Compares the books."),
    "doctor": ("doctor", "Check everything that a batch needs."),
    "quota": ("quota", "Show the fleet's quotas, or set one."),
    "flower": ("flower", "Watch the fleet's queue in a browser."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"batchllm_celery.cli.commands.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


_EPILOG = """\b
Try it without an API key and without cost:
  printf 'Why is the sky blue?\\n' | batchllm run - -o answers.jsonl --model simulated

Every option has an environment variable: --redis-url is BATCHLLM_REDIS_URL, and so on.
"""


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from batchllm_celery import __version__

        click.echo(f"batchllm {__version__}")
        ctx.exit()


@click.command(
    cls=_LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Print the version.",
)  # fmt: skip
def cli() -> None:
    """Send thousands of prompts to an LLM, as fast as its quota allows, each answered once."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code. An error is one line on standard error."""
    # A terminal or a file that is not UTF-8 shows an escape in place of ✓; it ends no command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # What can't be read in Redis stands in `status` and `doctor`, once and in plain words.
    logging.getLogger("batchllm_celery").addFilter(_NotBrokenEntries())
    sys.exit(_run(arguments))


class _NotBrokenEntries(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("redis.broken_entry")


def _run(arguments: list[str] | None) -> int:
    try:
        code = cli.main(arguments, prog_name="batchllm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as no_command:
        click.echo(no_command.format_message())
        return USAGE
    except click.ClickException as error:
        return _fail(f"{error.format_message()}{_see(error)}")
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return _quiet_pipe()
    except Exception as error:
        return _fail(_one_line(error))
    return code if isinstance(code, int) else 0


def _see(error: click.ClickException) -> str:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f" (see: {error.ctx.command_path} --help)"
    return ""


def _fail(message: str) -> int:
    from batchllm_celery.redaction import printable, without_secrets

    click.echo(f"Error: {printable(without_secrets(message))}", err=True)
    return USAGE


def _one_line(error: Exception) -> str:
    """The text of an error; other packages' errors also show their type."""
    from batchllm_celery.errors import BatchLLMError

    text = " ".join(str(error).split())
    if isinstance(error, BatchLLMError):
        return text
    return validation_message(error) or f"{type(error).__name__}: {text}"


def validation_message(error: Exception) -> str | None:
    """pydantic's ValidationError as one line that names the fields; None for other errors."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return None
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{place}: {text}" if place else text)
    return "; ".join(problems)


def _quiet_pipe() -> int:
    """End silently when the reader of a pipe has ended, as in `batchllm results B | head`."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
