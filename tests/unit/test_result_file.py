"""The result file: one line for every index, whatever happens between two writes."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_celery.files import result_file
from batchllm_celery.files.result_file import (
    IndexSet,
    OutputError,
    ResultFile,
    StreamSink,
    open_sink,
)


@dataclass(frozen=True)
class Result:
    index: int
    line: dict[str, Any]
    receipt: str


def result(index: int, output: str = "yes", receipt: str | None = None) -> Result:
    line = {"item_id": f'id "{index}"', "index": index, "success": True, "output": output}
    return Result(index, line, receipt or f"{index}-0")


def indexes(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


def outputs(path: Path) -> dict[int, str]:
    lines = map(json.loads, path.read_text().splitlines())
    return {line["index"]: line["output"] for line in lines}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_results_are_written_in_the_order_in_which_they_come(path: Path) -> None:
    """Without --ordered a line is written at once, and its receipt is good after a sync."""
    file = ResultFile(path, "a")
    file.write([result(2), result(0)])
    assert file.sync() == "0-0"
    assert indexes(path) == [2, 0]
    file.finish()


def test_nothing_new_means_nothing_to_acknowledge(path: Path) -> None:
    """A sync without results acknowledges nothing."""
    file = ResultFile(path, "a")
    file.write([result(0)])
    assert file.sync() == "0-0"
    assert file.sync() is None
    file.finish()


def test_ordered_results_wait_for_their_turn_unacknowledged(path: Path) -> None:
    """With --ordered a result waits for those before it, and is not acknowledged meanwhile."""
    file = ResultFile(path, "a", ordered=True)
    file.write([result(0), result(2), result(3)])
    assert file.sync() == "0-0"
    assert indexes(path) == [0]
    file.write([result(1)])
    assert file.sync() == "1-0"
    assert indexes(path) == [0, 1, 2, 3]
    file.finish()


def test_an_interrupted_ordered_file_keeps_its_gap(path: Path) -> None:
    """What waited for its turn when we were interrupted is not written: it comes again."""
    file = ResultFile(path, "a", ordered=True)
    file.write([result(0), result(2)])
    file.finish(complete=False)
    assert indexes(path) == [0]
    again = ResultFile(path, "a", ordered=True)
    again.write([result(2), result(1)])
    assert again.sync() == "1-0"
    again.finish()
    assert indexes(path) == [0, 1, 2]


def test_a_torn_last_line_is_cut_and_the_rest_is_known(path: Path) -> None:
    """After a crash in mid-write the file goes on with its whole lines."""
    first = ResultFile(path, "a")
    first.write([result(0), result(1)])
    first.finish()
    with path.open("ab") as file:
        file.write(b'{"item_id": "id 2", "index": 2, "succ')
    second = ResultFile(path, "a")
    assert [index in second.written for index in range(3)] == [True, True, False]
    second.write([result(2)])
    second.finish()
    assert indexes(path) == [0, 1, 2]


def test_a_second_outcome_replaces_the_first_line(path: Path) -> None:
    """An item that is retried has one line afterwards, in its old place, with the new outcome."""
    file = ResultFile(path, "a")
    file.write([result(0), result(1), result(2)])
    file.write([result(1, "old", "9-0"), result(1, "new", "9-1")])
    assert file.sync() == "9-1"
    assert indexes(path) == [0, 1, 2]  # one line for each index at every moment
    file.finish()
    assert indexes(path) == [0, 1, 2]
    assert outputs(path)[1] == "new"
    assert sorted(file.name for file in path.parent.iterdir()) == [".out.jsonl.batch", "out.jsonl"]


def test_second_outcomes_survive_a_crash(path: Path) -> None:
    """What was acknowledged before a crash is merged at the next start."""
    file = ResultFile(path, "a")
    file.write([result(0), result(1)])
    file.write([result(0, "new", "9-0")])
    file.sync()
    assert file._journal is not None
    for opened in (file._file, file._journal, file._lock):  # as kill -9 does
        opened.close()
    with (path.parent / ".out.jsonl.retried").open("ab") as journal:
        journal.write(b'{"item_id": "torn')
    ResultFile(path, "a").finish()
    assert outputs(path) == {0: "new", 1: "yes"}


def test_a_delivery_that_comes_again_changes_nothing(path: Path) -> None:
    """Written but not acknowledged before a crash: it comes again and stays one line."""
    first = ResultFile(path, "a")
    first.write([result(0)])
    first.finish()
    second = ResultFile(path, "a")
    second.write([result(0), result(1)])
    assert second.sync() == "1-0"
    second.finish()
    assert indexes(path) == [0, 1]


@pytest.mark.parametrize("owner", ["b", None])
def test_a_file_of_another_batch_is_refused(path: Path, owner: str | None) -> None:
    """Results of another batch, or of nobody known, are not touched."""
    if owner:
        other = ResultFile(path, owner)
        other.write([result(0)])
        other.finish()
    else:
        path.write_text("my own notes\n")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        ResultFile(path, "a")
    assert path.read_bytes() == before


def test_overwrite_replaces_a_file_of_another_batch_only(path: Path) -> None:
    """--overwrite empties a foreign file; the batch's own file is continued all the same."""
    path.write_text("my own notes\n")
    first = ResultFile(path, "a", overwrite=True)
    first.write([result(0)])
    first.finish()
    second = ResultFile(path, "a", overwrite=True)
    assert 0 in second.written
    second.finish()


