"""Token counts of a call, an item or a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from batchllm_celery.models.base import Model

_NAMES = ("input_tokens", "output_tokens", "total_tokens", "cached_input_tokens")


class TokenUsage(Model):
    """Tokens of one call or of many; reads like batch-llm's dict too (`usage["input_tokens"]`).

    `input_tokens` includes the cached ones. A missing `total_tokens` is input + output.
    """

    input_tokens: int = Field(default=0, ge=0)
    output_tokens: int = Field(default=0, ge=0)
    total_tokens: int = Field(default=0, ge=0)
    cached_input_tokens: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_total(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not data.get("total_tokens"):
            total = (data.get("input_tokens") or 0) + (data.get("output_tokens") or 0)
            return {**data, "total_tokens": total}
        return data

    @classmethod
    def of(cls, value: TokenUsage | Mapping[str, Any] | None) -> TokenUsage:
        """Read a (partial) mapping; unknown names and None values count as absent."""
        if value is None:
            return NO_TOKENS
        if isinstance(value, TokenUsage):
            return value
        return cls(**{name: int(value[name]) for name in _NAMES if value.get(name)})

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage.model_construct(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            total_tokens=self.total_tokens + other.total_tokens,
            cached_input_tokens=self.cached_input_tokens + other.cached_input_tokens,
        )

    def __getitem__(self, name: str) -> int:
        if name not in _NAMES:
            raise KeyError(name)
        return int(getattr(self, name))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Mapping):
            return dict(self.items()) == dict(other)
        return super().__eq__(other)

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __bool__(self) -> bool:
        return self.total_tokens > 0 or self.cached_input_tokens > 0

    def get(self, name: str, default: int = 0) -> int:
        return int(getattr(self, name)) if name in _NAMES else default

    def keys(self) -> tuple[str, ...]:
        return _NAMES

    def items(self) -> Iterator[tuple[str, int]]:
        return ((name, getattr(self, name)) for name in _NAMES)


NO_TOKENS = TokenUsage()
