"""Readers of the input formats: JSONL, JSON, CSV, plain text, Parquet, Excel, folders, batch files.

A reader yields `(line number, fields)`, or a `BadLine` for a line that is not of its format.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import datetime
import gzip
import io
import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, cast, get_args

from batchllm_celery.errors import InputError
from batchllm_celery.files.prompt_template import PromptTemplate

Format: TypeAlias = Literal["auto", "jsonl", "json", "csv", "text", "parquet", "excel", "openai"]
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
    ".tab": "csv",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".xlsx": "excel",
    ".xlsm": "excel",
}
#: First bytes of what is not read -> what it is, and the command that makes it readable.
_NOT_READ = (
    (b"BZh", "compressed by bzip2", "bunzip2 -k {file}"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unxz -k {file}"),
    (b"7z\xbc\xaf'\x1c", "a 7z archive", "7z x {file}"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "lz4 -d {file}"),
    (b"Rar!", "a RAR archive", "unrar x {file}"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file (.xls)", "soffice --convert-to xlsx {file}"),
    (b"%PDF", "a PDF", "pdftotext {file}"),
    (
        b"SQLite format 3",
        "an SQLite database",
        "sqlite3 -csv -header {file} 'SELECT * FROM TABLE' > {stem}.csv",
    ),
    (
        b"ARROW1",
        "a Feather (Arrow) file",
        'python -c \'import pandas; pandas.read_feather("{file}").to_parquet("{stem}.parquet")\'',
    ),
    (
        b"Obj\x01",
        "an Avro file",
        "avro-tools tojson {file} > {stem}.jsonl",
    ),
    (
        b"ORC",
        "an ORC file",
        'python -c \'import pandas; pandas.read_orc("{file}").to_parquet("{stem}.parquet")\'',
    ),
    (b"\x80\x04\x95", "a Python pickle, which may run code", None),
    (b"\x89PNG", "an image", None),
    (b"\xff\xd8\xff", "an image", None),
    (b"GIF8", "an image", None),
)
_UNZIP = "unzip {file}"
#: Delimiters that a CSV file is tried with, in this order.
_DELIMITERS = ",;\t|"
#: Lines at the beginning of a file that its delimiter is found by.
_SNIFFED_LINES = 20
#: Names of delimiters, for people.
DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How an input is to be read.

    Args:
        format: `auto` decides by the file's name, then by its first bytes.
        delimiter: of CSV; None: found by the first lines.
        encoding: of text; None: UTF-8.
        template: what the header of a table must have the fields of; None: `prompt`.
        names: further columns that it must have.
        has_text: whether one of them is the prompt.
    """

    format: Format = "auto"
    delimiter: str | None = None
    encoding: str | None = None
    template: PromptTemplate | None = None
    names: tuple[str, ...] = ()
    has_text: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """An input that has been opened: what it was taken for, and its rows."""

    format: Format
    words: str
    rows: Read
    unit: str = "line"


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that its format does not allow, and why."""

    line: int
    problem: str
    content: str = ""
    """What stands there, to recognise it."""
    item_id: str | None = None
    """Its own id, where that can be read."""


Read = Iterator[tuple[int, Fields] | BadLine]


# -- bytes and lines


def open_source(source: str) -> IO[bytes]:
    """The bytes of a file, or of standard input for `-`; nothing for a folder."""
    if source == STDIN:
        return sys.stdin.buffer
    path = Path(source)
    if path.is_dir():
        return io.BufferedReader(cast(Any, io.BytesIO()))
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


class _Transcoded:
    """A stream of another encoding, read as lines of UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str, name: str) -> None:
        self._text = io.TextIOWrapper(stream, encoding=encoding, newline="\n")
        self._encoding, self._name = encoding, name

    def readline(self, limit: int = -1) -> bytes:
        try:
            return self._text.readline(limit).encode("utf-8", "surrogatepass")
        except UnicodeError as error:
            raise InputError(
                f"{self._name} is not {self._encoding} ({str(error)[:80]}): give its own --encoding"
            ) from None

    def peek(self, _: int) -> bytes:
        return b""

    def __del__(self) -> None:
        with contextlib.suppress(ValueError):
            self._text.detach()  # whoever opened the stream closes it


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


