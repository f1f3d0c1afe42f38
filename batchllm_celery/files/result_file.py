"""The result file: one line for every item, whatever is killed and when.

    OUT.jsonl            results, nothing else: no header, one line for each index
    .OUT.jsonl.batch     the id of the batch whose results these are; locked by the writer
    .OUT.jsonl.retried   second outcomes of items that have a line already; merged at the end

The batch id is beside the file, because every line of OUT is a result, and not in Redis, because
the file outlives the batch. A result is acknowledged after its fsync. A result that was written and
not acknowledged before a crash is delivered again, and merged like any second outcome.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, cast

from batchllm_celery.errors import UsageError
from batchllm_celery.redaction import printable_json

#: The beginning of `WorkItemResult.to_json`. A line that begins otherwise is parsed in full.
_START = re.compile(rb'\{"item_id": "(?:[^"\\]|\\.)*", "index": (\d+),')
#: Bytes that are read at once.
_CHUNK = 1024 * 1024


class OutputError(UsageError):
    """The result file can't be used or written."""


class ResultRecord(Protocol):
    """One result as the ledger delivers it."""

    @property
    def index(self) -> int: ...
    @property
    def line(self) -> dict[str, Any]: ...
    @property
    def receipt(self) -> str: ...


class Sink(Protocol):
    """Where results go."""

    def write(self, results: Sequence[ResultRecord]) -> None:
        """Take results; `sync` makes them durable."""

    def sync(self) -> str | None:
        """Make results durable. Returns the last receipt to acknowledge; None if it is the same."""

    def finish(self, *, complete: bool = True) -> None:
        """Close. If the batch is `complete`, first write the results that wait for earlier ones."""

    def abandon(self) -> None:
        """Close without a result; remove an empty file that was created here."""


