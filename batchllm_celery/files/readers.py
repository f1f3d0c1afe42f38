"""Rows of an input, one by one: JSONL, CSV, plain text, Parquet, OpenAI batch files.

A reader yields `(line number, fields)` or a `_BadLine`; `Rows` makes work items of them. Nothing
holds more than a line (or one Parquet batch) in memory, apart from what tells duplicate ids.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast

from batchllm_celery.errors import InputError
from batchllm_celery.files.item_ids import SeenIds
from batchllm_celery.files.openai_rows import is_openai_row, read_openai_row
from batchllm_celery.files.prompt_template import MissingFieldError, PromptTemplate
from batchllm_celery.models import BadRow, LLMWorkItem, StrategySpec

T = TypeVar("T")

Format = Literal["auto", "jsonl", "csv", "text", "parquet", "openai"]
FORMATS: tuple[Format, ...] = ("auto", "jsonl", "csv", "text", "parquet", "openai")

#: Longer lines are bad rows: no provider takes such a prompt, and no reader should hold it.
MAX_LINE_BYTES = 64 * 1024 * 1024

STDIN = "-"
_BOM = b"\xef\xbb\xbf"
_EXTENSIONS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_OWN_FIELDS = ("item_id", "custom_id", "prompt", "context")

Row = LLMWorkItem[Any, Any, Any] | BadRow
Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _BadLine:
    line: int
    problem: str


_Read = Iterator[tuple[int, Fields] | _BadLine]


class BadRowError(ValueError):
    """What is wrong with one row."""


class Rows:
    """The rows of one input, lazily and once.

    Args:
        source: path, or `-` for standard input.
        strategy: what every item runs with.
        template: makes the prompt of a row's fields; None: the row's `prompt`.
        format: `auto` goes by the file's name, then by its first line.
        tunable: whether rows of an OpenAI batch file may set parameters of the strategy.

    Raises:
        InputError: naming the source, if it can't be read or has no row.
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
        self.name = "standard input" if source == STDIN else source
        self.bad = 0
        self._strategy = strategy
        self._template = template
        self._tunable = tunable
        self._seen = SeenIds()
        self._stream = _open(source)
        self._size = _size(self._stream)
        try:
            self.format, reader = _reader(self, self._stream, source, format, template)
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

    def __iter__(self) -> Iterator[Row]:
        for index, read in enumerate(self._reader):
            row = self._row(index, read)
            self.bad += isinstance(row, BadRow)
            yield row
        self.close()

    def close(self) -> None:
        """Close the file; reading to the end does so."""
        if self.source != STDIN:
            self._stream.close()

    def _row(self, index: int, read: tuple[int, Fields] | _BadLine) -> Row:
        if isinstance(read, _BadLine):
            return _bad(read.line, read.problem)
        line, fields = read
        try:
            item_id = self._item_id(index, fields)
        except BadRowError as problem:
            return _bad(line, str(problem))
        try:
            return self._item(item_id, fields)
        except BadRowError as problem:
            return _bad(line, str(problem), item_id)

    def _item_id(self, index: int, fields: Fields) -> str:
        own = fields.get("item_id")
        if own is None:
            own = fields.get("custom_id")
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

    def _item(self, item_id: str, fields: Fields) -> Row:
        strategy = self._strategy
        prompt: Any = None
        if self._template is None and (self.format == "openai" or is_openai_row(fields)):
            openai = _checked(lambda: read_openai_row(fields))
            strategy, prompt = openai.apply(strategy, tunable=self._tunable)
        elif self._template is not None:
            prompt = _checked(lambda: cast(PromptTemplate, self._template).fill(fields))
        else:
            prompt = fields.get("prompt")
        return LLMWorkItem(item_id, strategy, _prompt(prompt), self._context(fields))

    def _context(self, fields: Fields) -> Any:
        """The row's own `context`, else whatever else it holds: nothing of a row is dropped."""
        if "context" in fields:
            return fields["context"]
        if self.format == "text" or is_openai_row(fields):
            return None
        rest = {name: value for name, value in fields.items() if name not in _OWN_FIELDS}
        return rest or None


