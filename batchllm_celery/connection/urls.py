"""Redis URLs: what may be shown of them, and how Celery spells them."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit


def broker_url(url: str) -> str:
    """The same Redis as Celery and Flower spell it: `unix:///s?db=1` becomes
    `redis+socket:///s?virtual_host=1`; other URLs stay as they are.
    """
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={database}"
