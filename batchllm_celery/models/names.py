"""Names that we write into keys, queues, file names and command lines.

A name is one word: never a path (`..`), an option (`-x`), or text that a terminal or a Redis
pattern takes for something else. Each is checked where it comes in.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from batchllm_celery.errors import UsageError

_WORD = "letters, digits, dots, underscores or dashes (no dot or dash first)"
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_QUEUE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")  # `run.` and a batch id fit in
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:/@+%~=-]{0,199}")
_LABEL_MARKS = ":/@+%~="  # what `quote` leaves alone beside letters, digits and `._-~`


def shown(value: object, most: int = 60) -> str:
    """A value as an error message may show it: short, on one line, in plain ASCII."""
    text = ascii(value[: most + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= most else f"{text[:most]}..."


def _check(pattern: re.Pattern[str], what: str, value: object, rule: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise UsageError(f"{what} {shown(value)} must be {rule}")
    return value


def check_batch_id(value: object, what: str = "batch id") -> str:
    """`value`, if it can be a batch's id.

    Raises:
        UsageError: naming `what` and the value.
    """
    return _check(_ID, what, value, f"1 to 100 {_WORD}")


def check_namespace(value: object) -> str:
    """`value`, if it can be a fleet's namespace; raises as `check_batch_id`."""
    return _check(_ID, "namespace", value, f"1 to 100 {_WORD}")


def check_queue(value: object) -> str:
    """`value`, if it can be the name of a queue of a fleet; raises as `check_batch_id`."""
    return _check(_QUEUE, "queue", value, f"1 to 120 {_WORD}")


def check_label(value: object, what: str) -> str:
    """`value`, if it can be the name of a quota or of a strategy; raises as `check_batch_id`."""
    rule = "1 to 200 letters, digits or ._:/@+%~=- that begin with a letter or a digit"
    return _check(_LABEL, what, value, rule)


def as_label(text: str) -> str:
    """A quota's name made of a model's, which may hold anything: other characters become `%20`
    and the like."""
    return quote(text, safe=_LABEL_MARKS, errors="replace").lstrip("-./:@+%~=")[:200] or "_"
