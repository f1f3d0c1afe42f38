"""The listeners that a process' environment switches on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from batchllm_celery.errors import UsageError
from batchllm_celery.events import Listener
from batchllm_celery.settings import Settings

Opener = Callable[[], Listener]


def openers(settings: Settings) -> list[Opener]:
    """What opens each listener that is switched on; nothing is opened yet, so call it before a
    fork and the openers after it.

    Raises:
        UsageError: naming the extra that is not installed.
    """
    found: list[Opener] = []
    if settings.prometheus_port is not None:
        try:
            from batchllm_celery.observability import prometheus
        except ImportError as error:
            raise _missing("BATCHLLM_PROMETHEUS_PORT", "prometheus", error) from error
        found.append(partial(prometheus.serve, settings.prometheus_port))
    if settings.otel:
        try:
            from batchllm_celery.observability import otel
        except ImportError as error:
            raise _missing("BATCHLLM_OTEL", "otel", error) from error
        found.append(otel.open_listener)
    return found


def _missing(variable: str, extra: str, error: ImportError) -> UsageError:
    return UsageError(
        f"{variable} is set, but {error.name or extra} can't be imported: "
        f"pip install 'batchllm-celery[{extra}]', or unset it"
    )
