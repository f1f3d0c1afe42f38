"""`batchllm simulate`: a provider to practise on, in Gemini's and OpenAI's wire format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from batchllm_celery.cli import exit_codes
from batchllm_celery.cli.options import F, option
from batchllm_celery.errors import UsageError
from batchllm_celery.simulation.config import SimulationConfig

DEFAULT_PORT = 8099

_HELP = {
    "port": f"Where it listens; 0 picks a free port.  [default: {DEFAULT_PORT}]",
    "latency": "Mean seconds of an answer.",
    "jitter": "Seconds by which an answer may be earlier or later.",
    "latency_tail": "0 for none, 1 for a long tail.",
    "rpm": "Requests a minute before it answers 429.",
    "tpm": "Tokens a minute, input + output.",
    "rpd": "Requests a day.",
    "error_rate": "Share of calls that fail with a 5xx.",
    "error_statuses": "Statuses of these failures, separated by commas.",
    "drop_rate": "Share of calls whose connection is cut.",
    "bad_output_rate": "Share of malformed JSON where JSON was asked for.",
    "block_rate": "Share of prompts that the safety filter blocks.",
    "window": "How limits are counted: bucket, fixed or sliding.",
    "retry_hint": "What a 429 says: retry-info, retry-after or none.",
    "rate_limit_headers": "Tell the limits in each answer's headers: openai or anthropic.",
    "other_users": "Share of each limit a minute that others take.",
    "refuse_beyond": "Calls in flight beyond which it answers 503 (--overload-status).",
    "overload_status": "503 or 529.",
    "decode_slots": "Calls that decode together, and slow each other down; others queue.",
    "decode_queue": "Calls that may queue before it answers 503.",
    "input_seconds": "Seconds that 1,000 tokens of the prompt add.",
    "burst_every": "Seconds from one burst of overload to the next.",
    "burst_share": "Share of calls refused in a burst of --burst-seconds.",
    "log_file": "One JSON line for each arrival.",
}


def _all_fields(function: F) -> F:
    """One option for each field of the configuration."""
    for name, field in reversed(SimulationConfig.model_fields.items()):
        flag: dict[str, Any] = (
            {"is_flag": True} if field.annotation is bool else {"metavar": "VALUE"}
        )
        decorate: Callable[[F], F] = option(
            f"--{name.replace('_', '-')}", name, default=None, help=_HELP.get(name), **flag
        )
        function = decorate(function)
    return function


@click.command()
@_all_fields
def simulate(**options: Any) -> int:
    """Serve a simulated provider until Ctrl-C; prints its URL.

    \b
    batchllm simulate --rpm 600 --latency 0.5 &
    export GOOGLE_GEMINI_BASE_URL=http://127.0.0.1:8099 GEMINI_API_KEY=any
    batchllm run rows.jsonl --model gemini:gemini-2.5-flash --rpm 600
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("error_statuses", "models"):
        if name in given:
            given[name] = tuple(part.strip() for part in given[name].split(","))
    if "error_statuses" in given:
        given["error_statuses"] = tuple(_status(text) for text in given["error_statuses"])
    config = SimulationConfig.model_validate({"port": DEFAULT_PORT} | given)
    from batchllm_celery.simulation.server import serve

    try:
        serve(config)
    except OSError as error:
        where = f"{config.host}:{config.port}"
        raise UsageError(
            f"can't listen on {where}: {error.strerror}; choose another --port"
        ) from None
    return exit_codes.OK


def _status(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--error-statuses: {text!r} is not an HTTP status") from None
