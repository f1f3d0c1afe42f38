"""The rows of an input file as work items, one by one."""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, cast

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
from batchllm_celery.files.prompt_template import MissingFieldError, PromptTemplate, find
from batchllm_celery.files.readers import STDIN, BadLine, Fields, Format, json_type
from batchllm_celery.files.requests import ROW_FIELDS, Requests, is_chat, read_chat
from batchllm_celery.files.row_keys import canonical, key_of_fields, key_of_line
from batchllm_celery.models import BadRow, LLMWorkItem, StrategySpec

T = TypeVar("T")

_Read = tuple[str, tuple[int, Fields] | BadLine]
#: Rows that are looked at before an input is taken.
_FIRST_ROWS = 20
#: Fields that a prompt may be in without a template.
_PROMPT_FIELDS = ("prompt", "body", "messages", "request", "params", "contents")

InputRow = LLMWorkItem[Any, Any, Any] | BadRow

#: Fields of a row that are no context.
_OWN_FIELDS = frozenset({"item_id", "custom_id", "prompt", "context"})


class BadRowError(ValueError):
    """One row can't be used; the text says why."""


class Rows:
    """The rows of one or more inputs, read while they are iterated over, and once.

    Memory holds one line (or one batch of Parquet rows), and what recognises duplicate ids.

    Args:
        source: path of a file or a folder, or `-` for standard input; or several paths.
        strategy: the strategy of every item; None: the one of each row's own model, for rows in
            the format of a provider's batch file.
        template: makes the prompt from the fields of a row. Default: the row's field `prompt`.
        format: `auto` decides by the file's name, then by its first bytes.
        tunable: whether the strategy is a provider's own, so that a row's own model counts.
        native: how rows in the format of a provider's batch file are read; default: by `strategy`.
        files_root: folder that the files of rows must lie in; default: the source's.
        limit: so many rows from the beginning, and no more.
        sample: so many rows, chosen at random; `seed` chooses the same ones again.
        id_column: the field that holds the row's id. Default: `item_id` or `custom_id`.
        text_column: the field that is the prompt, as it stands.
        delimiter: of CSV. Default: found by the first lines.
        encoding: of text, as `cp1252`. Default: UTF-8.

    Raises:
        InputError: a source can't be read, has no row, or none that a prompt can be made of; or
            rows of a provider's format don't go with the options.
        UsageError: there is no strategy, and the rows name no model.
    """

    def __init__(
        self,
        source: str | Sequence[str],
        strategy: StrategySpec | None,
        *,
        template: PromptTemplate | None = None,
        format: Format = "auto",
        tunable: bool = False,
        limit: int | None = None,
        sample: int | None = None,
        seed: int = 0,
        id_column: str | None = None,
        text_column: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        native: NativeRows | None = None,
        files_root: Path | None = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "template": template, "format": format, "tunable": tunable, "limit": limit,
            "sample": sample, "seed": seed, "id_column": id_column, "text_column": text_column,
            "delimiter": delimiter, "encoding": encoding, "native": native,
            "files_root": files_root,
        }  # fmt: skip
        self.sources = (source,) if isinstance(source, str) else tuple(source)
        self.source = self.sources[0]
        self.name = _name(self.source)
        self.bad = 0
        self._given = strategy
        self._template = template
        self.native = native or _native_of(strategy, tunable)
        folder = Path.cwd() if self.source == STDIN else Path(self.source)
        root = folder if folder.is_dir() else folder.parent
        self._requests = Requests(PartReader(files_root or root))
        self._id_column, self._text_column = id_column, text_column
        names = tuple(name for name in (id_column, text_column) if name is not None)
        self._read_options = readers.ReadOptions(
            format, delimiter, encoding, template, names, text_column is not None
        )
        self._seen = SeenIds()
        self._stream: IO[bytes] | None = None
        self._size: int | None = None
        self._part = 0
        self.format: Format = format
        self._words: list[str] = []
        first_rows = self._read()
        try:
            first = list(itertools.islice(first_rows, _FIRST_ROWS))
            if not first:
                raise InputError(f"{self.name} has no rows")
            self._check_prompts(first)
            first = self._look(first, first_rows)
        except BaseException:
            self.close()
            raise
        self._reader = self._selected(itertools.chain(first, first_rows), limit, sample, seed)

    @property
    def words(self) -> str:
        """What the inputs were taken for."""
        return "; ".join(self._words)

    def _read(self) -> Iterator[_Read]:
        """The rows of all sources: what their messages begin with, and the row."""
        several = len(self.sources) > 1
        for number, source in enumerate(self.sources):
            self._part = number
            name = _name(source)
            self._stream = readers.open_source(source)
            self._size = readers.size_of(self._stream)
            try:
                reading = readers.read(self._stream, source, name, self._read_options)
                self.format = reading.format
                self._words.append(f"{name}: {reading.words}")
                place = f"{name}: {reading.unit}" if several else reading.unit
                for row in reading.rows:
                    yield place, row
            finally:
                self.close()

    def _check_prompts(self, first: Sequence[_Read]) -> None:
        """Refuse an input whose first rows all lack what a prompt is made of."""
        fields = [row[1] for _, row in first if not isinstance(row, BadLine)]
        if not fields or len(fields) < len(first):
            return
        names = list(dict.fromkeys(name for row in fields for name in row))
        listed = ", ".join(map(str, names))[:200]
        if self._template is not None:
            wanted = sorted(self._template.fields)
            missing = [n for n in wanted if all(find(row, n) is None for row in fields)]
            if missing and not any(name in row for row in fields for name in missing):
                raise InputError(
                    f"{self.name} has no field {missing[0]!r} that --prompt names (its fields: "
                    f"{listed})"
                )
            return
        if self._text_column is not None:
            if all(find(row, self._text_column) is None for row in fields):
                raise InputError(
                    f"{self.name} has no field {self._text_column!r} (its fields: {listed})"
                )
            return
        own = any(name in row for row in fields for name in _PROMPT_FIELDS)
        if (
            len(fields) > 1
            and not own
            and not any(is_native(row) or is_chat(row) for row in fields)
        ):
            raise InputError(
                f"{self.name} has no field 'prompt' (its fields: {listed}); name one in --prompt, "
                f"as in --prompt {readers.suggestion(fields)}"
            )

    @property
    def strategy(self) -> StrategySpec:
        """The batch's: the given one, else that of the first row which names a model."""
        known = self._given or next(iter(self.native.models.values()), None)
        if known is None:
            raise UsageError(
                "say what answers: --model PROVIDER:NAME, or --strategy NAME --app MODULE"
            )
        return known

    def _look(self, first: list[_Read], rows: Iterator[_Read]) -> list[_Read]:
        """The first rows. Of an input in a provider's format a thousand are looked at: what is
        wrong with it as a whole is told before anything is enqueued."""
        looked = list(first)
        if any(self._is_native(read) for _, read in first):
            start = self._position()
            for read in itertools.islice(rows, LOOK_ROWS - len(first)):
                looked.append(read)
                if self._position() - start > LOOK_BYTES:
                    break
        for _, row in looked:
            if self._is_native(row) and not isinstance(row, BadLine):
                self.native.look(*row)
        _ = self.strategy
        return looked

    def _position(self) -> int:
        try:
            return self._stream.tell() if self._stream is not None else 0
        except (OSError, ValueError):
            return 0

    def _is_native(self, read: tuple[int, Fields] | BadLine) -> bool:
        return (
            self._template is None
            and self._text_column is None
            and not isinstance(read, BadLine)
            and (self.format == "openai" or is_native(read[1]))
        )

    def _selected(
        self, rows: Iterator[_Read], limit: int | None, sample: int | None, seed: int
    ) -> Iterator[_Read]:
        if sample is not None:
            return iter(_sampled(rows, sample, seed))
        return rows if limit is None else itertools.islice(rows, limit)

    @property
    def fraction_read(self) -> float | None:
        """How much of the input has been read, 0 to 1; None where that can't be known."""
        if self._options["limit"] is not None or self._options["sample"] is not None:
            return None
        if not self._size or self._stream is None:
            return None
        if self._stream.closed:
            return 1.0 if self._part == len(self.sources) - 1 else None
        try:
            return (self._part + min(1.0, self._stream.tell() / self._size)) / len(self.sources)
        except (OSError, ValueError):
            return None

    def __iter__(self) -> Iterator[InputRow]:
        try:
            for index, (place, read) in enumerate(self._reader):
                row = self._row(index, place, read)
                self.bad += isinstance(row, BadRow)
                yield row
        finally:
            self.close()

    def again(self) -> Rows:
        """The same rows from the start; of standard input they can't be had."""
        return Rows(self.sources, self._given, **self._options)

    def close(self) -> None:
        """Close the file; reading to the end does so."""
        if self._stream is not None and self._stream is not sys.stdin.buffer:
            self._stream.close()

    def _row(self, index: int, place: str, read: tuple[int, Fields] | BadLine) -> InputRow:
        if isinstance(read, BadLine):
            item_id = read.item_id
            if item_id is not None and not self._seen.add(item_id):
                item_id = None
            content = read.content or f"{place} {read.line}"
            return _bad(place, read.line, read.problem, content, item_id)
        line, fields = read
        item_id = None
        try:
            item_id = self._item_id(index, fields)
            return self._item(item_id, line, fields)
        except BadRowError as problem:
            return _bad(place, line, str(problem), canonical(fields), item_id)

    def _item_id(self, index: int, fields: Fields) -> str:
        own = self._own_id(fields)
        if own is None:
            if self._id_column is not None:
                raise BadRowError(f"it has no id in {self._id_column!r}")
            if self._seen.add_index(index):
                return str(index)
            raise BadRowError(
                f"its id would be its index, {index}, which another row has as its id"
            )
        if isinstance(own, bool) or not isinstance(own, str | int) or not str(own).strip():
            name = self._id_column or "item_id"
            raise BadRowError(f"{name} must be a text that is not empty, or a whole number")
        if not self._seen.add(str(own)):
            raise BadRowError(f"item_id {str(own)[:100]!r} has been used by an earlier row")
        return str(own)

    def _own_id(self, fields: Fields) -> Any:
        if self._id_column is not None:
            own = find(fields, self._id_column)
        else:
            own = fields.get("item_id")
            if own is None:
                own = fields.get("key" if recognise(fields) == "gemini" else "custom_id")
        return None if own == "" and self.format == "csv" else own

    def _item(self, item_id: str, line: int, fields: Fields) -> InputRow:
        key = key_of_fields(fields) if self._own_id(fields) is None else None
        if self._is_native((line, fields)):
            return self._native_item(item_id, line, fields, key)
        if self._text_column is not None:
            prompt: Any = find(fields, self._text_column)
        elif self._template is not None:
            prompt = _checked(lambda: cast(PromptTemplate, self._template).fill(fields))
        elif is_chat(fields):
            return self._chat_item(item_id, fields, key)
        else:
            prompt = fields.get("prompt")
        return LLMWorkItem(item_id, self.strategy, _prompt(prompt), self._context(fields), key)

    def _native_item(self, item_id: str, line: int, fields: Fields, key: bytes | None) -> InputRow:
        try:
            item = self.native.read(line, fields)
        except NativeRowError as problem:
            raise BadRowError(str(problem)) from None
        prompt = _checked(lambda: self._requests.prepared(item.prompt, item.strategy))
        return LLMWorkItem(item_id, item.strategy, prompt, item.context, key)

    def _chat_item(self, item_id: str, fields: Fields, key: bytes | None) -> InputRow:
        request = _checked(lambda: read_chat(fields))
        strategy = self.native.with_model(self.strategy, fields.get("model"))
        prompt = _checked(lambda: self._requests.prepared(request, strategy))
        rest = {name: value for name, value in fields.items() if name not in ROW_FIELDS}
        return LLMWorkItem(item_id, strategy, prompt, self._context(rest), key)

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


def _name(source: str) -> str:
    return "standard input" if source == STDIN else source


def _sampled(rows: Iterable[_Read], count: int, seed: int) -> list[_Read]:
    """`count` rows at random, each as likely as any other, in the order of the input."""
    random_numbers = random.Random(seed)
    kept: list[tuple[int, _Read]] = []
    for number, row in enumerate(rows):
        if number < count:
            kept.append((number, row))
        elif (place := random_numbers.randrange(number + 1)) < count:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def _bad(place: str, line: int, problem: str, content: str, item_id: str | None) -> BadRow:
    message = f"{place} {line}: {problem}"
    return BadRow(item_id or f"line-{line}", line, message, key_of_line(content))


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
