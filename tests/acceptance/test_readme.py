"""Every block of code in the README and the guides runs as it is written there.

Against real workers and a simulated provider, one folder and one Redis for each document:

- `bash` blocks run in a shell; commands that run till they are stopped (workers, Flower) go to the
  background and stay there for the blocks that follow; `make` is left to CI, which calls it;
- `python` blocks are programs; one that begins with a file's name is a module for the others; one
  that begins with `# illustration` only has to be Python;
- `json` blocks are JSON; `console` blocks need more than this machine has, and are not run.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from batchllm_celery.simulation import spawn
from tests.acceptance.fleet import ROOT
from tests.acceptance.servers import free_port, valkey_on_tcp
from tests.support import wait_until

GUIDES = ("enqueue", "deploy", "flower", "celery", "testing")
DOCUMENTS = ["README.md", *(f"docs/{guide}.md" for guide in GUIDES)]
FOREVER = re.compile(r"(batchllm (worker|flower|simulate)|celery .*\b(worker|beat|flower))\b")
#: A block may not take longer, on a busy machine.
BLOCK_SECONDS = 60


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def blocks_of(document: str) -> list[Block]:
    """The fenced blocks of a Markdown file."""
    source = (ROOT / document).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", source, re.MULTILINE | re.DOTALL)
    return [Block(one[1], one[2], source[: one.start()].count("\n") + 1) for one in found]


@dataclass
class Desk:
    """Where one document is tried out: a folder, an environment, what runs in the background."""

    folder: Path
    environment: dict[str, str]
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, block: Block) -> None:
        runners: dict[str, Callable[[str], object]] = {
            "bash": self.bash,
            "python": self.python,
            "json": json.loads,
        }
        runner = runners.get(block.language)
        assert runner or block.language in ("console", "yaml"), f"line {block.line}: ```what?"
        if runner:
            runner(block.text)

    def bash(self, text: str) -> None:
        """Consecutive lines of a block share a shell, as in a terminal."""
        lines: list[str] = []
        for line in text.splitlines():
            if FOREVER.match(line):
                self._shell(lines)
                lines = [one for one in lines if one.startswith("export ")]
                self._start([*lines, re.sub(r"\s*(&\s*)?(#.*)?$", "", line)])
            elif not line.startswith("make "):
                lines.append(line)
        self._shell(lines)

    def _shell(self, lines: list[str]) -> None:
        if any(not line.startswith("export ") for line in lines if line.strip()):
            self._wait(self._popen(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], "block"))

    def _start(self, lines: list[str]) -> None:
        # One process is enough to show that it works.
        command = re.sub(r"--processes \d+", "--processes 1", "\n".join(lines[:-1]))
        last = re.sub(r"--processes \d+", "--processes 1", lines[-1])
        name = f"background-{len(self.background)}"
        if last.startswith("celery") and "worker" in last:
            last += " --loglevel INFO"  # or it would not say that it is ready
        self.background.append(self._popen(["bash", "-c", f"{command}\nexec {last}"], name))
        ready = " ready." if "worker" in last else "Visit me at"
        wait_until(lambda: ready in self.said(name), timeout=60, interval=0.1)

    def python(self, text: str) -> None:
        if text.startswith("# illustration"):
            compile(text, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            return
        named = re.match(r"# (\w+\.py)\n", text)
        program = self.folder / (named[1] if named else "block.py")
        program.write_text(text)
        if named:
            compile(text, named[1], "exec")
        else:
            self._wait(self._popen([sys.executable, program.name], "block"))

    def _popen(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        try:
            code = process.wait(BLOCK_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert code == 0, self.said("block")

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def clear(self) -> None:
        for process in self.background:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.background:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with spawn(latency=0.05, min_cache_tokens=1000) as provider, valkey_on_tcp() as redis_url:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("BATCHLLM_", "GEMINI_"))}
        desk = Desk(
            tmp_path,
            {
                **clean,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": f"{tmp_path}:{ROOT}",
                "GOOGLE_GEMINI_BASE_URL": provider.url,
                "GEMINI_API_KEY": "simulated",
                "OPENAI_BASE_URL": provider.openai_url,
                "OPENAI_API_KEY": "simulated",
                "BATCHLLM_REDIS_URL": redis_url,
                "BATCHLLM_STATE_DIR": str(tmp_path / "state"),
                "BATCHLLM_FLOWER_PORT": str(free_port()),
                "BATCHLLM_DRAIN_SECONDS": "2",
            },
        )
        try:
            yield desk
        finally:
            desk.clear()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_runs_as_written(document: str, desk: Desk) -> None:
    """From top to bottom, each block does what the document says, without an error."""
    if document == "docs/testing.md" and not entry_points(group="pytest11", name="batchllm"):
        pytest.skip("install the package again: it has a pytest plugin now (make setup)")
    redis_url = desk.environment["BATCHLLM_REDIS_URL"]
    for block in blocks_of(document):
        started = time.monotonic()
        text = block.text.replace("redis://localhost:6379/0", redis_url)
        try:
            desk.run(Block(block.language, text, block.line))
        except (AssertionError, SyntaxError, ValueError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"{document}, line {block.line}: {error}") from error
        print(f"{document}:{block.line} {block.language} {time.monotonic() - started:.1f} s")


def test_all_guides_are_tried() -> None:
    """A guide that the README links and that holds bash or Python belongs to the list above."""
    linked = re.findall(r"\]\((docs/[\w-]+\.md)\)", (ROOT / "README.md").read_text())
    with_code = {
        name
        for name in linked
        if (ROOT / name).exists() and any(b.language == "bash" for b in blocks_of(name))
    }
    assert with_code <= set(DOCUMENTS)
