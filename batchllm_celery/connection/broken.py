"""What Redis holds of ours that nobody can read: skipped where it is met, named once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from redis.exceptions import ResponseError

logger = logging.getLogger("batchllm_celery")

#: Names that are kept; more of them is a Redis that is not ours.
MOST_KEPT = 1000


@dataclass(frozen=True, slots=True)
class BrokenEntry:
    """One entry, and why it can't be read."""

    kind: str
    """`batch`, `quota`, `worker`, or `list` for one that names the others."""
    name: str
    reason: str


class BrokenEntries:
    """The broken entries that one process has met and that are broken still."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], BrokenEntry] = {}

    def add(self, kind: str, name: str, error: Exception) -> None:
        """Note an entry; the first time it is logged."""
        if (kind, name) in self._found or len(self._found) >= MOST_KEPT:
            return
        reason = why(error)
        self._found[kind, name] = BrokenEntry(kind, name, reason)
        logger.error("redis.broken_entry kind=%s name=%r reason=%r", kind, name[:100], reason)

    def mended(self, kind: str, name: str) -> None:
        """It could be read again, or it is gone."""
        self._found.pop((kind, name), None)

    def all(self) -> list[BrokenEntry]:
        """All that are known now."""
        return list(self._found.values())


def why(error: Exception) -> str:
    """An error in short, without what was stored: that may be a part of somebody's row."""
    text = str(error)
    if isinstance(error, ResponseError):
        if "BROKEN" in text:  # our scripts' own word
            return text[text.index("BROKEN") + len("BROKEN ") :].split(" script:")[0][:100]
        return "a key of another type" if "WRONGTYPE" in text else "a value of another type"
    return type(error).__name__


def is_broken(error: Exception) -> bool:
    """Whether an error is the fault of what is stored: neither Redis' own, nor one of ours."""
    if isinstance(error, ResponseError):
        # Its subclasses, and other first words, are about the server and its users.
        words = ("WRONGTYPE", "BROKEN", "not an integer", "not a valid float", "script:")
        return type(error) is ResponseError and any(word in str(error) for word in words)
    return isinstance(error, ValueError | TypeError | LookupError | AttributeError)


def readable(names: Sequence[bytes], kind: str, broken: BrokenEntries) -> list[str]:
    """Names out of a list; one that is no text names nothing that we wrote."""
    found = []
    for name in names:
        try:
            found.append(name.decode())
        except ValueError as error:
            broken.add(kind, repr(name)[2:-1], error)
    return found
