"""A provider's reply as it came."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RawReply:
    """Status, the provider's id of the request, and the body's bytes."""

    status: int
    request_id: str | None = None
    body: bytes = b""
