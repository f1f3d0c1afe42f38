"""The rows of an input file as work items, one by one."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

from batchllm_celery.errors import InputError
from batchllm_celery.files import readers
from batchllm_celery.files.item_ids import SeenIds
from batchllm_celery.files.openai_rows import is_openai_row, read_openai_row
from batchllm_celery.files.prompt_template import MissingFieldError, PromptTemplate
from batchllm_celery.files.readers import STDIN, BadLine, Fields, Format, json_type
from batchllm_celery.files.row_keys import canonical, key_of_fields, key_of_line
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
        strategy: the strategy of every item.
        template: makes the prompt from the fields of a row. Default: the row's field `prompt`.
        format: `auto` decides by the file's name, then by its first line.
        tunable: whether rows of an OpenAI batch file may set parameters of the strategy.

    Raises:
        InputError: the source can't be read or has no row.
    """

    def __init__(
        self,
        source: str,
        strategy: StrategySpec,
        *,
        template: PromptTemplate | None = None,
        format: Format = "auto",
        tunable: bool = False,
    ) -> None:
        self.source = source
        self._options: dict[str, Any] = {
            "template": template, "format": format, "tunable": tunable
        }  # fmt: skip
        self.name = "standard input" if source == STDIN else source
        self.bad = 0
        self._strategy = strategy
        self._template = template
        self._tunable = tunable
        self._seen = SeenIds()
        self._stream = readers.open_source(source)
        self._size = readers.size_of(self._stream)
        try:
            self.format, reader = readers.read(self._stream, source, self.name, format, template)
            first = next(reader, None)
            if first is None:
                raise InputError(f"{self.name} has no rows")
        except InputError:
            self.close()
            raise
        self._reader = itertools.chain([first], reader)

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
        for index, read in enumerate(self._reader):
            row = self._row(index, read)
            self.bad += isinstance(row, BadRow)
            yield row
        self.close()

    def again(self) -> Rows:
        """The same rows from the start; of standard input they can't be had."""
        return Rows(self.source, self._strategy, **self._options)

    def close(self) -> None:
        """Close the file; reading to the end does so."""
        if self.source != STDIN:
            self._stream.close()

    def _row(self, index: int, read: tuple[int, Fields] | BadLine) -> InputRow:
        if isinstance(read, BadLine):
            return _bad(read.line, read.problem, read.content or f"line {read.line}")
        line, fields = read
        item_id = None
        try:
            item_id = self._item_id(index, fields)
            return self._item(item_id, fields)
        except BadRowError as problem:
            return _bad(line, str(problem), canonical(fields), item_id)

    def _item_id(self, index: int, fields: Fields) -> str:
        own = self._own_id(fields)
        if own is None:
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

    def _own_id(self, fields: Fields) -> Any:
        own = fields.get("item_id")
        if own is None:
            own = fields.get("custom_id")
        return None if own == "" and self.format == "csv" else own

    def _item(self, item_id: str, fields: Fields) -> InputRow:
        strategy = self._strategy
        prompt: Any = None
        if self._template is None and (self.format == "openai" or is_openai_row(fields)):
            openai = _checked(lambda: read_openai_row(fields))
            strategy, prompt = openai.apply(strategy, tunable=self._tunable)
        elif self._template is not None:
            prompt = _checked(lambda: cast(PromptTemplate, self._template).fill(fields))
        else:
            prompt = fields.get("prompt")
        key = key_of_fields(fields) if self._own_id(fields) is None else None
        return LLMWorkItem(item_id, strategy, _prompt(prompt), self._context(fields), key)

    def _context(self, fields: Fields) -> Any:
        """The row's field `context`, else all its other fields: nothing of a row is dropped."""
        if "context" in fields:
            return fields["context"]
        if self.format == "text" or is_openai_row(fields):
            return None
        rest = {name: value for name, value in fields.items() if name not in _OWN_FIELDS}
        return rest or None


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


def _bad(line: int, problem: str, content: str, item_id: str | None = None) -> BadRow:
    return BadRow(item_id or f"line-{line}", line, f"line {line}: {problem}", key_of_line(content))


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
