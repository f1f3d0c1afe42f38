"""`batchllm doctor`: checks everything that a batch needs."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from importlib import metadata, util
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.text import Text

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.display.console import print_json, to_stdout
from batchllm_celery.cli.request import PROVIDER_KEYS, CommandRequest, import_apps, settings_of
from batchllm_celery.errors import BatchLLMError
from batchllm_celery.keys import Keys
from batchllm_celery.settings import Settings

if TYPE_CHECKING:
    from batchllm_celery.connection import BrokenEntry
    from batchllm_celery.producer import Producer

Verdict = Literal["ok", "note", "bad"]
_MARKS = {"ok": ("✓", "green"), "note": ("-", "yellow"), "bad": ("✗", "red")}
_EXTRAS = {
    "openai": "openai",
    "pydantic-ai": "pydantic_ai",
    "parquet": "pyarrow",
    "otel": "opentelemetry",
    "prometheus": "prometheus_client",
    "uvloop": "uvloop",
}
OLDEST_REDIS = (6, 2)
_PACKAGES = ("celery", "kombu", "redis", "google-genai", "pydantic")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, and what to do if it failed."""

    name: str
    verdict: Verdict
    text: str


@click.command()
@options.option("--app", metavar="MODULE", help="Module(s) that register strategies.")
@options.as_json
@options.connection
def doctor(**shared: Any) -> int:
    """Check versions, Redis and its settings, workers, and whether API keys are set.

    Keys are never printed. Exit code: 0, or 2 if a check failed.
    """
    request = CommandRequest(**shared)
    settings = settings_of(request)
    findings = [*_versions(), *_extras(), *_keys(), *_apps(settings), *_redis(settings)]
    if request.as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        _show(to_stdout(), findings)
    bad = any(finding.verdict == "bad" for finding in findings)
    return exit_codes.USAGE if bad else exit_codes.OK


def _show(console: Console, findings: list[Finding]) -> None:
    for finding in findings:
        mark, colour = _MARKS[finding.verdict]
        line = Text(f"{mark} ", style=colour)
        line.append(f"{finding.name:<16}", style="bold").append(finding.text, style="default")
        console.print(line, soft_wrap=True, highlight=False)


def _versions() -> Iterator[Finding]:
    from batchllm_celery import __version__

    yield Finding("batchllm-celery", "ok", f"{__version__} on Python {platform.python_version()}")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    yield Finding("packages", "ok", versions)


def _extras() -> Iterator[Finding]:
    there = [extra for extra, module in _EXTRAS.items() if util.find_spec(module) is not None]
    missing = [extra for extra in _EXTRAS if extra not in there]
    text = f"installed: {', '.join(there) or 'none'}"
    if missing:
        text += f"; not installed: {', '.join(missing)} (pip install 'batchllm-celery[NAME]')"
    yield Finding("extras", "note" if missing else "ok", text)


def _keys() -> Iterator[Finding]:
    for provider, names in PROVIDER_KEYS.items():
        if not names:
            continue
        found = next((name for name in names if os.environ.get(name)), None)
        text = f"{found} is set" if found else f"no key: set {names[0]} to use {provider}"
        yield Finding(f"{provider} key", "ok" if found else "note", text)


def _apps(settings: Settings) -> Iterator[Finding]:
    if not settings.app:
        return
    try:
        import_apps(settings)
    except BatchLLMError as error:
        yield Finding("app", "bad", str(error))
        return
    from batchllm_celery.strategies import catalog

    yield Finding("app", "ok", f"{settings.app}; strategies: {', '.join(sorted(catalog))}")


def _redis(settings: Settings) -> Iterator[Finding]:
    from batchllm_celery.producer import Producer

    try:
        with Producer(settings) as producer:
            producer.check()
            yield from _server(producer, settings)
            yield _workers(producer)
            yield from _broken(producer)
    except BatchLLMError as error:
        yield Finding("redis", "bad", str(error))


