"""A Gemini context cache that the whole fleet shares.

Each process keeps the cache's name and end in `_cache`, and the fleet keeps them in one hash in
Redis. A process that finds no usable cache takes the fleet's lock and reads the hash again. Only
then does it renew, find or create one, so that a fleet creates a cache once.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import logging
import time
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pydantic import BaseModel

from batchllm_celery.connection import Connection
from batchllm_celery.errors import ProviderError, UsageError, describe
from batchllm_celery.models import Request, TOutput
from batchllm_celery.providers.answers import Reply
from batchllm_celery.providers.gemini import client as gemini_client
from batchllm_celery.providers.gemini.strategy import GeminiStrategy
from batchllm_celery.providers.strategy import Asked
from batchllm_celery.strategies.base import Opened
from batchllm_celery.strategies.structured import Schema

logger = logging.getLogger("batchllm_celery")

#: A cached content has no metadata field: what must be known of it travels in its display name.
DISPLAY_NAME_LIMIT = 128
_PREFIX = "batchllm:"

#: Seconds after which the lock of a process that died while creating a cache is free again.
LOCK_LEASE = 60.0
#: Seconds between two attempts to renew after a failed one.
RENEWAL_PAUSE = 10.0


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A cache at the provider: its resource name and when it ends (unix seconds)."""

    name: str
    expires_at: float


def _over(cache: CacheEntry, asked: Asked) -> Asked:
    """The request over what the cache holds."""
    return replace(asked, body={**asked.body, "cachedContent": cache.name})


