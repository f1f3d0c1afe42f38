"""What can't be carried from one form to another, by the path of its field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from batchllm_celery.models.request import MOST_LEVELS, too_deep


@dataclass(frozen=True, slots=True)
class Refusal:
    """One field that can't be carried: `body.messages[2].audio`, and why. Never its value."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass(frozen=True, slots=True)
class Refusals:
    """All that is wrong with one body or request; never empty."""

    refusals: tuple[Refusal, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.refusals))

    def __iter__(self) -> Iterator[Refusal]:
        return iter(self.refusals)


UNKNOWN = "unsupported: it would be lost in the translation"


@dataclass(slots=True)
class Reader:
    """Collects what a translation could not take."""

    refusals: list[Refusal] = field(default_factory=list)

    def refuse(self, path: str, message: str = UNKNOWN) -> None:
        """Note one."""
        self.refusals.append(Refusal(path, message))

    def fields(self, value: Any, path: str) -> Fields:
        """The fields of an object; of none (and a refusal) where it is no object."""
        if isinstance(value, Mapping):
            return Fields(self, dict(value), path)
        self.refuse(path, "must be an object")
        return Fields(self, {}, path)

    def result(self) -> Refusals | None:
        """What was refused; None for nothing."""
        return Refusals(tuple(self.refusals)) if self.refusals else None


class Fields:
    """An object's fields, each to be taken once: what is left at the end is refused by name.

    A null is an absent field, for every provider.
    """

    def __init__(self, reader: Reader, values: dict[str, Any], path: str) -> None:
        self.reader = reader
        self.path = path
        self._values = values

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, value in self._values.items():
            if value is not None:
                self.reader.refuse(self.at(name))

    def at(self, name: str) -> str:
        """The path of a field."""
        return f"{self.path}.{name}"

    def refuse(self, name: str, message: str = UNKNOWN) -> None:
        """Refuse a field that was taken."""
        self.reader.refuse(self.at(name), message)

    def has(self, name: str) -> bool:
        """Whether it is there, and not null."""
        return self._values.get(name) is not None

    def take(self, name: str) -> Any:
        """The value, whatever it is; None where it is absent."""
        return self._values.pop(name, None)

    def _typed(self, name: str, types: type | tuple[type, ...], words: str) -> Any:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, types) and (types is bool or not isinstance(value, bool)):
            return value
        self.refuse(name, f"must be {words}")
        return None

    def text(self, name: str) -> str | None:
        """A string."""
        value: str | None = self._typed(name, str, "a string")
        return value

    def needed_text(self, name: str) -> str:
        """A string; its absence is refused."""
        if not self.has(name):
            self.refuse(name, "is missing")
        return self.text(name) or ""

    def flag(self, name: str) -> bool | None:
        """A boolean."""
        value: bool | None = self._typed(name, bool, "true or false")
        return value

    def whole(self, name: str) -> int | None:
        """An integer."""
        value: int | None = self._typed(name, int, "an integer")
        return value

    def number(self, name: str) -> float | None:
        """A number."""
        value: float | None = self._typed(name, (int, float), "a number")
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object that is carried as it is: a schema, a tool's arguments."""
        value: dict[str, Any] | None = self._typed(name, dict, "an object")
        if too_deep(value):
            self.refuse(name, f"is nested deeper than {MOST_LEVELS} levels")
            return None
        return value

    def inner(self, name: str) -> Fields | None:
        """An object whose own fields are taken in turn; None where it is absent."""
        value = self.take(name)
        return None if value is None else self.reader.fields(value, self.at(name))

    def needed_inner(self, name: str) -> Fields:
        """The same; its absence is refused."""
        return self.reader.fields(self.take(name), self.at(name))

    def elements(self, name: str) -> list[tuple[str, Any]]:
        """A list's elements with their paths; none where it is absent."""
        values = self._typed(name, list, "a list")
        return [(f"{self.at(name)}[{i}]", value) for i, value in enumerate(values or ())]

    def expect(self, name: str, *allowed: Any) -> None:
        """Take a field that says nothing, as long as it has one of these values (or is absent)."""
        value = self.take(name)
        if value is not None and value not in allowed:
            self.refuse(name)