def _server(producer: Producer, settings: Settings) -> Iterator[Finding]:
    import redis

    from batchllm_celery.connection import client_url, safe_url

    place = safe_url(producer.url) if settings.redis_url else f"embedded in {settings.state_dir}"
    with redis.Redis.from_url(
        client_url(producer.url), decode_responses=True, socket_timeout=3.0
    ) as client:
        try:
            info: dict[str, Any] = client.info()
        except redis.exceptions.NoPermissionError:
            yield Finding("redis", "ok", place)
            yield Finding(
                "server", "note",
                "it denies INFO: version, memory, persistence and eviction can't be checked, and a "
                "restart is noticed late (give the user the right +info)",
            )  # fmt: skip
            return
    kind = "Valkey" if info.get("server_name") == "valkey" else "Redis"
    version = info.get("valkey_version") or info.get("redis_version")
    yield Finding("redis", "ok", f"{kind} {version}, {place}")
    yield from check_server(info)


def check_server(info: dict[str, Any]) -> Iterator[Finding]:
    """Check the server's version, and settings that lose data, in the reply of `INFO`."""
    version = str(info.get("redis_version", "0.0"))  # of Valkey: the Redis that it speaks like
    yield _either(
        "server", tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_REDIS,
        f"speaks Redis {version}", f"Redis {version}: 6.2 or newer is needed (or any Valkey)",
    )  # fmt: skip
    policy = info.get("maxmemory_policy", "unknown")
    yield _either(
        "eviction", policy == "noeviction", policy,
        f"maxmemory-policy is {policy}: set noeviction, or batches lose items when memory is full",
    )  # fmt: skip
    yield _either(
        "persistence", bool(info.get("aof_enabled")), "append-only file",
        "no append-only file: a restart of Redis loses batches (appendonly yes)",
    )  # fmt: skip
    limit, used = int(info.get("maxmemory") or 0), int(info.get("used_memory") or 0)
    share = used / limit if limit else 0.0
    words = f"{used / 2**20:,.0f} MiB" + (f" of {limit / 2**20:,.0f}" if limit else "")
    yield _either("memory", share < 0.8, words, f"{words}: nearly full")
    yield _either(
        "role",
        info.get("role", "master") == "master",
        "primary",
        "a replica: give the primary's URL",
    )


def _either(name: str, holds: bool, good: str, bad: str) -> Finding:
    return Finding(name, "ok" if holds else "bad", good if holds else bad)


def _workers(producer: Producer) -> Finding:
    workers = producer.workers()
    if not workers:
        return Finding(
            "workers", "note", "none is running (run starts its own; else: batchllm worker)"
        )
    slots = sum(worker.slots for worker in workers)
    return Finding("workers", "ok", f"{len(workers)} with {slots:,} slots in all")


def _broken(producer: Producer) -> Iterator[Finding]:
    """Entries that can't be read, and the commands that remove them."""
    producer.batches()
    producer.quotas()
    for entry in producer.broken():
        name = f"{entry.kind} {entry.name}"
        how = " && ".join(
            " ".join(map(_quoted, ["redis-cli", *_server_options(producer.url), *command]))
            for command in _removal(entry, Keys(producer.settings.namespace))
        )
        yield Finding("broken entry", "bad", f"{name}: {entry.reason}; to remove it: {how}")


def _server_options(url: str) -> list[str]:
    from batchllm_celery.connection import safe_url

    scheme, _, rest = url.partition("://")
    return ["-s", rest.partition("?")[0]] if scheme == "unix" else ["-u", safe_url(url)]


def _quoted(word: str) -> str:
    """A word quoted for a shell; bytes that are not UTF-8 as escapes of bash and zsh."""
    return f"$'{word}'" if "\\x" in word else shlex.quote(word)


def _removal(entry: BrokenEntry, keys: Keys) -> list[list[str]]:
    """The Redis commands that remove an entry, and what names it."""
    if entry.kind == "batch":
        return [
            ["UNLINK", *astuple(keys.batch(entry.name))],
            ["ZREM", keys.batches, entry.name],
        ]
    if entry.kind == "quota":
        return [["UNLINK", *astuple(keys.quota(entry.name))], ["ZREM", keys.quotas, entry.name]]
    if entry.kind == "worker":
        return [["UNLINK", keys.worker(entry.name)], ["ZREM", keys.workers, entry.name]]
    return [["UNLINK", entry.name]]