def test_two_writers_at_once_are_refused(path: Path) -> None:
    """The second process that opens the file is told so."""
    first = ResultFile(path, "a")
    with pytest.raises(OutputError, match="another batchllm"):
        ResultFile(path, "a")
    first.finish()


def test_a_full_disk_leaves_whole_lines_and_acknowledges_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk is full the torn part is cut; the batch can go on later."""
    file = ResultFile(path, "a")
    file.write([result(0)])
    file.sync()

    def full(target: Any, data: bytes) -> None:
        os.write(target.fileno(), data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(result_file, "_write_all", full)
        with pytest.raises(OutputError, match="No space left on device"):
            file.write([result(1)])
    assert indexes(path) == [0]
    file.finish(complete=False)
    again = ResultFile(path, "a")
    again.write([result(1)])
    assert again.sync() == "1-0"
    again.finish()
    assert indexes(path) == [0, 1]


@pytest.mark.parametrize("place", ["folder", "missing/out.jsonl", "notes"])
def test_a_place_that_cant_be_written_is_one_clear_line(tmp_path: Path, place: str) -> None:
    """A folder, a missing folder: an OutputError that names the path."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes").mkdir()
    with pytest.raises(OutputError, match=place.split("/")[0]):
        ResultFile(tmp_path / place, "a")


def test_a_line_that_is_no_result_is_named(path: Path) -> None:
    """A file that somebody edited is not appended to."""
    first = ResultFile(path, "a")
    first.write([result(0)])
    first.finish()
    path.write_text(path.read_text() + "edited\n")
    with pytest.raises(OutputError, match="line 2"):
        ResultFile(path, "a")


def test_half_a_surrogate_pair_in_an_answer_is_still_a_line(path: Path) -> None:
    """An answer that is not UTF-8 is escaped, not lost."""
    file = ResultFile(path, "a")
    file.write([result(0, "\ud83d")])
    file.finish()
    assert outputs(path) == {0: "\ud83d"}


def test_a_device_is_a_stream() -> None:
    """-o /dev/null has no memory and refuses nothing."""
    sink = open_sink("/dev/null", "a")
    assert isinstance(sink, StreamSink)
    sink.write([result(0)])
    assert sink.sync() == "0-0"
    sink.finish()
    sink._stream.close()


def test_a_pipe_needs_a_reader(tmp_path: Path) -> None:
    """Opening it without one waited for ever, and no Ctrl-C ended that."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="nobody reads"):
        open_sink(str(pipe), "a")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    sink = open_sink(str(pipe), "a")
    assert isinstance(sink, StreamSink)
    sink.write([result(0)])
    sink.sync()
    assert json.loads(os.read(reader, 1000))["index"] == 0
    sink._stream.close()
    os.close(reader)


def test_a_socket_is_no_place_for_results(tmp_path: Path) -> None:
    """One line that names it, as for every file that can't be written."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(OutputError, match="can't be written"):
            open_sink(str(tmp_path / "s"), "a")


@given(st.sets(st.integers(0, 5000)))
def test_an_index_set_is_a_set(members: set[int]) -> None:
    """The bitmap knows exactly what was added."""
    known = IndexSet()
    for index in members:
        known.add(index)
        known.add(index)
    assert len(known) == len(members)
    assert {index for index in range(5100) if index in known} == members


@given(st.permutations(range(12)), st.lists(st.integers(1, 5), min_size=1))
def test_ordered_output_is_the_input_order(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], sizes: list[int]
) -> None:
    """Whatever order results come in, --ordered writes the input's and acknowledges all."""
    path = tmp_path_factory.mktemp("ordered") / "out.jsonl"
    file = ResultFile(path, "a", ordered=True)
    last, rest = None, [result(index, receipt=str(i)) for i, index in enumerate(order)]
    while rest:
        size = sizes[len(rest) % len(sizes)]
        file.write(rest[:size])
        rest = rest[size:]
        last = file.sync() or last
    file.finish()
    assert indexes(path) == list(range(12))
    assert last == "11"


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_gets_control_characters_escaped(terminal: bool) -> None:
    """The value is the same; a pipe gets the bytes that a file would."""

    class Stream(io.BytesIO):
        def isatty(self) -> bool:
            return terminal

    stream, odd = Stream(), "\x9b31m\u202e\x7f\x1b"
    StreamSink(stream).write([result(0, odd)])
    written = stream.getvalue().decode()
    assert json.loads(written)["output"] == odd
    assert ("\u202e" in written) is not terminal
