"""Events as Prometheus metrics (extra `prometheus`)."""

from __future__ import annotations

import errno
import functools
import logging
import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, make_wsgi_app

from batchllm_celery import events
from batchllm_celery.errors import UsageError
from batchllm_celery.events import Event

logger = logging.getLogger("batchllm_celery")

#: So many ports are tried, the first one included: one for each process of a machine.
PORTS = 100

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class PrometheusListener:
    """Counts events in a Prometheus registry; `serve` offers the client's own at a port.

    Args:
        registry: where the metrics are registered; default the client's own.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._items = Counter(
            "batchllm_items", "Items with an outcome.", ["outcome", "kind"], registry=registry
        )
        self._seconds = Histogram(
            "batchllm_item_seconds", "Submission to outcome.", buckets=_SECONDS, registry=registry
        )
        self._tokens = Counter(
            "batchllm_tokens", "Tokens by direction.", ["direction"], registry=registry
        )
        self._cost = Counter("batchllm_cost_dollars", "Cost of all calls.", registry=registry)
        self._attempts = Counter(
            "batchllm_attempt_failures", "Failed attempts.", ["kind"], registry=registry
        )
        self._refusals = Counter(
            "batchllm_rate_limits", "Calls refused by the provider.", ["quota"], registry=registry
        )
        self._cooldown = Counter(
            "batchllm_cooldown_seconds", "Time in cooldown.", ["quota"], registry=registry
        )
        self._lost = Counter("batchllm_redis_losses", "Times Redis was away.", registry=registry)
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            events.ItemFinished: self._item_finished,
            events.AttemptFailed: lambda e: self._attempts.labels(e.kind.value).inc(),
            events.RateLimitHit: lambda e: self._refusals.labels(e.quota).inc(),
            events.CooldownEnded: lambda e: self._cooldown.labels(e.quota).inc(e.seconds),
            events.ConnectionLost: lambda e: self._lost.inc(),
        }

    def __call__(self, event: Event) -> None:
        """Count `event`."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    def _item_finished(self, event: events.ItemFinished) -> None:
        kind = "" if event.kind is None else event.kind.value
        self._items.labels("succeeded" if event.success else "failed", kind).inc()
        self._seconds.observe(event.seconds)
        self._tokens.labels("input").inc(event.input_tokens)
        self._tokens.labels("output").inc(event.output_tokens)
        self._tokens.labels("cached_input").inc(event.cached_input_tokens)
        if event.cost:
            self._cost.inc(event.cost)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # Python may share a port among processes by default: each scrape would meet another one.
    allow_reuse_port = False


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@functools.cache
def _listener() -> PrometheusListener:
    """The one of the client's own registry, which takes each metric once."""
    return PrometheusListener()


def serve(port: int) -> PrometheusListener:
    """Serve /metrics at the first free port from `port` on, on all addresses; log which it is.

    Each process has a port of its own, so that its counters are whole at every scrape.

    Returns:
        The listener that counts.

    Raises:
        UsageError: none of `PORTS` ports is free.
    """
    last = min(port + PORTS, 65_536)
    for number in range(port, last):
        try:
            server = make_server("", number, make_wsgi_app(), _Server, handler_class=_Quiet)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UsageError(f"BATCHLLM_PROMETHEUS_PORT={port}: {error.strerror}") from error
            continue
        threading.Thread(target=server.serve_forever, name="batchllm-metrics", daemon=True).start()
        logger.info("metrics.listening port=%d", number)
        return _listener()
    raise UsageError(f"BATCHLLM_PROMETHEUS_PORT={port}: no port up to {last - 1} is free")
