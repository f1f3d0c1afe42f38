"""Redis URLs: what may be shown of them, and how Celery spells them."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit


def safe_url(url: str) -> str:
    """The URL without its password, for messages; never raises."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _hide_parameters(url.rpartition("@")[2])
    if not rest.startswith("/"):  # else there is no user info, and an @ belongs to the path
        userinfo, at, rest = rest.rpartition("@")
        user = userinfo.partition(":")[0]
        rest = (f"{user}:***@" if at else "") + rest
    return f"{scheme}://{_hide_parameters(rest)}"


def _hide_parameters(text: str) -> str:
    return re.sub(r"(?i)([?&]password=)[^&]*", r"\1***", text)


def broker_url(url: str) -> str:
    """The same Redis as Celery and Flower spell it: `unix:///s?db=1` becomes
    `redis+socket:///s?virtual_host=1`; other URLs stay as they are.
    """
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={database}"
