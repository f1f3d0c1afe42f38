"""Secrets and control characters never leave with a message: what may be shown of a foreign text.

Secrets are known by their value: what the environment holds under a name such as `..._API_KEY`,
and what `keep_secret` was told of (keys given in code, passwords of URLs).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "[key]"

#: A shorter value is blanked only where it stands as a word of its own.
_LONG = 8
_SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:api_?key|key|token|secret|password|passwd|credentials?)$", re.IGNORECASE
)
#: Their keys are blanked even when short: calls are made with them.
_PROVIDER_KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY")
#: What looks like a key, though it may be another than ours.
_SHAPES = re.compile(r"\b(?:sk-|gsk_|xai-|hf_|AIza|AQ\.|ya29\.|Bearer |Basic )[\w*.+/=-]{6,}")
_USERINFO = re.compile(r"(\w://)[^/\s@'\"]*@")
# A name has an end: searched without a bound, a text of question marks takes minutes.
_PARAMETER = re.compile(
    r"([?&;][^?=&;\s]{0,60}(?:key|token|secret|password|passwd)[^?=&;\s]{0,60}=)[^&;\s'\"]*",
    re.IGNORECASE,
)

# C0 and C1 controls, DEL, soft hyphen, line and bidi marks, half surrogate pairs, tags.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"
)

_kept: set[str] = set()


def keep_secret(*values: object) -> None:
    """Blank these texts in every message from now on; what is no text, or empty, is passed over."""
    _kept.update(value.strip() for value in values if isinstance(value, str) and value.strip())


def keep_secrets_of(parameters: Mapping[str, Any]) -> None:
    """`keep_secret` for each value whose name says that it is one (`api_key`, `password`)."""
    keep_secret(*(value for name, value in parameters.items() if _SECRET_NAME.search(str(name))))


def keep_secrets_in(url: str | None) -> None:
    """`keep_secret` for the password (or the lone user name, which is a token) of a URL."""
    userinfo, at, _ = (url or "").partition("://")[2].rpartition("@")
    if at and not userinfo.startswith("/"):  # else it is the path of a socket
        user, colon, password = userinfo.partition(":")
        secret = password if colon else user
        keep_secret(secret, unquote(secret))
    for name, value in re.findall(r"[?&]([^=&]+)=([^&]*)", url or ""):
        keep_secrets_of({name: value})
        keep_secrets_of({name: unquote(value)})


def without_secrets(text: str) -> str:
    """`text` with each secret in use, and whatever looks like one, blanked."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        for spelled in {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}:
            if len(spelled) >= _LONG:
                text = text.replace(spelled, HIDDEN)
            elif spelled in text:
                text = re.sub(rf"(?<!\w){re.escape(spelled)}(?!\w)", HIDDEN, text)
    text = _SHAPES.sub(HIDDEN, text)
    return _PARAMETER.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


def _secrets() -> Iterable[str]:
    of_environment = {
        value.strip()
        for name, value in os.environ.items()
        if name in _PROVIDER_KEYS or (len(value) >= _LONG and _SECRET_NAME.search(name))
    }
    return (_kept | of_environment) - {""}


def printable(text: str) -> str:
    r"""`text` with what a terminal obeys or hides as `\x1b` and the like; tabs and new lines stay.

    What comes out can be encoded as UTF-8.
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def printable_json(text: str) -> str:
    """JSON with the same characters escaped as JSON does it: the same value for a reader."""
    return _UNPRINTABLE.sub(lambda match: json.dumps(match[0])[1:-1], text)


def safe_url(url: str) -> str:
    """The URL without its password, for messages; never raises.

    A user name without a password is a token, and goes too.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return printable(_PARAMETER.sub(r"\1***", url.rpartition("@")[2]))
    if not rest.startswith("/"):  # else there is no user info, and an @ belongs to the path
        userinfo, at, rest = rest.rpartition("@")
        user, colon, _ = userinfo.partition(":")
        rest = (f"{user}:***@" if colon else "***@" if at else "") + rest
    return printable(f"{scheme}://" + _PARAMETER.sub(r"\1***", rest))


def host_of(url: str) -> str:
    """`https://host:port` of a URL, and nothing else of it."""
    parts = urlsplit(url)
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")


class _Redacting(logging.Filter):
    """Sees each record of our logger before any handler does, its traceback included."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(without_secrets(record.getMessage())), ()
        if record.exc_info and not record.exc_text:
            traceback = logging.Formatter().formatException(record.exc_info)
            record.exc_text = printable(without_secrets(traceback))
        return True


logging.getLogger("batchllm_celery").addFilter(_Redacting())