class GeminiCachedStrategy(GeminiStrategy[TOutput]):
    """Gemini with a context cache: what all prompts have in common is sent once, and billed at a
    tenth afterwards.

    **CRITICAL FOR COST OPTIMIZATION:** create ONE instance and reuse it for all work items. They
    then share one cache, which saves 70-90 % against sending the context with every item. (Here
    the cache is found again even by another instance, another process and a later run, as long as
    model, content and tags are the same; building an instance per item still costs time.)

    Example (CORRECT usage):
        >>> strategy = GeminiCachedStrategy(  # ONE instance
        ...     model="gemini-2.0-flash",
        ...     client=client,
        ...     response_parser=lambda r: str(r.text),
        ...     cached_content=[system_instruction, context_docs],
        ... )
        >>> for doc in documents:
        ...     item = LLMWorkItem(item_id=doc.id, strategy=strategy, prompt=doc.question)  # REUSE
        ...     await processor.add_work(item)

    WRONG usage (a new strategy for every item):
        >>> for doc in documents:
        ...     strategy = GeminiCachedStrategy(...)               # NEW instance: expensive!
        ...     await processor.add_work(LLMWorkItem(item_id=doc.id, strategy=strategy, ...))

    Cost comparison (100 items over one long context; `batchllm estimate` computes yours):
        - wrong: $10.00 (100 x $0.10, every item pays for the context)
        - right: $3.00 (100 x $0.03 with the context cached): saves $7.00, 70 %

    Args:
        model, client, response_parser, config, include_metadata: as for `GeminiStrategy`.
        cached_content: text, or a list of texts and SDK contents, that all prompts share.
        cache_ttl_seconds: how long the provider keeps the cache after its last renewal.
        cache_refresh_threshold: batch-llm's, without effect: see `cache_renewal_buffer_seconds`.
        cache_renewal_buffer_seconds: the cache is renewed this long before it ends.
        auto_renew: False lets it end; when the provider reports it gone, another one is created.
        cache_tags: an existing cache is reused only if it has all of these, equal in case and
            type; no tags match any cache of the same model and content.
        system: system instruction; part of the cache.
        schema, temperature, max_output_tokens, thinking_budget: as for `GeminiStrategy`.

    Raises:
        ValueError: for a renewal buffer that is not less than the TTL, or tags that don't fit.
    """

    # A native body is sent as it is: it names its own cached content.
    accepts = (str, Request)

    def __init__(
        self,
        model: str,
        client: Any = None,
        response_parser: Callable[[Any], TOutput] | None = None,
        cached_content: Any = (),
        cache_ttl_seconds: float = 3600,
        cache_refresh_threshold: float = 0.1,
        cache_renewal_buffer_seconds: float = 300,
        auto_renew: bool = True,
        config: Any = None,
        include_metadata: bool = False,
        cache_tags: Mapping[str, Any] | None = None,
        *,
        system: str | None = None,
        schema: Schema[TOutput] | None = None,
        temperature: float | None = None,
        max_output_tokens: int | None = None,
        thinking_budget: int | None = None,
    ) -> None:
        _check_times(cache_ttl_seconds, cache_renewal_buffer_seconds)
        super().__init__(
            model,
            client,
            response_parser,
            config,
            include_metadata,
            schema=schema,
            temperature=temperature,
            max_output_tokens=max_output_tokens,
            thinking_budget=thinking_budget,
        )
        self.cached_content: list[Any] = _as_list(cached_content)
        self.cached_system = system
        self.cache_ttl_seconds = cache_ttl_seconds
        self.cache_refresh_threshold = cache_refresh_threshold
        self.cache_renewal_buffer_seconds = cache_renewal_buffer_seconds
        self.auto_renew = auto_renew
        self.cache_tags: dict[str, Any] = dict(cache_tags or {})
        self.fingerprint = fingerprint_of([system, self.cached_content])
        self.display_name = display_name_of(self.fingerprint, self.cache_tags)
        self._cache: CacheEntry | None = None
        self._lock = asyncio.Lock()
        self._renewal_paused_until = 0.0
        self._configs: tuple[str, Any] = ("", None)

    async def prepare(self) -> None:
        """Open the client and make sure that there is a cache.

        Raises:
            ProviderError: where the provider refuses to create one.
        """
        await super().prepare()
        await self._usable_cache()

    async def delete_cache(self) -> None:
        """Delete the cache at the provider, for the whole fleet; the next call creates another.
        Without a cache it does nothing."""
        record = await self._record()
        async with self._lock, record.locked():
            known = await record.read() or self._cache
            self._cache = None
            await record.write(None)
            if known is not None:
                await self._delete(known.name)

    # -- calls

    async def _generate(self, asked: Asked, text: str | None) -> tuple[Any, Reply]:
        cache = await self._usable_cache()
        try:
            return await self._call(_over(cache, asked), text, self._config_with(cache))
        except ProviderError as error:
            if not _says_gone(error):
                raise
        # Not an attempt and not a failure: nothing was generated. Replaced once; then it is one.
        logger.info("cache.gone model=%s", self.model)
        cache = await self._usable_cache(gone=cache.name)
        return await self._call(_over(cache, asked), text, self._config_with(cache))

    def _config_with(self, cache: CacheEntry) -> Any:
        name, config = self._configs
        if name != cache.name:
            config = self._build_config({**self._options, "cached_content": cache.name})
            self._configs = (cache.name, config)
        return config

    # -- the cache

    def _is_cache_expired(self) -> bool:
        """Whether there is no cache, or it ends within the renewal buffer.

        Thread safety: it reads `self._cache` once and writes nothing, and all calls of a process
        run on one event loop, so it needs no lock. The answer may be out of date one `await`
        later: code that acts on it takes `self._lock`, then the fleet's lock, and checks again.
        """
        cache = self._cache
        return cache is None or self._seconds_left(cache) <= self.cache_renewal_buffer_seconds

    def _seconds_left(self, cache: CacheEntry) -> float:
        return cache.expires_at - time.time()

    def _serves(self, cache: CacheEntry | None, gone: str | None) -> bool:
        if cache is None or cache.name == gone:
            return False
        if not self.auto_renew or time.time() < self._renewal_paused_until:
            return True
        return self._seconds_left(cache) > self.cache_renewal_buffer_seconds

    async def _usable_cache(self, gone: str | None = None) -> CacheEntry:
        """A cache that is not `gone` and does not need renewal."""
        cache = self._cache
        if cache is not None and self._serves(cache, gone):
            return cache
        async with self._lock:
            if not self._serves(self._cache, gone):
                self._cache = await self._agreed_cache(gone)
            assert self._cache is not None
            return self._cache

    async def _agreed_cache(self, gone: str | None) -> CacheEntry:
        """What the fleet uses, or what this process makes while it holds the fleet's lock."""
        record = await self._record()
        known = await record.read()
        if known is not None and self._serves(known, gone):
            return known
        async with record.locked():
            known = await record.read()
            if known is None or not self._serves(known, gone):
                known = await self._obtain(known or self._cache, gone)
                await record.write(known)
            return known

    async def _obtain(self, known: CacheEntry | None, gone: str | None) -> CacheEntry:
        if known is not None and known.name != gone and self._seconds_left(known) > 0:
            renewed = await self._renew(known)
            if renewed is not None:
                return renewed
            gone = known.name
        return await self._find(gone) or await self._create()

    # -- at the provider

    async def _find(self, gone: str | None) -> CacheEntry | None:
        """An existing cache of this model, content and tags; a failing list is not fatal."""
        try:
            async for cache in await self.client.aio.caches.list():
                entry = self._entry(cache)
                if self._matches(cache) and self._serves(entry, gone):
                    return entry
        except Exception as error:
            logger.warning("cache.list_failed error=%s", describe(error))
        return None

    def _matches(self, cache: Any) -> bool:
        if _bare(getattr(cache, "model", None)) != _bare(self.model):
            return False
        known = parse_display_name(getattr(cache, "display_name", None))
        if known is None:
            return False
        fingerprint, tags = known
        return fingerprint == self.fingerprint and has_tags(tags, self.cache_tags)

    async def _create(self) -> CacheEntry:
        types = importlib.import_module("google.genai.types")
        config = types.CreateCachedContentConfig(
            contents=self.cached_content or None,
            system_instruction=self.cached_system,
            ttl=self._ttl(),
            display_name=self.display_name,
        )
        with _translated():
            cache = await self.client.aio.caches.create(model=self.model, config=config)
        logger.info("cache.created model=%s", self.model)
        return self._entry(cache)

    async def _renew(self, cache: CacheEntry) -> CacheEntry | None:
        """Extend the cache in place; None where the provider no longer has it. If the provider
        can't do it now, the cache serves on meanwhile: the buffer is there for that."""
        types = importlib.import_module("google.genai.types")
        config = types.UpdateCachedContentConfig(ttl=self._ttl())
        try:
            with _translated():
                renewed = await self.client.aio.caches.update(name=cache.name, config=config)
        except ProviderError as error:
            if error.status in (400, 403, 404):
                return None
            logger.warning("cache.renewal_failed error=%s", describe(error))
            pause = min(RENEWAL_PAUSE, self._seconds_left(cache) / 2)
            self._renewal_paused_until = time.time() + pause
            return cache
        logger.info("cache.renewed model=%s", self.model)
        return self._entry(renewed)

    async def _delete(self, name: str) -> None:
        try:
            with _translated():
                await self.client.aio.caches.delete(name=name)
        except ProviderError as error:
            if error.status not in (403, 404):
                raise

    def _ttl(self) -> str:
        return f"{self.cache_ttl_seconds:g}s"

    def _entry(self, cache: Any) -> CacheEntry:
        ends = getattr(cache, "expire_time", None)
        created = getattr(cache, "create_time", None)
        if ends is not None:
            return CacheEntry(cache.name, ends.timestamp())
        started = created.timestamp() if created is not None else time.time()
        return CacheEntry(cache.name, started + self.cache_ttl_seconds)

    # -- what the fleet knows

    async def _record(self) -> CacheRecord:
        resources = self._resources()
        identity = self._identity()
        if resources.connection is not None:
            keys = resources.keys
            return FleetRecord(
                resources.connection, keys.cache(identity), keys.cache_lock(identity)
            )
        return await resources.shared(f"gemini cache {identity}", _open_local_record)

    def _identity(self) -> str:
        # A cache belongs to a server and an account there: another key's would be "not found". Only
        # this hash of it all goes to Redis, and an API key has too many bits to be guessed from it.
        account = gemini_client.account_of(self.client)
        return fingerprint_of(
            [account, _bare(self.model), self.fingerprint, self.cache_tags], length=32
        )