class IndexSet:
    """A set of item indexes, one bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, index: int) -> bool:
        byte = index >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (index & 7) & 1)

    def add(self, index: int) -> None:
        if index in self:
            return
        if (byte := index >> 3) >= len(self._bits):
            self._bits.extend(bytes(max(byte + 1 - len(self._bits), len(self._bits) // 8 + 1024)))
        self._bits[byte] |= 1 << (index & 7)
        self._count += 1


class _WriteOrder:
    """Decides which results are written now, and which receipts may be acknowledged.

    In order of completion every result is written at once. In order of input a result waits until
    all lower indexes have a line. It is not acknowledged meanwhile, so `max_outstanding` of the
    producer bounds how many wait.
    """

    def __init__(self, written: IndexSet, *, ordered: bool) -> None:
        self._written = written
        self._ordered = ordered
        self._next = 0
        self._waiting: dict[int, ResultRecord] = {}
        self._receipts: deque[tuple[int, str]] = deque()

    def take(self, results: Iterable[ResultRecord]) -> Iterator[ResultRecord]:
        for result in results:
            self._receipts.append((result.index, result.receipt))
            if not self._ordered or result.index in self._written:
                yield result
            else:
                self._waiting[result.index] = result
        yield from self._contiguous()

    def _contiguous(self) -> Iterator[ResultRecord]:
        while self._waiting:
            if self._next in self._waiting:
                yield self._waiting.pop(self._next)
            elif self._next not in self._written:
                return
            self._next += 1

    def rest(self) -> list[ResultRecord]:
        """The results that still wait, in order, when the batch brings no more."""
        waiting, self._waiting = self._waiting, {}
        return [waiting[index] for index in sorted(waiting)]

    def settled(self) -> str | None:
        """The last receipt up to which every result has been written."""
        receipt = None
        while self._receipts and self._receipts[0][0] not in self._waiting:
            receipt = self._receipts.popleft()[1]
        return receipt


class StreamSink:
    """Writes results to a pipe or a terminal, in order of completion."""

    def __init__(self, stream: IO[bytes], name: str = "standard output") -> None:
        self._stream = stream
        self._name = name
        self._is_terminal = stream.isatty()
        self._receipt: str | None = None

    def write(self, results: Sequence[ResultRecord]) -> None:
        lines = b"".join(to_line(result.line) for result in results)
        if self._is_terminal:  # an answer may hold control characters
            lines = printable_json(lines.decode()).encode()
        with _explained(self._name):
            self._stream.write(lines)
        if results:
            self._receipt = results[-1].receipt

    def sync(self) -> str | None:
        with _explained(self._name):
            self._stream.flush()
        receipt, self._receipt = self._receipt, None
        return receipt

    def finish(self, *, complete: bool = True) -> None:
        with _explained(self._name):
            self._stream.flush()

    def abandon(self) -> None:
        """Nothing to remove."""


class ResultFile:
    """A result file, opened for one batch by one process.

    Raises:
        OutputError: it is a file of another batch (unless `overwrite`), a file that another process
            writes, a folder, or not permitted; later, that the disk is full.
    """

    def __init__(
        self, path: Path, batch_id: str, *, overwrite: bool = False, ordered: bool = False
    ) -> None:
        self.path = path
        self.written = IndexSet()
        self._retried = path.with_name(f".{path.name}.retried")
        self._owner = path.with_name(f".{path.name}.batch")
        self._order = _WriteOrder(self.written, ordered=ordered)
        self._journal: IO[bytes] | None = None
        self._created = not path.exists()
        self._batch_id = batch_id
        self._ordered = ordered
        self.generation = 1
        """Of the input whose results these are: see `BatchSpec.generation`."""
        self.options: dict[str, str] = {}
        """Hashes of the options that the questions of the results have in common."""
        with _explained(path):
            self._lock = _locked(self._owner, path)
            try:
                self._claim(batch_id, overwrite)
                self._recover()
                self._file = path.open("ab", buffering=0)
            except BaseException:
                self._lock.close()
                raise

    # -- opening ----------------------------------------------------------------------------------

    def _claim(self, batch_id: str, overwrite: bool) -> None:
        self._lock.seek(0)
        owner = _parse_owner(self._lock.read())
        has_results = self.path.exists() and self.path.stat().st_size > 0
        if owner == batch_id:
            self._lock.seek(0)
            known = json.loads(self._lock.read())
            self.generation = int(known.get("generation", 1))
            self.options = dict(known.get("options") or {})
            return
        if has_results and not overwrite:
            raise OutputError(refusal(self.path, owner, batch_id))
        # The old results are removed before the id changes: never old results with a new id.
        self.path.open("wb").close()
        self._retried.unlink(missing_ok=True)
        self._write_owner()
        _sync_folder(self.path)

    def _write_owner(self) -> None:
        owner = {
            "batch_id": self._batch_id,
            "version": 1,
            "generation": self.generation,
            "options": self.options,
        }
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(json.dumps(owner).encode() + b"\n")
        self._lock.flush()
        os.fsync(self._lock.fileno())

    def _recover(self) -> None:
        if not self.path.exists():
            self.path.touch()
        cut_torn_line(self.path)
        for index, _, _ in _lines(self.path):
            self.written.add(index)
        self._size = self.path.stat().st_size
        if self._retried.exists():
            self._merge()

    # -- going on with another input --------------------------------------------------------------

    def lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Offset and object of every line; second outcomes are in their places."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._retried.exists():
            self._merge()
            self._reopen()
        for number, (_, start, line) in enumerate(_lines(self.path), start=1):
            try:
                result = json.loads(line)
                _ = result["item_id"], result["index"], result["success"]
            except (ValueError, KeyError, TypeError):
                raise OutputError(
                    f"{self.path}: line {number} is not a result; move the file away or choose "
                    "another with -o"
                ) from None
            yield start, result

    def gone_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Answers of rows that had gone, each with an offset below zero. Those that were asked for
        again are not among them."""
        path, start = gone_path(self.path), 0
        if not path.exists():
            return
        cut_torn_line(path)
        with path.open("rb") as file:
            for text in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    line = json.loads(text)
                    if line["success"] and not line["metadata"].get("superseded"):
                        yield -1 - start, line
                start += len(text)

    def line_at(self, offset: int) -> dict[str, Any]:
        """The line that begins there, in this file or, below zero, in that of gone answers."""
        path, start = (self.path, offset) if offset >= 0 else (gone_path(self.path), -1 - offset)
        with path.open("rb") as file:
            file.seek(start)
            line: dict[str, Any] = json.loads(file.readline())
        return line

    def accept(self, generation: int, options: dict[str, str]) -> None:
        """Keep beside the file what its results answer."""
        if (generation, options) != (self.generation, self.options):
            self.generation, self.options = generation, options
            with _explained(self.path):
                self._write_owner()

    def replace(
        self,
        lines: Iterable[Mapping[str, Any]],
        gone: Iterable[Mapping[str, Any]],
        taken_back: Collection[int] = (),
    ) -> None:
        """Put other lines into the file, at once; lines that leave it are added to `OUT.gone.jsonl`
        first. Those that it has `taken_back` from there, by their offsets, leave it last."""
        temporary = self.path.with_name(f".{self.path.name}.new")
        with _explained(self.path):
            try:
                self._keep_gone(gone)
                temporary.unlink(missing_ok=True)
                with temporary.open("xb") as target:
                    for line in lines:
                        target.write(to_line(line))
                    target.flush()
                    os.fsync(target.fileno())
                shutil.copymode(self.path, temporary)
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(self.path)
            self._reopen()
            if taken_back:
                self._drop_gone({-1 - offset for offset in taken_back})
        self.written = IndexSet()
        self._order = _WriteOrder(self.written, ordered=self._ordered)
        for index, _, _ in _lines(self.path):
            self.written.add(index)

    def _keep_gone(self, gone: Iterable[Mapping[str, Any]]) -> None:
        kept = None
        for line in gone:
            if kept is None:
                kept = _open_own(gone_path(self.path))
            kept.write(to_line(line))
        if kept is not None:
            kept.flush()
            os.fsync(kept.fileno())
            kept.close()

    def _drop_gone(self, starts: set[int]) -> None:
        path, start = gone_path(self.path), 0
        temporary = path.with_name(f".{path.name}.new")
        with path.open("rb") as file, temporary.open("wb") as target:
            for text in file:
                if start not in starts:
                    target.write(text)
                start += len(text)
        temporary.replace(path)

    def _reopen(self) -> None:
        self._file.close()
        self._file = self.path.open("ab", buffering=0)
        self._size = self.path.stat().st_size

    # -- writing ----------------------------------------------------------------------------------

    def write(self, results: Sequence[ResultRecord]) -> None:
        """Write the results that need not wait; second outcomes go to the journal."""
        new: list[bytes] = []
        again: list[bytes] = []
        for result in self._order.take(results):
            (again if result.index in self.written else new).append(to_line(result.line))
            self.written.add(result.index)
        with _explained(self.path):
            self._append(new)
            self._append_again(again)

    def _append(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        try:
            _write_all(self._file, data)
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)  # no torn line, even on a full disk
            raise
        self._size += len(data)

    def _append_again(self, lines: list[bytes]) -> None:
        if lines:
            self._journal = self._journal or _open_own(self._retried, buffering=0)
            _write_all(self._journal, b"".join(lines))

    def sync(self) -> str | None:
        """Call fsync. Returns the receipt up to which every result is on disk."""
        receipt = self._order.settled()
        if receipt is None:
            return None
        with _explained(self.path):
            os.fsync(self._file.fileno())
            if self._journal is not None:
                os.fsync(self._journal.fileno())
        return receipt

    def finish(self, *, complete: bool = True) -> None:
        """Close; the lines of second outcomes replace the first ones."""
        try:
            with _explained(self.path):
                if complete:
                    rest = self._order.rest()
                    self._append([to_line(result.line) for result in rest])
                    for result in rest:
                        self.written.add(result.index)
                os.fsync(self._file.fileno())
                if self._journal is not None:
                    self._journal.close()
                    self._journal = None
                    self._merge()
        finally:
            self._file.close()
            self._lock.close()

    def abandon(self) -> None:
        """Close without a result; remove an empty file that was created here."""
        if not self._size:
            if self._created:
                self.path.unlink(missing_ok=True)
            self._owner.unlink(missing_ok=True)
        self._file.close()
        self._lock.close()

    def _merge(self) -> None:
        """Rewrite the file: lines of the journal replace those of the same index."""
        cut_torn_line(self._retried)
        latest = {index: (start, len(line)) for index, start, line in _lines(self._retried)}
        temporary = self.path.with_name(f".{self.path.name}.new")
        try:
            temporary.unlink(missing_ok=True)
            with self._retried.open("rb") as journal, temporary.open("xb") as target:
                for index, _, line in _lines(self.path):
                    place = latest.pop(index, None)
                    target.write(line if place is None else _read_at(journal, *place))
                for index, place in latest.items():
                    target.write(_read_at(journal, *place))
                    self.written.add(index)
                target.flush()
                os.fsync(target.fileno())
            shutil.copymode(self.path, temporary)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(self.path)
        self._retried.unlink()
        self._size = self.path.stat().st_size


