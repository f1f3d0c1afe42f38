"""Context caches of the simulated Gemini: created, listed, prolonged, expired."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

DEFAULT_TTL_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class CachedContent:
    """One cache; moments are Unix seconds."""

    name: str
    model: str
    display_name: str
    tokens: int
    created: float
    updated: float
    expires: float


class Caches:
    """All caches that have not expired.

    Args:
        clock: gives Unix seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._live: dict[str, CachedContent] = {}
        self.created = 0
        self.updated = 0
        self.deleted = 0

    def create(self, model: str, display_name: str, tokens: int, ttl: float) -> CachedContent:
        """Make a cache that lives for `ttl` seconds."""
        now = self._clock()
        self.created += 1
        digest = hashlib.blake2b(str(self.created).encode(), digest_size=8).hexdigest()
        name = f"cachedContents/{digest}"
        self._live[name] = CachedContent(name, model, display_name, tokens, now, now, now + ttl)
        return self._live[name]

    def get(self, name: str) -> CachedContent | None:
        """The cache, unless it is unknown, deleted or expired."""
        cache = self._live.get(name)
        if cache is not None and cache.expires <= self._clock():
            del self._live[name]
            return None
        return cache

    def update(self, name: str, ttl: float) -> CachedContent | None:
        """Let the cache live for `ttl` seconds from now; None if there is none."""
        cache = self.get(name)
        if cache is None:
            return None
        now = self._clock()
        self.updated += 1
        self._live[name] = replace(cache, updated=now, expires=now + ttl)
        return self._live[name]

    def delete(self, name: str) -> bool:
        """Whether there was such a cache."""
        if self.get(name) is None:
            return False
        self.deleted += 1
        del self._live[name]
        return True

    def live(self) -> list[CachedContent]:
        """All caches that have not expired, oldest first."""
        return [cache for name in list(self._live) if (cache := self.get(name)) is not None]

    def page(self, start: int, size: int) -> tuple[list[CachedContent], int | None]:
        """`size` caches from position `start`, and where the next page starts, if there is one."""
        live = self.live()
        following = start + size if start + size < len(live) else None
        return live[start : start + size], following