def read(stream: IO[bytes], source: str, name: str, options: ReadOptions) -> Reading:
    """Open an input; `name` is what messages call it.

    Raises:
        InputError: it can't be read; with what to do.
    """
    path = Path(source)
    if source != STDIN and path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.is_file() and not _hidden(file, path)
        )
        return Reading(
            "text", f"a folder of {len(files):,} files, one item each", _folder(files, path)
        )
    head = _peek(stream)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    stream, head, compression = _decompressed(stream, head, name)
    if compression and suffixes[-1:] in ([".gz"], [".zst"], [".gzip"], [".zstd"]):
        suffixes = suffixes[:-1]
    suffix = suffixes[-1] if suffixes else ""
    format = options.format
    if format == "auto":
        format = "parquet" if head[:4] == b"PAR1" else _EXTENSIONS.get(suffix, "auto")
        if head[:2] == b"PK" and format != "parquet":
            format = "excel" if suffix in (".xlsx", ".xlsm") or b"xl/" in head else "auto"
    if format not in ("parquet", "excel"):
        _refuse_unreadable(head, source, name, compression)
    tail = f", {compression}" if compression else ""
    if format == "parquet":
        return Reading(format, "Parquet", _parquet(source, name, compression), "row")
    if format == "excel":
        return Reading(format, "Excel, its first sheet", _excel(stream, name, options), "row")
    if options.encoding:
        _check_encoding(options.encoding)
        stream = cast(IO[bytes], _Transcoded(stream, options.encoding, name))
    elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{name} is UTF-16; save it as UTF-8, or give --encoding utf-16")
    if format == "json" or (format == "jsonl" and suffix == ".json" and _is_document(stream, head)):
        return Reading(
            "json", f"a JSON array{tail}", _json_document(stream, source, name), "element"
        )
    lines = _lines(stream, name)
    if format == "auto":
        format, lines = _sniff(lines, options.template)
        if format == "text" and suffix not in ("", ".lst", ".list", ".prompts", ".log"):
            raise InputError(
                f"{name}: files that end in {suffix} are not known; --format text takes each line "
                "for a prompt, and a folder takes each of its files for one"
            )
    if format == "csv":
        delimiter = "\t" if suffix in (".tsv", ".tab") else None
        return _csv(lines, name, options.delimiter or delimiter, options, tail)
    if format == "text":
        return Reading(format, f"text, a prompt a line{tail}", _text(lines))
    return Reading(format, f"JSONL{tail}", _jsonl(lines))


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _decompressed(stream: IO[bytes], head: bytes, name: str) -> tuple[IO[bytes], bytes, str | None]:
    """The stream of what is in a gzip or zstd file; its first bytes; by what it is compressed."""
    if head[:2] == b"\x1f\x8b":
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=stream))
        compression = "gzip"
    elif head[:4] == b"\x28\xb5\x2f\xfd":
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(
            stream, read_across_frames=True, closefd=False
        )
        stream = cast(IO[bytes], io.BufferedReader(cast(Any, reader)))
        compression = "zstd"
    else:
        return stream, head, None
    try:
        return stream, bytes(cast(Any, stream).peek(512)), compression
    except Exception as error:
        raise InputError(f"{name} is {compression} that can't be read: {error}") from None


def _peek(stream: IO[bytes]) -> bytes:
    peek = getattr(stream, "peek", None)
    try:
        return bytes(peek(512)) if peek else b""
    except (OSError, EOFError):
        return b""


