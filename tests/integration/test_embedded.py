"""The embedded Valkey: one server for a folder, whoever starts, dies or lets go."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis

from batchllm_celery import embedded
from batchllm_celery.embedded import EmbeddedServer, supervisor
from batchllm_celery.errors import EmbeddedServerError
from batchllm_celery.settings import Settings
from tests.support import wait_until

USER = """
import sys
from pathlib import Path
from batchllm_celery.embedded import EmbeddedServer
server = EmbeddedServer.acquire(Path(sys.argv[1]))
print(server.pid, server.url, flush=True)
sys.stdin.read()
server.release()
"""
CHURN = """
import sys
from pathlib import Path
import redis
from batchllm_celery.embedded import EmbeddedServer
for _ in range(int(sys.argv[2])):
    server = EmbeddedServer.acquire(Path(sys.argv[1]))
    with redis.Redis.from_url(server.url) as client:
        client.incr("count")
    server.release()
"""


class User:
    """A process of its own that uses the server until it is told to let go, or killed."""

    def __init__(self, state_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(state_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def attached(self) -> tuple[int, str]:
        assert self.process.stdout is not None
        pid, url = self.process.stdout.readline().split()
        return int(pid), url

    def unlock(self) -> None:
        self.process.communicate(timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def servers(state_dir: Path) -> list[int]:
    """Processes of Valkey that work in this folder."""
    return _processes("valkey-server", lambda found: found.cwd() == str(state_dir / "valkey"))


def supervisors(state_dir: Path) -> list[int]:
    return _processes("python", lambda found: str(state_dir / "valkey") in found.cmdline())


def _processes(name: str, belongs: Callable[[psutil.Process], bool]) -> list[int]:
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.info["name"].startswith(name) and belongs(process):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def nothing_left(state_dir: Path) -> bool:
    return not servers(state_dir) and not supervisors(state_dir)


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path.resolve() / "state"
    yield folder
    wait_until(lambda: nothing_left(folder), timeout=10)


@pytest.fixture
def new_user(state_dir: Path) -> Iterator[Callable[[], User]]:
    users: list[User] = []

    def start() -> User:
        users.append(User(state_dir))
        return users[-1]

    yield start
    for user in users:
        user.kill()


@pytest.fixture
def server(state_dir: Path) -> Iterator[EmbeddedServer]:
    acquired = EmbeddedServer.acquire(state_dir)
    yield acquired
    acquired.release()


def test_eight_processes_that_race_share_one_server(
    new_user: Callable[[], User], state_dir: Path
) -> None:
    """However many start at once, one server is started and all attach to it; the last stops it."""
    users = [new_user() for _ in range(8)]
    answers = {user.attached() for user in users}
    (pid,) = servers(state_dir)
    assert answers == {(pid, f"unix://{state_dir}/valkey/valkey.sock")}
    assert len(supervisors(state_dir)) == 1
    for user in users[:-1]:
        user.unlock()
    assert servers(state_dir) == [pid]
    users[-1].unlock()
    assert nothing_left(state_dir)


def test_what_was_written_is_there_at_the_next_start(state_dir: Path) -> None:
    """The last user's release stops the server in order and its data is read at the next start."""
    for turn in range(1, 4):
        server = EmbeddedServer.acquire(state_dir)
        with redis.Redis.from_url(server.url) as client:
            assert client.incr("turns") == turn
        server.release()
        server.release()
        assert nothing_left(state_dir)


def test_users_that_come_and_go_never_meet_two_servers(state_dir: Path) -> None:
    """Starts and stops may fall together in any way: no write is lost, so there was one server."""
    churners = [
        subprocess.Popen([sys.executable, "-c", CHURN, str(state_dir), "4"]) for _ in range(4)
    ]
    most = 0
    while any(process.poll() is None for process in churners):
        most = max(most, len(servers(state_dir)))
        time.sleep(0.05)  # a look at all processes of the machine is not free
    assert [process.returncode for process in churners] == [0] * 4
    assert most <= 1
    last = EmbeddedServer.acquire(state_dir)
    with redis.Redis.from_url(last.url) as client:
        assert client.get("count") == b"16"
    last.release()


def test_no_server_is_left_when_all_users_are_killed(
    new_user: Callable[[], User], state_dir: Path
) -> None:
    """kill -9 of every user leaves neither Valkey nor supervisor ten seconds later."""
    users = [new_user() for _ in range(3)]
    for user in users:
        user.attached()
    for user in users:
        user.kill()
    wait_until(lambda: nothing_left(state_dir), timeout=10)