def check_all(rows: Iterable[Row], shown: int = 5) -> int:
    """`--strict`: read everything and count it.

    Raises:
        InputError: naming the first bad rows.
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
    """A path that can be read twice: standard input goes to a temporary file, which the caller
    removes."""
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
        raise BadRowError(f"its prompt must be a text, not {_json_type(prompt)}")
    if not prompt.strip():
        raise BadRowError("its prompt is blank")
    return prompt


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number" if isinstance(value, float) else "that")


# -- where the bytes come from


def _open(source: str) -> IO[bytes]:
    if source == STDIN:
        return sys.stdin.buffer
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder, not a file")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{source}: there is no such file") from None
    except OSError as error:
        raise InputError(f"{source} can't be read: {error.strerror}") from None


def _size(stream: IO[bytes]) -> int | None:
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None
    return status.st_size if stream.seekable() else None


Line = tuple[int, bytes | None]


def _lines(stream: IO[bytes], name: str) -> Iterator[Line]:
    """Numbered lines without their ends; None for one that is too long to keep."""
    number = 0
    try:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                _skip_line(stream)
                yield number, None
                continue
            if number == 1:
                line = _without_bom(line, name)
            yield number, line.rstrip(b"\r\n")
    except (OSError, EOFError) as error:
        raise InputError(f"{name} can't be read to its end: {error}") from None


def _skip_line(stream: IO[bytes]) -> None:
    while (part := stream.readline(MAX_LINE_BYTES)) and not part.endswith(b"\n"):
        pass


def _without_bom(line: bytes, name: str) -> bytes:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{name} is UTF-16; save it as UTF-8")
    return line.removeprefix(_BOM)


# -- what they say


def _reader(
    rows: Rows, stream: IO[bytes], source: str, format: Format, template: PromptTemplate | None
) -> tuple[Format, _Read]:
    head = _peek(stream)
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    if head[:2] == b"\x1f\x8b":
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=stream))
        head = _peek(stream)
        suffixes = suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes
    suffix = suffixes[-1] if suffixes else ""
    if format == "auto":
        format = _EXTENSIONS.get(suffix, "parquet" if head[:4] == b"PAR1" else "auto")
    if format == "parquet":
        return format, _parquet(source)
    lines = _lines(stream, rows.name)
    if format == "auto":
        format, lines = _sniff(lines, template)
    if suffix == ".json" and format == "jsonl" and head.lstrip()[:1] == b"[":
        raise InputError(
            f"{source} is one JSON array; give one object a line: jq -c '.[]' {source}"
        )
    if format == "csv":
        return format, _csv(lines, rows.name, "\t" if suffix == ".tsv" else ",", template)
    return format, _text(lines) if format == "text" else _jsonl(lines)


def _peek(stream: IO[bytes]) -> bytes:
    peek = getattr(stream, "peek", None)
    try:
        return bytes(peek(512)) if peek else b""
    except (OSError, EOFError):
        return b""


def _sniff(lines: Iterator[Line], template: PromptTemplate | None) -> tuple[Format, Iterator[Line]]:
    """The format by the first line that is not blank."""
    skipped: list[Line] = []
    format: Format = "text"
    for line in lines:
        skipped.append(line)
        text = (line[1] or b"").decode("utf-8", "replace").strip()
        if text:
            format = _format_of(text, template)
            break
    return format, itertools.chain(skipped, lines)


def _format_of(first_line: str, template: PromptTemplate | None) -> Format:
    if first_line.startswith("{"):
        return "jsonl"
    columns = set(next(csv.reader([first_line]), []))
    if "prompt" in columns or (template is not None and template.fields <= columns):
        return "csv"
    return "text"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number


def _jsonl(lines: Iterator[Line]) -> _Read:
    decode = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite).decode
    for number, raw in lines:
        if raw is None:
            yield _too_long(number)
        elif raw.strip():
            yield _json_row(number, raw, decode)


def _json_row(
    number: int, raw: bytes, decode: Callable[[str], Any]
) -> tuple[int, Fields] | _BadLine:
    try:
        row = decode(raw.decode("utf-8"))
        if b"\\ud" in raw.lower():
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # half a surrogate pair?
    except UnicodeDecodeError as error:
        return _BadLine(number, f"not UTF-8 (byte {error.start + 1})")
    except UnicodeEncodeError:
        return _BadLine(number, "half a surrogate pair (\\ud...) is not text")
    except json.JSONDecodeError as error:
        return _BadLine(number, f"not JSON ({error.msg}, column {error.colno})")
    except RecursionError:
        return _BadLine(number, "not JSON that can be read: nested too deeply")
    except ValueError as error:
        return _BadLine(number, f"not JSON ({str(error)[:80]})")
    if not isinstance(row, dict):
        return _BadLine(number, f"not a JSON object but {_json_type(row)}")
    return number, row


def _too_long(number: int) -> _BadLine:
    return _BadLine(number, f"longer than {MAX_LINE_BYTES // 1024 // 1024} MiB")


def _text(lines: Iterator[Line]) -> _Read:
    for number, raw in lines:
        if raw is None:
            yield _too_long(number)
        elif raw.strip():
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                yield _BadLine(number, f"not UTF-8 (byte {error.start + 1})")
            else:
                yield number, {"prompt": text, "text": text}


class _CsvLines:
    """Lines for the csv module, and where it is in them."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for number, raw in self._lines:
            self.number = number
            # Bytes that are not UTF-8 become lone surrogates, which `_csv_row` finds.
            yield "\0" if raw is None else raw.decode("utf-8", "surrogateescape") + "\n"


