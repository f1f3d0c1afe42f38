"""What a process is told by its environment: one `BATCHLLM_...` variable for each field."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from batchllm_celery.errors import UsageError
from batchllm_celery.models.base import MOST, MOST_SECONDS
from batchllm_celery.models.names import check_namespace, check_queue
from batchllm_celery.redaction import keep_secrets_in


def _default_state_dir() -> Path:
    # `~` stays as it is: who has a Redis elsewhere needs no home, which some containers lack.
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "batchllm"


def absolute(state_dir: Path) -> Path:
    """The folder that `state_dir` means.

    Raises:
        UsageError: it begins with `~`, and no home is known.
    """
    try:
        return state_dir.expanduser().absolute()
    except RuntimeError:
        raise UsageError(
            "no home folder is known: set HOME, or give --state-dir (BATCHLLM_STATE_DIR)"
        ) from None


def _is_server(url: str) -> bool:
    """Whether an HTTP client can call it; the SDKs refuse a login in it beside their own header."""
    try:
        parts = urlsplit(url)
        port_can_be = parts.port != 0
    except ValueError:
        return False
    if "@" in parts.netloc or any(mark.isspace() for mark in url):
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port_can_be


class Settings(BaseSettings):
    """Settings of a process; arguments override the environment.

    Args:
        redis_url: `redis://`, `rediss://` or `unix://`; None: the embedded Valkey.
        state_dir: where the embedded Valkey keeps its data.
        namespace: prefix of all keys and queues of a fleet.
        app: module(s) to import for their registered strategies, separated by commas.
        queue: the queues that a worker serves, separated by commas.
        slots: items in flight in one worker process.
        lease_seconds: how long a process may be silent before its items are taken over.
        heartbeat_seconds: how often a process says that it lives and reads its batches' states.
        offer_seconds: idle time after which free slots look for items that no message brought.
        max_deliveries: deaths of its worker in mid-call after which an item is quarantined.
        unrunnable_after: seconds until items that no live worker can run fail (`unrunnable`);
            0: they fail at once, with what is wrong.
        max_outstanding: items that a producer keeps unfinished or unread at most.
        max_payload_bytes: bytes of payloads and unread results in Redis at most, per batch.
        result_ttl_seconds: how long a finished batch stays readable.
        item_ttl_seconds: how long the outcome of a single item (`summarise.delay`, `producer.ask`)
            stays in the ledger, once all of its standing batch have theirs.
        drain_seconds: how long a worker waits for its calls in flight when it is told to stop.
        heartbeat_file: touched while the event loop turns (for probes), and beside it FILE.ready
            while Redis answers too; None for none.
        openai_base_url: an OpenAI-compatible server; only ever from this process' own settings.
        simulated_url: the simulated provider that `simulated` strategies call.
        prices_file: JSON of user prices that override genai-prices.
        prometheus_port: each worker process serves /metrics at the first free port from here on;
            None: no metrics. Needs the extra `prometheus`.
        otel: send spans and metrics to an OpenTelemetry collector, as `OTEL_...` variables say.
            Needs the extra `otel`.
    """

    model_config = SettingsConfigDict(
        env_prefix="BATCHLLM_",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # a URL holds a password
    )

    redis_url: str | None = None
    state_dir: Path = Field(default_factory=_default_state_dir)
    namespace: str = "batchllm"
    app: str | None = None
    queue: str = "default"
    slots: int = Field(default=100, ge=1, le=100_000)
    lease_seconds: float = Field(default=30.0, gt=0)
    heartbeat_seconds: float = Field(default=1.0, gt=0)
    offer_seconds: float = Field(default=3.0, gt=0)
    max_deliveries: int = Field(default=5, ge=1, le=MOST)
    unrunnable_after: float = Field(default=600.0, ge=0, le=MOST_SECONDS)
    max_outstanding: int = Field(default=20_000, ge=1)
    max_payload_bytes: int = Field(default=512 * 1024 * 1024, ge=1024 * 1024, le=MOST)
    result_ttl_seconds: int = Field(default=7 * 24 * 3600, ge=60, le=MOST_SECONDS)
    item_ttl_seconds: int = Field(default=3600, ge=60, le=MOST_SECONDS)
    drain_seconds: float = Field(default=30.0, ge=0)
    heartbeat_file: Path | None = None
    openai_base_url: str | None = None
    simulated_url: str | None = None
    prices_file: Path | None = None
    prometheus_port: int | None = Field(default=None, ge=1, le=65_535)
    otel: bool = False

    @field_validator("namespace")
    @classmethod
    def _check_namespace(cls, namespace: str) -> str:
        return check_namespace(namespace)

    @field_validator("queue")
    @classmethod
    def _check_queue(cls, queue: str) -> str:
        for name in queue.split(","):
            if name.strip():
                check_queue(name.strip())
        return queue

    @field_validator("redis_url", "app", "openai_base_url", "simulated_url", mode="before")
    @classmethod
    def _empty_is_absent(cls, value: str | None) -> str | None:
        return value or None

    @field_validator("openai_base_url", "simulated_url")
    @classmethod
    def _check_server(cls, url: str | None) -> str | None:
        if url is not None and not _is_server(url):
            raise ValueError(
                "must read http://HOST or https://HOST (with a port and a path, as it needs), and "
                "hold no user and no password: a key goes in its variable"
            )
        return url

    @field_validator("redis_url", "openai_base_url", "simulated_url")
    @classmethod
    def _keep_secrets(cls, url: str | None) -> str | None:
        keep_secrets_in(url)
        return url

    @property
    def queues(self) -> list[str]:
        return [name.strip() for name in self.queue.split(",") if name.strip()]
