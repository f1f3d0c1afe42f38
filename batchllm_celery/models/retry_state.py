"""What a strategy remembers from one attempt at an item to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RetryState:
    """A small JSON-serialisable store: one per item, kept over its retries and its moves
    from one process to another, never shared between items.

    Raises:
        TypeError: at the move, where a value can't be written as JSON.
    """

    __slots__ = ("data",)

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        self.data: dict[str, Any] = dict(data or {})

    def get(self, key: str, default: Any = None) -> Any:
        """The value under `key`, or `default`."""
        return self.data.get(key, default)

    def set(self, key: str, value: Any) -> None:
        """Store `value`, which must be JSON-serialisable, under `key`."""
        self.data[key] = value

    def delete(self, key: str, raise_if_missing: bool = False) -> None:
        """Remove `key`.

        Raises:
            KeyError: if it is missing and `raise_if_missing` is true.
        """
        if raise_if_missing:
            del self.data[key]
        else:
            self.data.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        self.data.clear()

    def __contains__(self, key: object) -> bool:
        """Whether a value is stored under `key`."""
        return key in self.data

    def __bool__(self) -> bool:
        return bool(self.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RetryState) and self.data == other.data

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RetryState({self.data!r})"