def _csv(
    lines: Iterator[Line], name: str, delimiter: str, template: PromptTemplate | None
) -> _Read:
    csv.field_size_limit(MAX_LINE_BYTES)
    source = _CsvLines(lines)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    try:
        header = next((row for row in reader if row), None)
    except csv.Error as error:
        raise InputError(
            f"{name}: line {source.number}, the header, is not CSV ({error})"
        ) from None
    if header is None:
        return iter(())
    _check_header(header, name, template)
    return _csv_rows(reader, source, header)


def _check_header(header: list[str], name: str, template: PromptTemplate | None) -> None:
    columns = ", ".join(header)[:200]
    if len(set(header)) < len(header):
        raise InputError(f"{name}: a column name stands twice in the header ({columns})")
    wanted = {"prompt"} if template is None else template.fields
    if missing := sorted(wanted - set(header)):
        raise InputError(
            f"{name} has no column {missing[0]!r} (its columns: {columns}); "
            "name a column in --prompt, as in --prompt 'Summarise: {" + header[0] + "}'"
        )


def _csv_rows(reader: Iterator[list[str]], source: _CsvLines, header: list[str]) -> _Read:
    while True:
        line = source.number + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield _BadLine(line, f"not CSV ({error})")
            continue
        if values is None:
            return
        if values:
            yield _csv_row(line, header, values)


def _csv_row(line: int, header: list[str], values: list[str]) -> tuple[int, Fields] | _BadLine:
    if values[0] == "\0":
        return _too_long(line)
    if len(values) != len(header):
        return _BadLine(line, f"{len(values)} fields, but the header has {len(header)}")
    try:
        "".join(values).encode("utf-8")
    except UnicodeEncodeError:
        return _BadLine(line, "not UTF-8")
    return line, dict(zip(header, values, strict=True))


def _parquet(source: str) -> _Read:
    if source == STDIN:
        raise InputError("Parquet can't be read from standard input; give the file's name")
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(
            "Parquet needs the extra: pip install 'batchllm-celery[parquet]'"
        ) from None
    try:
        file = ParquetFile(source)
    except (OSError, ArrowException) as error:
        raise InputError(f"{source} is not Parquet that can be read: {str(error)[:120]}") from None
    return _parquet_rows(file)


def _parquet_rows(file: Any) -> _Read:
    number = itertools.count(1)
    for batch in file.iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            yield next(number), _json_able(row)


def _json_able(row: Mapping[str, Any]) -> Fields:
    """Dates and decimals as text: a context must survive JSON."""
    return cast(Fields, json.loads(json.dumps(row, default=str)))
