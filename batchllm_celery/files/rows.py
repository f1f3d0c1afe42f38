"""The rows of an input file as work items, one by one."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from batchllm_celery.dialects.rows import recognise
from batchllm_celery.errors import InputError, UsageError
from batchllm_celery.files import readers
from batchllm_celery.files.item_ids import SeenIds
from batchllm_celery.files.native import (
    LOOK_BYTES,
    LOOK_ROWS,
    NativeRowError,
    NativeRows,
    is_native,
)
from batchllm_celery.files.parts import PartReader
from batchllm_celery.files.prompt_template import MissingFieldError, PromptTemplate
from batchllm_celery.files.readers import STDIN, BadLine, Fields, Format, json_type
from batchllm_celery.files.requests import ROW_FIELDS, Requests, is_chat, read_chat
from batchllm_celery.models import BadRow, LLMWorkItem, StrategySpec

T = TypeVar("T")

InputRow = LLMWorkItem[Any, Any, Any] | BadRow

#: Fields of a row that are no context.
_OWN_FIELDS = ("item_id", "custom_id", "prompt", "context")


class BadRowError(ValueError):
    """One row can't be used; the text says why."""


class Rows:
    """The rows of one input, read while they are iterated over, and once.

    Memory holds one line (or one batch of Parquet rows), and what recognises duplicate ids.

    Args:
        source: path, or `-` for standard input.
        strategy: the strategy of every item; None: the one of each row's own model, for rows in
            the format of a provider's batch file.
        template: makes the prompt from the fields of a row. Default: the row's field `prompt`.
        format: `auto` decides by the file's name, then by its first line.
        tunable: whether the strategy is a provider's own, so that a row's own model counts.
        native: how rows in the format of a provider's batch file are read; default: by `strategy`.
        files_root: folder that the files of rows must lie in; default: the source's.

    Raises:
        InputError: the source can't be read or has no row, or rows of a provider's format don't go
            with the options.
        UsageError: there is no strategy, and the rows name no model.
    """

    def __init__(
        self,
        source: str,
        strategy: StrategySpec | None,
        *,
        template: PromptTemplate | None = None,
        format: Format = "auto",
        tunable: bool = False,
        native: NativeRows | None = None,
        files_root: Path | None = None,
    ) -> None:
        self.source = source
        self.name = "standard input" if source == STDIN else source
        self.bad = 0
        self._given = strategy
        self._template = template
        self.native = native or _native_of(strategy, tunable)
        root = Path.cwd() if source == STDIN else Path(source).parent
        self._requests = Requests(PartReader(files_root or root))
        self._seen = SeenIds()
        self._stream = readers.open_source(source)
        self._size = readers.size_of(self._stream)
        try:
            self.format, reader = readers.read(self._stream, source, self.name, format, template)
            first = next(reader, None)
            if first is None:
                raise InputError(f"{self.name} has no rows")
            looked = self._look(first, reader)
        except UsageError:
            self.close()
            raise
        self._reader = itertools.chain(looked, reader)

    @property
    def strategy(self) -> StrategySpec:
        """The batch's: the given one, else that of the first row which names a model."""
        known = self._given or next(iter(self.native.models.values()), None)
        if known is None:
            raise UsageError(
                "say what answers: --model PROVIDER:NAME, or --strategy NAME --app MODULE"
            )
        return known

    def _look(self, first: Any, reader: readers.Read) -> list[Any]:
        """The first rows. Of an input in a provider's format a thousand are looked at: what is
        wrong with it as a whole is told before anything is enqueued."""
        looked = [first]
        if self._is_native(first):
            start = self._position()
            for read in itertools.islice(reader, LOOK_ROWS - 1):
                looked.append(read)
                if self._position() - start > LOOK_BYTES:
                    break
        for read in looked:
            if self._is_native(read):
                self.native.look(*read)
        _ = self.strategy
        return looked

    def _position(self) -> int:
        try:
            return self._stream.tell()
        except (OSError, ValueError):
            return 0

    def _is_native(self, read: Any) -> bool:
        return (
            self._template is None
            and not isinstance(read, BadLine)
            and (self.format == "openai" or is_native(read[1]))
        )

    @property
    def fraction_read(self) -> float | None:
        """How much of the input has been read, 0 to 1; None where that can't be known."""
        if not self._size:
            return None
        if self._stream.closed:
            return 1.0
        try:
            return min(1.0, self._stream.tell() / self._size)
        except (OSError, ValueError):
            return None

    def __iter__(self) -> Iterator[InputRow]:
        try:
            for index, read in enumerate(self._reader):
                row = self._row(index, read)
                self.bad += isinstance(row, BadRow)
                yield row
        finally:
            self.close()

    def close(self) -> None:
        """Close the file; reading to the end does so."""
        if self.source != STDIN:
            self._stream.close()

    def _row(self, index: int, read: tuple[int, Fields] | BadLine) -> InputRow:
        if isinstance(read, BadLine):
            return _bad(read.line, read.problem)
        line, fields = read
        try:
            item_id = self._item_id(index, fields)
        except BadRowError as problem:
            return _bad(line, str(problem))
        try:
            return self._item(item_id, line, fields)
        except BadRowError as problem:
            return _bad(line, str(problem), item_id)

    def _item_id(self, index: int, fields: Fields) -> str:
        own = fields.get("item_id")
        if own is None:
            own = fields.get("key" if recognise(fields) == "gemini" else "custom_id")
        if own is None or (own == "" and self.format == "csv"):
            if self._seen.add_index(index):
                return str(index)
            raise BadRowError(
                f"its id would be its index, {index}, which another row has as its id"
            )
        if isinstance(own, bool) or not isinstance(own, str | int) or not str(own).strip():
            raise BadRowError("item_id must be a text that is not empty, or a whole number")
        if not self._seen.add(str(own)):
            raise BadRowError(f"item_id {str(own)[:100]!r} has been used by an earlier row")
        return str(own)

    def _item(self, item_id: str, line: int, fields: Fields) -> InputRow:
        if self._is_native((line, fields)):
            return self._native_item(item_id, line, fields)
        if self._template is not None:
            prompt: Any = _checked(lambda: cast(PromptTemplate, self._template).fill(fields))
        elif is_chat(fields):
            return self._chat_item(item_id, fields)
        else:
            prompt = fields.get("prompt")
        return LLMWorkItem(item_id, self.strategy, _prompt(prompt), self._context(fields))

    def _native_item(self, item_id: str, line: int, fields: Fields) -> InputRow:
        try:
            item = self.native.read(line, fields)
        except NativeRowError as problem:
            raise BadRowError(str(problem)) from None
        prompt = _checked(lambda: self._requests.prepared(item.prompt, item.strategy))
        return LLMWorkItem(item_id, item.strategy, prompt, item.context)

    def _chat_item(self, item_id: str, fields: Fields) -> InputRow:
        request = _checked(lambda: read_chat(fields))
        strategy = self.native.with_model(self.strategy, fields.get("model"))
        prompt = _checked(lambda: self._requests.prepared(request, strategy))
        rest = {name: value for name, value in fields.items() if name not in ROW_FIELDS}
        return LLMWorkItem(item_id, strategy, prompt, self._context(rest))

    def _context(self, fields: Fields) -> Any:
        """The row's field `context`, else all its other fields: nothing of a row is dropped."""
        if "context" in fields:
            return fields["context"]
        if self.format == "text":
            return None
        rest = {name: value for name, value in fields.items() if name not in _OWN_FIELDS}
        return rest or None