def test_one_user_killed_is_not_felt_by_the_others(
    new_user: Callable[[], User], state_dir: Path, server: EmbeddedServer
) -> None:
    """The server goes on while anybody uses it, even when the one who started it was killed."""
    starter, pid = new_user(), server.pid
    starter.attached()
    starter.kill()
    with redis.Redis.from_url(server.url) as client:
        wait_until(lambda: client.info("server")["uptime_in_seconds"] >= 1)
    assert servers(state_dir) == [pid]


def test_a_killed_server_comes_back_with_all_it_had_acknowledged(
    state_dir: Path, server: EmbeddedServer
) -> None:
    """kill -9 of Valkey: its supervisor starts it again on the same socket and the same data."""
    killed = server.pid
    with redis.Redis.from_url(server.url) as client:
        for number in range(500):
            client.rpush("list", number)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: _answers(server.url), timeout=5)
        assert client.llen("list") == 500
    assert server.pid != killed
    assert servers(state_dir) == [server.pid]


def test_a_server_that_keeps_dying_keeps_coming_back(server: EmbeddedServer) -> None:
    """Three kills in a row are three restarts."""
    for _ in range(3):
        _kill_and_await_restart(server)


def test_ensure_replaces_a_killed_supervisor(state_dir: Path, server: EmbeddedServer) -> None:
    """A killed supervisor takes its server along; the next `ensure` starts both again."""
    with redis.Redis.from_url(server.url) as client:
        client.set("kept", "yes")
        _kill_supervisor(state_dir)
        server.ensure()
        assert client.get("kept") == b"yes"
    assert servers(state_dir) == [server.pid]
    assert len(supervisors(state_dir)) == 1


def test_acquire_replaces_a_killed_supervisor(
    new_user: Callable[[], User], state_dir: Path, server: EmbeddedServer
) -> None:
    """Eight that attach just after the supervisor was killed start one server, never a second."""
    _kill_supervisor(state_dir)
    pids = {user.attached()[0] for user in [new_user() for _ in range(8)]}
    assert pids == {server.pid}
    assert servers(state_dir) == [server.pid]


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_no_server_is_left_when_supervisor_and_users_are_killed(
    new_user: Callable[[], User], state_dir: Path
) -> None:
    """Even kill -9 of the supervisor and all users leaves no Valkey behind."""
    user = new_user()
    user.attached()
    _kill_supervisor(state_dir)
    user.kill()
    wait_until(lambda: nothing_left(state_dir), timeout=10)


def test_signals_to_everybody_leave_the_server_to_its_users(
    state_dir: Path, server: EmbeddedServer
) -> None:
    """SIGINT and SIGTERM to the supervisor's group do not take Valkey from users that drain."""
    (supervising,) = supervisors(state_dir)
    assert os.getsid(supervising) != os.getsid(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.killpg(os.getpgid(supervising), number)
    wait_until(lambda: _answers(server.url), timeout=10)
    assert supervisors(state_dir) == [supervising]


def test_a_forked_child_keeps_the_server(state_dir: Path) -> None:
    """A use passes on to forked children: the parent's release stops nothing under them."""
    server = EmbeddedServer.acquire(state_dir)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)  # until the parent closes its end
        os._exit(0)
    os.close(reader)
    server.release()
    assert _answers(server.url)
    os.close(writer)
    os.waitpid(child, 0)
    wait_until(lambda: nothing_left(state_dir), timeout=10)


def test_a_torn_tail_of_the_aof_is_cut(state_dir: Path) -> None:
    """A machine that died in mid-write loses the torn command and nothing else."""
    server = EmbeddedServer.acquire(state_dir)
    with redis.Redis.from_url(server.url) as client:
        client.set("kept", "yes")
    server.release()
    with _aof(state_dir).open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$4\r\nto")
    server = EmbeddedServer.acquire(state_dir)
    with redis.Redis.from_url(server.url) as client:
        assert client.keys() == [b"kept"]
    server.release()


def test_a_broken_aof_is_named_in_one_line(state_dir: Path) -> None:
    """A server that can't start is an error of one line with the server's own last words."""
    EmbeddedServer.acquire(state_dir).release()
    _aof(state_dir).write_bytes(b"this is no AOF\n" * 10)
    with pytest.raises(EmbeddedServerError) as caught:
        EmbeddedServer.acquire(state_dir)
    assert "\n" not in str(caught.value)
    assert str(state_dir) in str(caught.value)
    assert "valkey-check-aof" in str(caught.value)