class CacheRecord(Protocol):
    """A cache's entry that several instances share, with a lock for its changes."""

    async def read(self) -> CacheEntry | None: ...

    async def write(self, entry: CacheEntry | None) -> None: ...

    def locked(self) -> Any:
        """Async context manager that holds the lock."""


@dataclass(slots=True)
class LocalRecord:
    """Shared by the instances of one process without Redis."""

    entry: CacheEntry | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def read(self) -> CacheEntry | None:
        return self.entry

    async def write(self, entry: CacheEntry | None) -> None:
        self.entry = entry

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        async with self.lock:
            yield


async def _open_local_record() -> Opened[CacheRecord]:
    async def nothing() -> None:
        """There is nothing to close."""

    return Opened(LocalRecord(), nothing)


@dataclass(frozen=True, slots=True)
class FleetRecord:
    """Shared by all processes of a fleet, in Redis. It has the cache's TTL."""

    connection: Connection
    key: str
    lock_key: str

    async def read(self) -> CacheEntry | None:
        values = await self.connection.patiently(self._read)
        name, expires_at = values
        if name is None or expires_at is None:
            return None
        return CacheEntry(name.decode(), float(expires_at))

    async def _read(self) -> list[bytes | None]:
        client: Any = self.connection.client
        values: list[bytes | None] = await client.hmget(self.key, ["name", "expires_at"])
        return values

    async def write(self, entry: CacheEntry | None) -> None:
        async def call() -> None:
            pipeline: Any = self.connection.client.pipeline(transaction=True)
            pipeline.delete(self.key)
            if entry is not None:
                fields = {"name": entry.name, "expires_at": repr(entry.expires_at)}
                pipeline.hset(self.key, mapping=fields)
                pipeline.expire(self.key, max(1, round(entry.expires_at - time.time())))
            await pipeline.execute()

        await self.connection.patiently(call)

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """A lease that is renewed while it is held, so that the lock of a dead process ends."""
        lock = self.connection.client.lock(
            self.lock_key, timeout=LOCK_LEASE, sleep=0.05, thread_local=False
        )
        await self.connection.patiently(lock.acquire)
        renewal = asyncio.create_task(_keep(lock))
        try:
            yield
        finally:
            renewal.cancel()
            await _release(lock)


