"""What acquire.lua is asked and answers, and the clock that turns its times into local ones."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from batchllm_celery.limiter.permit import Estimate

_NUMBERS = struct.Struct("<23d")
_HEAD = struct.Struct("<5d3I")
_LARGEST = 2**32 - 1
_TOKENS, _SLOTS, _PROBE, _PLAIN, _OVERSIZE, _LIMITED = 1, 2, 4, 8, 16, 32


def pack_question(
    process: str, numbers: Sequence[float], estimates: Sequence[Estimate]
) -> list[bytes | str | int | float]:
    """ARGV of acquire.lua; `numbers` in the order of its header."""
    tokens: list[int] = []
    for estimate in estimates:
        tokens += (min(estimate.input_tokens, _LARGEST), min(estimate.output_tokens, _LARGEST))
    return [process, _NUMBERS.pack(*numbers), struct.pack(f"<{len(tokens)}I", *tokens)]


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. Moments are the server's, in microseconds; durations in seconds."""

    generation: int
    now: int
    cool_until: int
    again_in: float
    exhausted_until: int
    flags: int
    consecutive: int
    version: int
    starts_in: tuple[float, ...]

    @classmethod
    def parse(cls, raw: bytes) -> Reply:
        generation, now, cool, again, exhausted, flags, consecutive, version = _HEAD.unpack_from(
            raw
        )
        starts = struct.unpack_from(f"<{(len(raw) - _HEAD.size) // 4}I", raw, _HEAD.size)
        return cls(
            int(generation),
            int(now),
            int(cool),
            again * 1e-6,
            int(exhausted),
            flags,
            consecutive,
            version,
            tuple([start * 1e-6 for start in starts]),
        )

    @property
    def by_tokens(self) -> bool:
        return bool(self.flags & _TOKENS)

    @property
    def by_slots(self) -> bool:
        return bool(self.flags & _SLOTS)

    @property
    def probing(self) -> bool:
        return bool(self.flags & _PROBE)

    @property
    def plain(self) -> bool:
        """Nothing but rates: tickets may be taken for waiters to come."""
        return bool(self.flags & _PLAIN)

    @property
    def oversize(self) -> bool:
        return bool(self.flags & _OVERSIZE)

    @property
    def limited(self) -> bool:
        """Some waiters got no start time."""
        return bool(self.flags & _LIMITED)

    @property
    def cooldown(self) -> float:
        """Seconds until the cooldown ends; 0 without one."""
        return max(self.cool_until - self.now, 0) * 1e-6


class ServerClock:
    """Server time in local monotonic time, from the quickest of the recent round trips.

    The server's moment lies somewhere between sending and receiving. A start must never be early,
    so the least `received - server time` of the last seconds counts, kept within this round trip:
    a late loop doesn't shift starts, nor does a server whose clock was set.
    """

    WINDOW = 5.0

    def __init__(self) -> None:
        self._offsets = [float("inf"), float("inf")]
        self._turned = 0.0

    def local(self, sent: float, received: float, server_now: int) -> float:
        """The local time at which the server's clock showed `server_now`."""
        if received - self._turned > self.WINDOW:
            self._offsets, self._turned = [float("inf"), self._offsets[0]], received
        seconds = server_now * 1e-6
        self._offsets[0] = min(self._offsets[0], received - seconds)
        return min(received, max(sent, seconds + min(self._offsets)))
