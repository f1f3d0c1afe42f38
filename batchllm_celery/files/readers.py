"""Readers of the input formats: JSONL, CSV, plain text, Parquet, OpenAI batch files.

A reader yields `(line number, fields)`, or a `BadLine` for a line that is not of its format.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, cast, get_args

from batchllm_celery.errors import InputError
from batchllm_celery.files.prompt_template import PromptTemplate

Format: TypeAlias = Literal["auto", "jsonl", "csv", "text", "parquet", "openai"]
FORMATS: tuple[Format, ...] = get_args(Format)

#: A longer line is a bad row: no provider takes such a prompt, and it would fill the memory.
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

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that its format does not allow, and why."""

    line: int
    problem: str
    content: str = ""
    """What stands there, to recognise it."""


Read = Iterator[tuple[int, Fields] | BadLine]


# -- bytes and lines


def open_source(source: str) -> IO[bytes]:
    """The bytes of a file, or of standard input for `-`."""
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


def size_of(stream: IO[bytes]) -> int | None:
    """Size in bytes; None where it can't be known, as of a pipe."""
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


# -- formats


def read(
    stream: IO[bytes],
    source: str,
    name: str,
    format: Format,
    template: PromptTemplate | None,
) -> tuple[Format, Read]:
    """The format of the input, and its reader. `name` is what messages call the input."""
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
    lines = _lines(stream, name)
    if format == "auto":
        format, lines = _sniff(lines, template)
    if suffix == ".json" and format == "jsonl" and head.lstrip()[:1] == b"[":
        raise InputError(
            f"{source} is one JSON array; give one object a line: jq -c '.[]' {source}"
        )
    if format == "csv":
        return format, _csv(lines, name, "\t" if suffix == ".tsv" else ",", template)
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


def json_type(value: Any) -> str:
    """The JSON type of a value, for messages."""
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number" if isinstance(value, float) else "that")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number


def _jsonl(lines: Iterator[Line]) -> Read:
    decode = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite).decode
    for number, raw in lines:
        if raw is None:
            yield _too_long(number)
        elif raw.strip():
            yield _json_row(number, raw, decode)


def _json_row(
    number: int, raw: bytes, decode: Callable[[str], Any]
) -> tuple[int, Fields] | BadLine:
    bad = partial(BadLine, number, content=raw.decode("latin-1"))
    try:
        row = decode(raw.decode("utf-8"))
        if b"\\ud" in raw.lower():
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # half a surrogate pair?
    except UnicodeDecodeError as error:
        return bad(f"not UTF-8 (byte {error.start + 1})")
    except UnicodeEncodeError:
        return bad("half a surrogate pair (\\ud...) is not text")
    except json.JSONDecodeError as error:
        return bad(f"not JSON ({error.msg}, column {error.colno})")
    except RecursionError:
        return bad("not JSON that can be read: nested too deeply")
    except ValueError as error:
        return bad(f"not JSON ({str(error)[:80]})")
    if not isinstance(row, dict):
        return bad(f"not a JSON object but {json_type(row)}")
    return number, row


def _too_long(number: int) -> BadLine:
    return BadLine(number, f"longer than {MAX_LINE_BYTES // 1024 // 1024} MiB")


def _text(lines: Iterator[Line]) -> Read:
    for number, raw in lines:
        if raw is None:
            yield _too_long(number)
        elif raw.strip():
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                why = f"not UTF-8 (byte {error.start + 1})"
                yield BadLine(number, why, raw.decode("latin-1"))
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


def _csv(lines: Iterator[Line], name: str, delimiter: str, template: PromptTemplate | None) -> Read:
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


def _csv_rows(reader: Iterator[list[str]], source: _CsvLines, header: list[str]) -> Read:
    while True:
        line = source.number + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield BadLine(line, f"not CSV ({error})")
            continue
        if values is None:
            return
        if values:
            yield _csv_row(line, header, values)


def _csv_row(line: int, header: list[str], values: list[str]) -> tuple[int, Fields] | BadLine:
    if values[0] == "\0":
        return _too_long(line)
    content = "\x1f".join(values)
    if len(values) != len(header):
        return BadLine(line, f"{len(values)} fields, but the header has {len(header)}", content)
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        return BadLine(line, "not UTF-8", content)
    return line, dict(zip(header, values, strict=True))


def _parquet(source: str) -> Read:
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


def _parquet_rows(file: Any) -> Read:
    number = itertools.count(1)
    for batch in file.iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            # Dates and decimals become text, because a context must survive JSON.
            yield next(number), json.loads(json.dumps(row, default=str))
