"""What a run leaves and removes in its state directory: its own things, nobody else's."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from batchllm_celery.embedded import EmbeddedServer
from batchllm_celery.errors import EmbeddedServerError, UsageError
from batchllm_celery.files.result_file import OutputError, ResultFile
from batchllm_celery.settings import Settings, absolute
from tests.unit.test_result_file import result

RUN = [sys.executable, "-m", "batchllm_celery.cli", "run", "rows.jsonl", "--model", "simulated"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's folder, with names in it that a run would like to use."""
    for name in ("notes.txt", "logs/b1/worker-1.log", "logs/mine.log", "elsewhere/kept.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine\n")
    (tmp_path / "logs" / "away").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hello"}\n')
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BATCHLLM_")}
    return subprocess.run(
        [*RUN, "--dry-run", "--workers", "1", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def test_a_state_directory_that_is_a_project_keeps_all_that_was_there(project: Path) -> None:
    """`--state-dir .` and the id of a folder in `logs`: every file is there afterwards, as it was;
    what is new is private."""
    before = tree(project)

    done = run(project, "--state-dir", ".", "--batch-id", "b1")

    assert done.returncode == 0, done.stderr
    after = tree(project)
    assert {name: after.get(name) for name in before} == before
    assert {path.name for path in (project / "logs").iterdir()} == {"b1", "mine.log", "away"}
    for path in [project / "valkey", *(project / "valkey").rglob("*")]:
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize("batch_id", ["..", ".", "../elsewhere", "-x", "b1/", "b\n1", "x" * 10_000])
def test_an_id_that_is_a_path_touches_nothing(project: Path, batch_id: str) -> None:
    """Exit 2 before anything is made or removed."""
    before = tree(project)

    done = run(project, "--state-dir", ".", "--batch-id", batch_id)

    assert done.returncode == 2
    assert "--batch-id" in done.stderr
    assert len(done.stderr) < 300
    assert tree(project) == before


@pytest.mark.parametrize("link", [False, True])
def test_a_strange_folder_is_not_worked_in(tmp_path: Path, link: bool) -> None:
    """A folder `valkey` of somebody else, or a link to one, is refused and stays as it is."""
    theirs = tmp_path / ("theirs" if link else "valkey")
    theirs.mkdir(mode=0o755)
    (theirs / "valkey.log").write_text("mine\n")
    if link:
        (tmp_path / "valkey").symlink_to(theirs)

    with pytest.raises(EmbeddedServerError, match="choose another --state-dir"):
        EmbeddedServer.acquire(tmp_path)

    assert tree(theirs) == {str(theirs / "valkey.log"): b"mine\n"}
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o755


def test_an_empty_file_of_the_users_is_not_removed(tmp_path: Path) -> None:
    """A run that ends before it began removes the empty file that it made, no other."""
    theirs, ours = tmp_path / "theirs.jsonl", tmp_path / "ours.jsonl"
    theirs.touch()

    ResultFile(theirs, "a").abandon()
    ResultFile(ours, "a").abandon()

    assert theirs.exists()
    assert not ours.exists()


@pytest.mark.parametrize("name", [".out.jsonl.batch", ".out.jsonl.retried", ".out.jsonl.new"])
def test_a_link_beside_the_result_file_is_not_followed(tmp_path: Path, name: str) -> None:
    """Whoever can write into the folder must not choose what else we write to."""
    target, out = tmp_path / "target", tmp_path / "out.jsonl"
    target.write_text("mine\n")
    if name.endswith(".batch"):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(ValueError, match="can't be written"):
            ResultFile(out, "a")
    else:
        file = ResultFile(out, "a")
        (tmp_path / name).symlink_to(target)
        file.write([result(0, "one")])
        with contextlib.suppress(OutputError):
            file.write([result(0, "two")])
        file.finish()
    assert target.read_text() == "mine\n"


def test_without_a_home_only_what_needs_a_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a container under a user id of nobody: a Redis elsewhere needs no home."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_STATE_HOME", "BATCHLLM_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    settings = Settings(redis_url="redis://elsewhere")
    with pytest.raises(UsageError, match="BATCHLLM_STATE_DIR"):
        EmbeddedServer.acquire(settings.state_dir)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(absolute(settings.state_dir)) == "/home/somebody/.local/state/batchllm"
