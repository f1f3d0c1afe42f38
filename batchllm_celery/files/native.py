"""Rows in the format of a provider's batch files, as items: each with its own model's strategy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchllm_celery.dialects.overrides import override
from batchllm_celery.dialects.refusals import Refusals
from batchllm_celery.dialects.rows import Row, read_row, recognise
from batchllm_celery.errors import InputError
from batchllm_celery.files.readers import Fields
from batchllm_celery.models import NativeRequest, StrategySpec

#: Models that one batch may call: each has a quota, a price and a client's state.
MOST_MODELS = 32
#: Rows, and bytes of input, that are looked at before anything is enqueued.
LOOK_ROWS, LOOK_BYTES = 1_000, 32 * 1024 * 1024


class NativeRowError(ValueError):
    """A row can't be sent as it is; the text names each field."""


@dataclass(frozen=True, slots=True)
class NativeItem:
    """What a row asks, of whom."""

    strategy: StrategySpec
    prompt: NativeRequest
    context: Any


@dataclass(slots=True)
class NativeRows:
    """Reads such rows.

    Args:
        strategy: the one of all rows; None: `PROVIDER` with each row's own model.
        provider: registered name of the provider's strategy; None: the one of the row's format.
        model: the only model that rows may name, and that of rows that name none; None: any.
        options: values by option that are written into each body (`--override`).
        refused: names of options that were given, and can't apply to bodies that are sent as they
            are.
        params: further parameters of each model's strategy.
        most_models: a row of a further model ends the reading.
    """

    strategy: StrategySpec | None = None
    provider: str | None = None
    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: Collection[str] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    most_models: int = MOST_MODELS
    on_model: Callable[[StrategySpec], None] | None = None
    """Called once for each strategy, before its first row is enqueued."""
    models: dict[str, StrategySpec] = field(default_factory=dict)
    """Strategies of the rows so far, by PROVIDER:MODEL."""

    @property
    def own_models(self) -> bool:
        """Whether rows choose their model."""
        return self.strategy is None and self.model is None

    def with_model(self, strategy: StrategySpec, model: Any) -> StrategySpec:
        """The strategy of a row in no provider's format that may name a model of its own.

        Raises:
            InputError: as `look`.
        """
        if not isinstance(model, str) or self.provider is None or model == self.model:
            return strategy
        if "model" in self.options:
            return strategy
        return StrategySpec(name=strategy.name, params={**strategy.params, "model": model})

    def look(self, line: int, fields: Fields) -> None:
        """Check what concerns the whole input.

        Raises:
            InputError: options that don't go with such rows; a model that --model excludes; one
                model too many.
        """
        if self.refused:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in self.refused)
            raise InputError(
                f"line {line} is a request in a provider's own format, which is sent as it is: "
                f"{names} would not apply; --override {','.join(self.refused)} writes it into each "
                "such request"
            )
        read = _read(fields)
        if not isinstance(read, Refusals):
            self._spec(line, read)

    def read(self, line: int, fields: Fields) -> NativeItem:
        """One row.

        Raises:
            NativeRowError: naming each field that can't be sent.
            InputError: as `look`.
        """
        self.look(line, fields)
        read = _read(fields)
        if isinstance(read, Refusals):
            raise NativeRowError(str(read))
        spec, request = self._spec(line, read), read.request
        written = dict(self.options)
        if "model" in written:
            written["model"] = spec.params.get("model")
            if request.dialect == "gemini":
                written.pop("model")
        if written:
            changed = override(request, written)
            if isinstance(changed, Refusals):
                raise NativeRowError(str(changed))
            request = changed
        rest = dict(read.rest)
        return NativeItem(spec, request, rest.get("context", rest or None))

    def _spec(self, line: int, row: Row) -> StrategySpec:
        if self.strategy is not None:
            return self.strategy
        provider = self.provider or row.row_format
        named = row.model
        if (
            self.model is not None
            and named not in (None, self.model)
            and "model" not in self.options
        ):
            raise InputError(
                f"line {line} names the model {named!r}, and --model names {self.model!r}: leave "
                "--model out to use each row's own, or give --override model"
            )
        model = self.model or named
        if model is None:
            raise InputError(
                f"line {line} is a request in Gemini's format, which names no model: give --model "
                "gemini:NAME"
            )
        known = self.models.get(f"{provider}:{model}")
        if known is not None:
            return known
        if len(self.models) >= self.most_models:
            raise InputError(
                f"line {line} names {model!r}, the model number {len(self.models) + 1} of this "
                f"input; at most {self.most_models} are taken (--max-models)"
            )
        spec = StrategySpec(name=provider, params={"model": model, **self.params})
        self.models[f"{provider}:{model}"] = spec
        if self.on_model is not None:
            self.on_model(spec)
        return spec


def _read(fields: Fields) -> Row | Refusals:
    body = fields.get("body")
    if "url" not in fields and isinstance(body, Mapping) and "messages" in body:
        fields = {**fields, "url": "/v1/chat/completions"}  # many files leave it out
    return read_row(fields)


def is_native(fields: Any) -> bool:
    """Whether a row is of a provider's batch file."""
    return isinstance(fields, Mapping) and recognise(fields) is not None