def gone_path(out: Path) -> Path:
    """Where answers go that a changed input has no row for, or that were asked for again."""
    suffix = ".jsonl" if out.suffix == ".jsonl" else ""
    return out.with_name(f"{out.name.removesuffix(suffix)}.gone.jsonl")


def open_sink(
    out: str | None, batch_id: str, *, overwrite: bool = False, ordered: bool = False
) -> Sink:
    """The sink for `-o OUT`: a result file, or a stream for `-`, a pipe or a device."""
    if out in (None, "-"):
        return StreamSink(sys.stdout.buffer)
    path = Path(str(out))
    if path.exists() and not path.is_dir() and not path.is_file():
        return StreamSink(_open_device(path), str(path))
    return ResultFile(path, batch_id, overwrite=overwrite, ordered=ordered)


def _open_device(path: Path) -> IO[bytes]:
    """A device or a named pipe for writing.

    A pipe that nobody reads is refused: opening it would wait for a reader, for ever and deaf to
    signals.
    """
    with _explained(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO and path.is_fifo():
                raise OutputError(f"{path} is a pipe that nobody reads: start its reader") from None
            raise
        os.set_blocking(descriptor, True)
        return open(descriptor, "wb")


def check_out(out: str, batch_id: str, *, overwrite: bool) -> None:
    """Check that OUT can be used, before anything is enqueued, and change nothing.

    Raises:
        OutputError: as `ResultFile` would.
    """
    path = Path(out)
    if out == "-" or (path.exists() and not path.is_dir() and not path.is_file()):
        return
    if path.is_dir():
        raise OutputError(f"{out} is a folder, not a file")
    if not path.parent.is_dir():
        raise OutputError(f"{out} can't be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{out} can't be written: Permission denied")
    if overwrite or not path.exists() or not path.stat().st_size:
        return
    owner = _owner_of(path)
    if owner != batch_id:
        raise OutputError(refusal(path, owner, batch_id))


def refuse_real_results(out: str) -> None:
    """Refuse for a dry run a file that no dry run wrote, even with `--overwrite`.

    Raises:
        OutputError: naming the file.
    """
    path = Path(out)
    if out == "-" or not path.is_file() or not path.stat().st_size:
        return
    owner = _owner_of(path)
    if owner is None or not owner.startswith("dry-"):
        raise OutputError(
            f"{out} was not written by a dry run, and a dry run replaces nothing else: "
            "choose another file with -o, or leave -o out"
        )


def refusal(path: Path, owner: str | None, batch_id: str) -> str:
    """Why the file is not changed, and what to do instead."""
    if owner is None:
        whose = f"{path} exists and is not known to be of batch {batch_id}"
        return f"{whose}; choose another file with -o, or replace it with --overwrite"
    return (
        f"{path} holds the results of batch {owner}; go on with it (--batch-id {owner}), "
        "choose another file with -o, or replace it with --overwrite"
    )


def to_line(result: Mapping[str, Any]) -> bytes:
    """One line of the file."""
    try:
        return (json.dumps(result, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair in an answer
        return (json.dumps(result) + "\n").encode()


def cut_torn_line(path: Path) -> int:
    """Cut a line that a crash left without its end. Returns how many bytes were cut."""
    with path.open("rb+") as file:
        size = position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - _CHUNK)
            file.seek(start)
            if (end := file.read(position - start).rfind(b"\n")) >= 0:
                position = start + end + 1
                break
            position = start
        file.truncate(position)
    return size - position


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Index, offset in bytes and text of every line."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _index(line, path, number), start, line
            start += len(line)


def _index(line: bytes, path: Path, number: int) -> int:
    if match := _START.match(line):
        return int(match[1])
    try:
        return int(json.loads(line)["index"])
    except (ValueError, KeyError, TypeError):
        raise OutputError(
            f"{path}: line {number} is not a result; move the file away or choose another with -o"
        ) from None


def _read_at(file: IO[bytes], start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _open_own(path: Path, buffering: int = -1) -> IO[bytes]:
    """Open a file of ours beside OUT to read and append; refuse a symbolic link in its place."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    return cast(IO[bytes], os.fdopen(os.open(path, flags, 0o666), "ab+", buffering))


def _locked(owner: Path, path: Path) -> IO[bytes]:
    lock = _open_own(owner)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise OutputError(
            f"{path} is being written by another batchllm; wait for it, or use -o"
        ) from None
    return lock


def _owner_of(path: Path) -> str | None:
    """The batch id beside a result file; None if there is none."""
    owner_file = path.with_name(f".{path.name}.batch")
    return _parse_owner(owner_file.read_bytes()) if owner_file.exists() else None


def _parse_owner(content: bytes) -> str | None:
    try:
        owner = json.loads(content)["batch_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(owner)


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _explained(path: Path | str) -> Iterator[None]:
    """Raise an OSError as an OutputError of one line; a pipe that nobody reads is none."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror or error}") from error