def test_a_folder_that_can_not_be_made_is_named_in_one_line(tmp_path: Path) -> None:
    """A state directory below a file is refused with the folder and the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedServerError, match=r"file/state/valkey.*: Not a directory$"):
        EmbeddedServer.acquire(tmp_path / "file" / "state")


@pytest.mark.parametrize("name", ["long" * 30, "with blank, ünïcode #1 100%?"])
def test_a_folder_that_no_socket_fits_in_gets_a_short_one(tmp_path: Path, name: str) -> None:
    """Paths beyond 107 bytes, or that a URL would garble, listen under /tmp in a folder of 0700."""
    state_dir = tmp_path.resolve() / name
    server = EmbeddedServer.acquire(state_dir)
    socket = Path(server.url.removeprefix("unix://"))
    assert socket.parent == Path(f"/tmp/batchllm-{os.getuid()}")
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    with redis.Redis.from_url(server.url) as client:
        client.set("kept", "yes")
    server.release()
    assert nothing_left(state_dir)
    assert not socket.exists()
    assert _aof(state_dir).stat().st_size > 0


def test_a_socket_path_of_107_bytes_is_listened_on(tmp_path: Path) -> None:
    """The kernel's limit is used to the last byte."""
    room = 107 - len(f"{tmp_path.resolve()}//valkey/valkey.sock")
    state_dir = tmp_path.resolve() / ("x" * room)
    server = EmbeddedServer.acquire(state_dir)
    assert server.url == f"unix://{state_dir}/valkey/valkey.sock"
    assert len(server.url.removeprefix("unix://")) == 107
    assert _answers(server.url)
    server.release()


def test_only_its_owner_can_reach_the_server(state_dir: Path, server: EmbeddedServer) -> None:
    """Prompts are in there: folder and socket are 0700, and there is no TCP port."""
    socket = state_dir / "valkey" / "valkey.sock"
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    with redis.Redis.from_url(server.url) as client:
        config = client.config_get("port", "appendonly", "appendfsync", "maxmemory-policy")
    assert config == {
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
    }


def test_the_supervisor_inherits_no_key(monkeypatch: pytest.MonkeyPatch, state_dir: Path) -> None:
    """Provider keys in a user's environment are not in that of the processes it leaves running."""
    monkeypatch.setenv("GEMINI_API_KEY", "marker-4711")
    server = EmbeddedServer.acquire(state_dir)
    environments = [
        psutil.Process(pid).environ() for pid in (*supervisors(state_dir), *servers(state_dir))
    ]
    server.release()
    assert len(environments) == 2
    assert all("GEMINI_API_KEY" not in environment for environment in environments)


def test_a_deleted_folder_ends_its_server(state_dir: Path, server: EmbeddedServer) -> None:
    """A server whose folder was deleted serves nobody who could find it, and ends."""
    for path in (state_dir / "valkey").glob("*.lock"):
        path.unlink()
    wait_until(lambda: nothing_left(state_dir), timeout=10)


def test_a_process_resolves_its_url_once(state_dir: Path) -> None:
    """Without a Redis URL a process acquires one embedded server and keeps it until its exit."""
    code = (
        "from batchllm_celery.embedded import resolve_url, ensure_embedded\n"
        "from batchllm_celery.settings import Settings\n"
        "first = resolve_url(Settings()); ensure_embedded()\n"
        "assert first == resolve_url(Settings()); print(first)"
    )
    environment = {**os.environ, "BATCHLLM_STATE_DIR": str(state_dir), "BATCHLLM_REDIS_URL": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"unix://{state_dir}/valkey/valkey.sock"
    assert nothing_left(state_dir)


def test_a_redis_url_needs_no_embedded_server(state_dir: Path) -> None:
    """A configured Redis URL is the answer, and nothing is started."""
    settings = Settings(redis_url="redis://elsewhere:6379/0", state_dir=state_dir)
    assert embedded.resolve_url(settings) == "redis://elsewhere:6379/0"
    assert not state_dir.exists()


def test_the_last_words_of_a_server_are_its_last_line(tmp_path: Path) -> None:
    """Of a log only the last line counts, without process number and date, from this start on."""
    log = tmp_path / "valkey.log"
    assert supervisor.last_line(log, 0) == "it said nothing"
    log.write_text("old\n1:M 22 Nov 2026 21:00:29.772 # Bad file format: a # b\n\n")
    assert supervisor.last_line(log, 4) == "Bad file format: a # b"


def _answers(url: str) -> bool:
    return supervisor.ask(url.removeprefix("unix://"), "PING").startswith(b"+PONG")


def _kill_and_await_restart(server: EmbeddedServer) -> None:
    killed = server.pid
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: _answers(server.url) and server.pid != killed, timeout=10)


def _kill_supervisor(state_dir: Path) -> None:
    (supervising,) = supervisors(state_dir)
    os.kill(supervising, signal.SIGKILL)
    wait_until(lambda: not supervisor.is_locked(state_dir / "valkey" / "supervisor.lock"))


def _aof(state_dir: Path) -> Path:
    (found,) = (state_dir / "valkey" / "appendonlydir").glob("*.incr.aof")
    return found
