"""Odd values, drawn from a seeded generator: the same seed draws the same ones."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import random
import uuid
from collections import UserDict, UserString, namedtuple
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from pydantic import BaseModel, model_serializer

ESC = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
CHARACTERS = ["a", "Z", " ", "0", "\n", "\t", '"', "\\", "{", "}", "é", "漢", "😀", "\x00", "\x7f"]
ODD_CHARACTERS = ["\ud800", "\udfff", "\u2028", "\ufeff", "\x1b", "\x9b", "\u202e", "\u0000"]


class Color(enum.Enum):
    RED = "red"


class Person(BaseModel):
    name: str = "Ann"
    age: int = 3


class BadModel(BaseModel):
    @model_serializer
    def fail(self) -> Any:
        raise RuntimeError("a serialiser of the user's fails")


class LeavingModel(BaseModel):
    @model_serializer
    def fail(self) -> Any:
        raise SystemExit(3)


@dataclasses.dataclass
class Point:
    x: int = 1
    y: Any = None


Pair = namedtuple("Pair", "first second")


class Hostile:
    """Fails wherever it is looked at."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no attribute")

    def _fail(self, *_: Any) -> Any:
        raise RuntimeError("not to be looked at")

    __str__ = __repr__ = __len__ = __iter__ = __bool__ = __eq__ = __int__ = __float__ = _fail
    __hash__ = None  # type: ignore[assignment]


class Leaving(Hostile):
    """Exits wherever it is looked at."""

    def __getattr__(self, name: str) -> Any:
        raise SystemExit(3)

    def _fail(self, *_: Any) -> Any:
        raise SystemExit(3)

    __str__ = __repr__ = __len__ = __iter__ = __bool__ = __eq__ = _fail
    __hash__ = None


class BadMapping(Mapping[str, Any]):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __getitem__(self, name: str) -> Any:
        raise self.error("no item")

    def __iter__(self) -> Iterator[str]:
        raise self.error("no names")

    def __len__(self) -> int:
        return 3


class Endless:
    """Has every attribute, each an object like itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Endless()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return Endless()


class Text(str):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Number(int):
    def __repr__(self) -> str:
        return "not a number"


def nested(depth: int, mapping: bool = False) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if mapping else [value]
    return value


def circle() -> Any:
    found: list[Any] = []
    found.append({"again": found})
    return found


def text(rng: random.Random, most: int = 40) -> str:
    """Text that any JSON can hold."""
    return "".join(rng.choices(CHARACTERS, k=rng.randint(0, most)))


def odd_text(rng: random.Random) -> str:
    return "".join(rng.choices(CHARACTERS + ODD_CHARACTERS, k=rng.randint(0, 40)))


def number(rng: random.Random) -> Any:
    return rng.choice(
        [
            *(0, 1, -1, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**18, 10**30, 0.5, -0.0),
            *(1e308, 5e-324, float("nan"), float("inf"), float("-inf"), True),
        ]
    )


def plain(rng: random.Random, depth: int = 3) -> Any:
    """JSON that comes back as it went."""
    kind = rng.randint(0, 7 if depth else 5)
    if kind == 0:
        return None
    if kind == 1:
        return rng.choice([True, False])
    if kind == 2:
        return rng.choice([0, 1, -5, 2**53, 123456789])
    if kind == 3:
        return rng.choice([0.5, -1.25, 1e10])
    if kind in (4, 5):
        return text(rng)
    size = rng.randint(0, 4)
    if kind == 6:
        return [plain(rng, depth - 1) for _ in range(size)]
    return {f"k{i}{text(rng, 3)}": plain(rng, depth - 1) for i in range(size)}


def value(rng: random.Random) -> Any:
    """Anything at all."""
    return rng.choice(VALUES)(rng)


VALUES: list[Callable[[random.Random], Any]] = [
    plain,
    plain,
    odd_text,
    number,
    lambda rng: rng.choice([b"", b"bytes", b"\xff\xfe", bytearray(b"x"), memoryview(b"x")]),
    lambda rng: rng.choice([set(), {1, 2}, frozenset("ab"), (), (1,), (1, 2, 3)]),
    lambda rng: nested(rng.choice([5, 100, 199, 201, 253, 254, 255, 256, 300, 500, 900])),
    lambda rng: nested(rng.choice([100, 254, 256, 400, 900]), mapping=True),
    lambda rng: circle(),
    lambda rng: rng.choice([Hostile, Leaving, Endless, MagicMock, object])(),
    lambda rng: rng.choice([BadMapping(RuntimeError), BadMapping(SystemExit), UserDict({"a": 1})]),
    lambda rng: rng.choice([Person(), BadModel(), LeavingModel(), Point(), Point(1, Hostile())]),
    lambda rng: rng.choice([Color.RED, Pair(1, 2), uuid.UUID(int=5), decimal.Decimal("NaN")]),
    lambda rng: rng.choice([datetime.datetime(2026, 1, 1), datetime.timedelta(1), 1 + 2j, ...]),
    lambda rng: rng.choice([Text("own"), Number(5), UserString("x"), SimpleNamespace(a=1)]),
    lambda rng: rng.choice([int, len, lambda: 1, iter([1]), (n for n in [1]), NotImplemented]),
    lambda rng: rng.choice([10**4299, 10**4300, 10**5000, [10**5000], {"a": -(10**6000)}]),
    lambda rng: {rng.choice([1, None, 2.5, True, (1, 2), b"x", Color.RED, float("nan")]): "key"},
    lambda rng: "x" * rng.choice([1_000, 100_000, 300_000]),
    lambda rng: {"a": [Hostile()], "b": {"c": float("nan")}},
]
