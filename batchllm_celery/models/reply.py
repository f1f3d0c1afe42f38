"""A provider's reply as it came."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RawReply:
    """Status, the provider's id of the request, the body's bytes, and the dialect of both."""

    status: int
    request_id: str | None = None
    body: bytes = b""
    dialect: str | None = None