async def _keep(lock: Any) -> None:
    while True:
        await asyncio.sleep(LOCK_LEASE / 3)
        try:
            await lock.reacquire()
        except Exception as error:
            # The lock is lost: at worst another process creates and pays for a second cache.
            logger.warning("cache.lock_lost error=%s", type(error).__name__)
            return


async def _release(lock: Any) -> None:
    try:
        await lock.release()
    except Exception as error:
        logger.warning("cache.lock_not_released error=%s", type(error).__name__)


# -- names and tags


def display_name_of(fingerprint: str, tags: Mapping[str, Any]) -> str:
    """`batchllm:FINGERPRINT{tags as JSON}`.

    Raises:
        UsageError: if it is longer than the 128 characters that the provider allows.
    """
    name = _PREFIX + fingerprint + (_canonical(tags) if tags else "")
    if len(name) > DISPLAY_NAME_LIMIT:
        room = DISPLAY_NAME_LIMIT - len(_PREFIX) - len(fingerprint)
        raise UsageError(
            f"cache_tags take {len(_canonical(tags))} characters as JSON, and only {room} fit into "
            f"a cache's display name: use fewer or shorter tags"
        )
    return name


def parse_display_name(name: object) -> tuple[str, dict[str, Any]] | None:
    """Fingerprint and tags; None for a cache that is not ours."""
    if not isinstance(name, str) or not name.startswith(_PREFIX):
        return None
    fingerprint, brace, rest = name.removeprefix(_PREFIX).partition("{")
    try:
        tags = json.loads(brace + rest) if brace else {}
    except ValueError:
        return None
    return fingerprint, tags


def has_tags(tags: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether `tags` has all of `wanted`, equal in case and type (1, "1" and True differ)."""
    return all(
        name in tags and _canonical(tags[name]) == _canonical(value)
        for name, value in wanted.items()
    )


def fingerprint_of(content: Any, *, length: int = 16) -> str:
    """A short hash of any content, the same in every process."""
    return hashlib.sha256(_canonical(content).encode()).hexdigest()[:length]


def _canonical(value: Any) -> str:
    return json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain
    )


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return repr(value)


def _as_list(content: Any) -> list[Any]:
    if content is None:
        return []
    single = isinstance(content, str) or not isinstance(content, Sequence)
    return [content] if single else list(content)


def _bare(model: object) -> str:
    """Without `models/`, or the path that a Vertex model has."""
    return str(model or "").rpartition("/")[2]


def _check_times(ttl: float, buffer: float) -> None:
    if ttl <= 0:
        raise ValueError(f"cache_ttl_seconds ({ttl}) must be greater than 0.")
    if buffer >= ttl:
        raise ValueError(
            f"cache_renewal_buffer_seconds ({buffer}) "
            f"must be less than cache_ttl_seconds ({ttl}). "
            f"Typical value: 5-10 minutes (300-600 seconds)."
        )
    if 10 <= ttl < 60:
        warnings.warn(
            f"cache_ttl_seconds ({ttl}) is short: the cache will be renewed all the time. "
            f"Typical value: 3600.",
            UserWarning,
            stacklevel=3,
        )


# -- errors


class _translated:
    """Context manager: SDK errors come out as `ProviderError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        translated = gemini_client.translate(error) if error is not None else None
        if translated is not None:
            raise translated from error


def _says_gone(error: ProviderError) -> bool:
    """Gemini answers 403 `CachedContent not found (or permission denied)`, or 404, or 400 for one
    that has just expired. A 403 about anything else is a matter of the key."""
    return error.status in (400, 403, 404) and "cache" in str(error).lower()