def _native_of(strategy: StrategySpec | None, tunable: bool) -> NativeRows:
    if strategy is None or not tunable:
        return NativeRows(strategy=strategy)
    return NativeRows(provider=strategy.name, model=strategy.params.get("model"))


def check_all(rows: Iterable[InputRow], shown: int = 5) -> int:
    """Read all rows and return how many there are.

    Raises:
        InputError: some rows are bad; the message names the first `shown` of them.
    """
    total = bad = 0
    problems: list[str] = []
    for row in rows:
        total += 1
        if isinstance(row, BadRow):
            bad += 1
            if len(problems) < shown:
                problems.append(row.message)
    if bad:
        more = f"; and {bad - len(problems)} more" if bad > len(problems) else ""
        raise InputError(f"{bad} of {total} rows can't be used: {'; '.join(problems)}{more}")
    return total


def spooled(source: str) -> str:
    """The path of an input that can be read twice.

    Standard input is copied to a temporary file, which the caller removes.
    """
    if source != STDIN:
        return source
    with tempfile.NamedTemporaryFile(prefix="batchllm-stdin-", delete=False) as spool:
        while chunk := sys.stdin.buffer.read(1024 * 1024):
            spool.write(chunk)
    return spool.name


def _bad(line: int, problem: str, item_id: str | None = None) -> BadRow:
    return BadRow(item_id or f"line-{line}", line, f"line {line}: {problem}")


def _checked(read: Callable[[], T]) -> T:
    try:
        return read()
    except (MissingFieldError, ValueError) as problem:
        raise BadRowError(str(problem)) from None


def _prompt(prompt: Any) -> str:
    if prompt is None or prompt == "":
        raise BadRowError("it has no prompt")
    if not isinstance(prompt, str):
        raise BadRowError(f"its prompt must be a text, not {json_type(prompt)}")
    if not prompt.strip():
        raise BadRowError("its prompt is blank")
    return prompt