def _refuse_unreadable(head: bytes, source: str, name: str, compression: str | None) -> None:
    file, stem = shlex.quote(source), Path(source).stem
    if head[:2] == b"PK":
        raise InputError(f"{name} is a zip archive: unpack it first ({_UNZIP.format(file=file)})")
    if head[257:262] == b"ustar":
        raise InputError(f"{name} is a tar archive: unpack it first (tar xf {file})")
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"{name} is an HTML page, not a file of rows; put pages into a folder")
    for magic, what, command in _NOT_READ:
        if head.startswith(magic):
            how = f": convert it first ({command.format(file=file, stem=stem)})" if command else ""
            raise InputError(f"{name} is {what}, which is not read{how}")
    if compression is None and b"\0" in head and head[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        utf16 = head[1::2].count(0) > len(head) // 4 or head[0::2].count(0) > len(head) // 4
        hint = "; if it is UTF-16, give --encoding utf-16-le" if utf16 else ""
        if b"\0" in head[:64] or utf16:
            raise InputError(f"{name} is no text (it holds null bytes){hint}")


def _check_encoding(encoding: str) -> None:
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise InputError(
            f"--encoding {encoding!r} is not known; as in cp1252, latin-1, utf-16"
        ) from None


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
    for delimiter in _DELIMITERS:
        columns = set(next(csv.reader([first_line], delimiter=delimiter), []))
        if "prompt" in columns or (template is not None and template.roots(columns) <= columns):
            return "csv"
    return "text"


# -- JSON


def _is_document(stream: IO[bytes], head: bytes) -> bool:
    """Whether a .json file is one document, not a row a line."""
    start = head.removeprefix(_BOM).lstrip()
    if start[:1] == b"[":
        return True
    line, newline, _ = start.partition(b"\n")
    if not newline or start[:1] != b"{":
        return False
    try:
        json.loads(line)
    except ValueError:
        return len(line) < 400  # not a long row whose end is not here
    return False


def _json_document(stream: IO[bytes], source: str, name: str) -> Read:
    """The elements of one JSON array, read one by one."""
    text = codecs.getreader("utf-8-sig")(stream)
    decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
    buffer, number, begun, wanted = "", 0, False, 1
    while True:
        try:
            more = text.read(64 * 1024 * wanted)
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 ({error.reason}); give its --encoding") from None
        buffer = (buffer + more).lstrip()
        if not begun and buffer:
            if buffer[0] != "[":
                raise InputError(_not_an_array(buffer + text.read(), source, name))
            begun, buffer = True, buffer[1:]
        while buffer := buffer.lstrip(" \t\r\n,"):
            if buffer[0] == "]":
                return
            try:
                value, end = decoder.raw_decode(buffer)
            except ValueError as error:
                if more and len(buffer) < MAX_LINE_BYTES:
                    break  # its end has not been read yet
                raise InputError(
                    f"{name}: element {number + 1} is not JSON ({str(error)[:60]})"
                ) from None
            except RecursionError:
                raise InputError(f"{name}: element {number + 1} is nested too deeply") from None
            if end == len(buffer) and more and not isinstance(value, dict | list | str):
                break  # a number may go on
            number, buffer, wanted = number + 1, buffer[end:], 1
            if isinstance(value, dict):
                yield number, value
            else:
                yield BadLine(number, f"not a JSON object but {json_type(value)}", str(value)[:200])
        wanted = min(wanted * 2, 256)
        if not more:
            if begun:
                raise InputError(f"{name}: the JSON array has no end after element {number}")
            return


def _not_an_array(document: str, source: str, name: str) -> str:
    file = shlex.quote(source)
    try:
        value = json.loads(document)
    except (ValueError, RecursionError):
        what = f"{name} is neither rows of JSON nor a JSON array"
        return f"{what}: make rows of it (jq -c . {file} > rows.jsonl)"
    lists = [key for key, items in value.items() if isinstance(items, list)]
    path = f".{json.dumps(lists[0])}[]" if lists else "."
    return f"{name} is one JSON object: make rows of it (jq -c '{path}' {file} > rows.jsonl)"


def json_type(value: Any) -> str:
    """The JSON type of a value, for messages."""
    names = {
        dict: "an object", list: "a list", bool: "true or false", int: "a number",
        float: "a number", str: "a text", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


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
        return bad(f"not UTF-8 (byte {error.start + 1}){_ENCODING_HINT}")
    except UnicodeEncodeError:
        return bad("half a surrogate pair (\\ud...) is not text", item_id=_id_in(raw))
    except json.JSONDecodeError as error:
        return bad(f"not JSON ({error.msg}, column {error.colno})")
    except RecursionError:
        return bad("not JSON that can be read: nested too deeply")
    except ValueError as error:
        return bad(f"not JSON ({str(error)[:80]})", item_id=_id_in(raw))
    if not isinstance(row, dict):
        return bad(f"not a JSON object but {json_type(row)}")
    return number, row


def _id_in(raw: bytes) -> str | None:
    """The id of a row that is JSON to Python alone (NaN, half a surrogate pair)."""
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    found = [row.get(name) for name in ("item_id", "custom_id")] if isinstance(row, dict) else []
    ids = [str(one) for one in found if isinstance(one, str | int) and not isinstance(one, bool)]
    return ids[0] if ids and ids[0].strip() and ids[0].isprintable() else None


def _too_long(number: int) -> BadLine:
    return BadLine(number, f"longer than {MAX_LINE_BYTES // 1024 // 1024} MiB")


# -- lines

_ENCODING_HINT = "; a file of another encoding needs --encoding, as cp1252"


def _text(lines: Iterator[Line]) -> Read:
    for number, raw in lines:
        if raw is None:
            yield _too_long(number)
        elif raw.strip():
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                why = f"not UTF-8 (byte {error.start + 1}){_ENCODING_HINT}"
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


def _csv(
    lines: Iterator[Line], name: str, delimiter: str | None, options: ReadOptions, tail: str
) -> Reading:
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter, lines = _delimiter(lines, delimiter)
    source = _CsvLines(lines)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    try:
        header = next((row for row in reader if row), None)
    except csv.Error as error:
        raise InputError(
            f"{name}: line {source.number}, the header, is not CSV ({error})"
        ) from None
    by = DELIMITER_NAMES.get(delimiter, repr(delimiter))
    if header is None:
        return Reading("csv", "CSV", iter(()))
    check_header(header, name, options)
    words = f"CSV, separated by {by}, {len(header)} columns{tail}"
    return Reading("csv", words, _csv_rows(reader, source, header))


def _delimiter(lines: Iterator[Line], given: str | None) -> tuple[str, Iterator[Line]]:
    """The delimiter, and the lines from the header on: the one that was given, that `sep=;` names,
    or that makes columns of the first lines."""
    first = list(itertools.islice(lines, _SNIFFED_LINES))
    texts = [(raw or b"").decode("utf-8", "replace") for _, raw in first]
    named = next((text for text in texts if text.strip()), "").strip()
    if named[:4].lower() == "sep=" and len(named) == 5:
        position = next(n for n, text in enumerate(texts) if text.strip()) + 1
        return given or named[4], itertools.chain(first[position:], lines)
    if given is None:
        given = max(_DELIMITERS, key=lambda one: _columns(texts, one))
    return given, itertools.chain(first, lines)


def _columns(texts: list[str], delimiter: str) -> float:
    """Columns that a delimiter makes, if most lines have as many; of equals the first one wins."""
    try:
        rows = [
            len(row) for row in csv.reader((t + "\n" for t in texts), delimiter=delimiter) if row
        ]
    except csv.Error:
        rows = [len(row) for row in csv.reader(texts[:1], delimiter=delimiter) if row]
    if not rows or rows[0] < 2:
        return 0
    return rows[0] if sum(row == rows[0] for row in rows) * 2 > len(rows) else 1


def check_header(header: list[str], name: str, options: ReadOptions) -> None:
    """Refuse a header that lacks a column that was asked for."""
    columns = ", ".join(header)[:200]
    if len(set(header)) < len(header):
        raise InputError(f"{name}: a column name stands twice in the header ({columns})")
    names = set(header)
    if missing := sorted(set(options.names) - names):
        raise InputError(f"{name} has no column {missing[0]!r} (its columns: {columns})")
    template = options.template
    wanted = {"prompt"} if template is None else template.roots(names)
    if options.has_text:
        return
    if missing := sorted(wanted - names):
        raise InputError(
            f"{name} has no column {missing[0]!r} (its columns: {columns}); "
            f"name a column in --prompt, as in --prompt {_suggestion(header)}"
        )


_LIKELY = ("text", "content", "body", "question", "review", "message", "description", "title")


def _suggestion(names: Iterable[str]) -> str:
    """A template that a shell takes, with the field that by its name is most likely a text."""
    names = list(names)
    best = next((n for word in _LIKELY for n in names if word in n.lower()), names[0])
    return shlex.quote("Summarise: {" + best + "}")


def suggestion(rows: Sequence[Fields]) -> str:
    """The same, for rows whose values are known: a likely name, else the longest text."""
    texts: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                texts[name] = texts.get(name, 0) + len(value)
    if not texts:
        return _suggestion(map(str, rows[0]))
    likely = [name for name in texts if any(word in name.lower() for word in _LIKELY)]
    return _suggestion([max(likely or texts, key=lambda name: texts[name])])


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
        return BadLine(line, f"not UTF-8{_ENCODING_HINT}", content)
    return line, dict(zip(header, values, strict=True))


# -- tables


def _parquet(source: str, name: str, compression: str | None) -> Read:
    if source == STDIN:
        raise InputError("Parquet can't be read from standard input; give the file's name")
    if compression:
        raise InputError(f"{name} is Parquet inside {compression}: unpack it first")
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
        raise InputError(f"{name} is not Parquet that can be read: {str(error)[:120]}") from None
    return _parquet_rows(file, name, ArrowException)


def _parquet_rows(file: Any, name: str, failure: type[Exception]) -> Read:
    number = 0
    batches = file.iter_batches(batch_size=1000)
    while True:
        try:
            batch = next(batches, None)
        except (OSError, failure) as error:
            raise InputError(f"{name}: broken after row {number} ({str(error)[:100]})") from None
        if batch is None:
            return
        for row in _table_rows(batch):
            number += 1
            if isinstance(row, Exception):
                yield BadLine(number, f"a value that Python can't hold ({row})", f"row {number}")
            else:
                yield number, row


def _table_rows(batch: Any) -> Iterator[Fields | Exception]:
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # a date far off: row by row
        rows = None
    for n in range(batch.num_rows):
        try:
            yield plain(rows[n] if rows is not None else batch.slice(n, 1).to_pylist()[0])
        except (ValueError, OverflowError) as error:
            yield error


def plain(row: Any) -> Any:
    """A value of a table in JSON's types: dates as ISO text, NaN as null."""
    if isinstance(row, float):
        return row if math.isfinite(row) else None
    if row is None or isinstance(row, str | int | bool):
        return row
    if isinstance(row, dict):
        return {str(name): plain(value) for name, value in row.items()}
    if isinstance(row, list | tuple):
        return [plain(value) for value in row]
    if isinstance(row, datetime.datetime | datetime.date | datetime.time):
        return row.isoformat()
    return str(row)


def _excel(stream: IO[bytes], name: str, options: ReadOptions) -> Read:
    try:
        from python_calamine import CalamineWorkbook
    except ImportError:
        raise InputError("Excel needs the extra: pip install 'batchllm-celery[excel]'") from None
    try:
        sheet = CalamineWorkbook.from_filelike(io.BytesIO(stream.read())).get_sheet_by_index(0)
        rows = iter(sheet.to_python(skip_empty_area=False))
    except Exception as error:
        raise InputError(f"{name} is no Excel file that can be read: {str(error)[:100]}") from None
    number = 0
    for values in rows:
        number += 1
        if any(value not in ("", None) for value in values):
            break
    else:
        return iter(())
    width = max(n for n, value in enumerate(values, start=1) if value not in ("", None))
    header = [str(_cell(value)) for value in values[:width]]
    check_header(header, name, options)
    return _excel_rows(rows, header, number)


def _excel_rows(rows: Iterator[list[Any]], header: list[str], number: int) -> Read:
    for values in rows:
        number += 1
        cells = [_cell(value) for value in values[: len(header)]]
        if any(cell is not None for cell in cells):
            yield number, dict(itertools.zip_longest(header, cells))


def _cell(value: Any) -> Any:
    """Excel knows no whole numbers."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return None if value == "" else plain(value)


# -- folders

_IMAGES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".heic"}


def _folder(files: list[Path], folder: Path) -> Read:
    for number, file in enumerate(files, start=1):
        name = file.relative_to(folder).as_posix()
        if file.suffix.lower() in _IMAGES:
            yield BadLine(number, f"{name} is an image; give --attach to send it", name, name)
            continue
        try:
            if file.stat().st_size > MAX_LINE_BYTES:
                raise ValueError(f"is longer than {MAX_LINE_BYTES // 1024 // 1024} MiB")
            text = file.read_bytes().removeprefix(_BOM).decode("utf-8")
        except (OSError, ValueError) as error:
            why = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
            yield BadLine(number, f"{name} {why}", name, name)
        else:
            yield number, {"item_id": name, "file": name, "prompt": text, "text": text}
