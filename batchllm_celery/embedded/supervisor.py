"""Owns one Valkey on one folder: starts it, restarts it, stops it when its last user is gone.

Run as a script of its own, in a session of its own, on nothing but the standard library:

    python -I -S guardian.py FOLDER SOCKET VALKEY-SERVER

The kernel's locks are the only truth, because they end with their holders, however these die:

    users.lock     shared by every user; the guardian that can take it alone stops the server
    guardian.lock  held by the guardian: one for each folder
    server.lock    handed to Valkey by the guardian: one server for each folder, even when a
                   guardian was killed

It tells its starter `ready` or `failed WHY` in one line on standard output.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.2
TAKE_OVER_SECONDS = 15.0
STOP_SECONDS = 15.0
SILENCE_SECONDS = 20.0
STABLE_SECONDS = 30.0
LONGEST_RESTART_WAIT = 3.0
LOG_LIMIT = 1_000_000


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file now, or say that somebody else holds it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_lock(path: Path) -> int:
    """Open a lock file, closed on exec."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def is_locked(path: Path) -> bool:
    """Whether somebody holds this lock alone."""
    fd = open_lock(path)
    try:
        return not try_lock(fd, shared=True)
    finally:
        let_go(fd)


def let_go(fd: int) -> None:
    """Unlock and close; a child forked meanwhile holds a copy, which must not keep the lock."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def ask(path: str, command: str, timeout: float = 2.0) -> bytes:
    """The server's reply to an inline command; empty when there is none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout)
        client.connect(path)
        client.sendall(command.encode() + b"\r\n")
        return client.recv(65536)
    return b""


def last_line(log: Path, offset: int) -> str:
    """What the server said last, without its process number and date."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(offset)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        if lines:
            for mark in (" # ", " * ", " - ", " . "):
                lines[-1] = lines[-1].partition(mark)[2] or lines[-1]
            return lines[-1].strip()
    return "it said nothing"


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def arguments(binary: str, address: str) -> list[str]:
    """How Valkey is started: only its socket, everything on disk, nothing thrown away."""
    options = {
        "port": "0",
        "unixsocket": address,
        "unixsocketperm": "700",
        "dir": ".",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "always-show-logo": "no",
    }
    return [binary, *(word for name, value in options.items() for word in (f"--{name}", value))]


def follow_guardian(guardian: int) -> None:
    """In the child, before Valkey: end (in order) when the guardian does, where Linux lets us."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != guardian:
        os._exit(1)


class Guardian:
    """The server of one folder and the locks around it."""

    def __init__(self, folder: Path, address: str, binary: str) -> None:
        self.folder = folder
        self.address = address
        self.binary = binary
        self.log = folder / "valkey.log"
        self.log_offset = 0
        self.guardian_fd = open_lock(folder / "guardian.lock")
        self.users_fd = open_lock(folder / "users.lock")
        self.server: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0

    def run(self, say: Callable[[str], None]) -> None:
        """Everything, until nobody uses the server any more."""
        # Patient, because somebody may just be looking whether the lock is held.
        if not wait_for(lambda: try_lock(self.guardian_fd), 1.0):
            return  # another guardian was faster
        problem = self.start() or self.wait_until_up()
        if problem is None:
            say("ready")
            self.watch()
        self.stop()
        if problem is not None:
            say(f"failed {problem}")

    def start(self) -> str | None:
        """Start Valkey; None, or why it can't be started."""
        lock = open_lock(self.folder / "server.lock")
        try:
            if not self.outlast_orphan(lock):
                return "another Valkey holds the folder and does not end"
            self.server = self.spawn(lock)
            self.started_at = time.monotonic()
        except OSError as error:
            return str(error)
        finally:
            os.close(lock)  # the server (with its forks) is the only holder from here on
        return None

    def outlast_orphan(self, lock: int) -> bool:
        """Take the server's lock, once the server of a killed guardian has ended.

        On Linux it is told to when its guardian dies; elsewhere we tell it.
        """
        started = time.monotonic()

        def ended() -> bool:
            if try_lock(lock):
                return True
            if time.monotonic() > started + 1.0:
                ask(self.address, "SHUTDOWN")
            return False

        return wait_for(ended, TAKE_OVER_SECONDS)

    def spawn(self, lock: int) -> subprocess.Popen[bytes]:
        guardian = os.getpid()
        with self.log.open("ab") as log:
            if log.tell() > LOG_LIMIT:
                log.truncate(0)
            self.log_offset = os.fstat(log.fileno()).st_size
            return subprocess.Popen(
                arguments(self.binary, self.address),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                preexec_fn=lambda: follow_guardian(guardian),
            )

    def wait_until_up(self) -> str | None:
        """None as soon as the server answers, however long it loads; else what it said last."""
        heard = time.monotonic()
        while not self.has_ended() and time.monotonic() < heard + SILENCE_SECONDS:
            if self.is_abandoned():
                return "nobody waits for it"
            reply = ask(self.address, "PING")
            if reply.startswith(b"+PONG"):
                return None
            if reply:
                heard = time.monotonic()
            time.sleep(0.01)
        return last_line(self.log, self.log_offset)

    def has_ended(self) -> bool:
        return self.server is None or self.server.poll() is not None

    def watch(self) -> None:
        """Keep the server up for as long as anybody uses it."""
        failures = 0
        while not self.is_abandoned():
            if self.has_ended():
                time.sleep(min(0.1 * failures, LONGEST_RESTART_WAIT))
                self.start()
                failures += 1
            elif time.monotonic() > self.started_at + STABLE_SECONDS:
                failures = 0
            time.sleep(POLL_SECONDS)

    def is_abandoned(self) -> bool:
        """Whether no user is left. We then hold their lock: a new one waits until we are gone."""
        return try_lock(self.users_fd) or self.folder_is_gone()

    def folder_is_gone(self) -> bool:
        try:
            now = os.stat(self.folder / "guardian.lock")
        except OSError:
            return True
        return not os.path.samestat(now, os.fstat(self.guardian_fd))

    def stop(self) -> None:
        """Stop the server in order: SIGTERM makes it write its AOF to the end."""
        if self.server is None or self.server.poll() is not None:
            return
        self.server.terminate()
        try:
            self.server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()


def say(line: str) -> None:
    """Tell the starter; it may be gone already."""
    with contextlib.suppress(OSError):
        os.write(1, line.encode(errors="replace") + b"\n")
    os.dup2(2, 1)  # the starter reads until we let go


def main(folder: str, address: str, binary: str) -> None:
    """Become a daemon that only ends when it is not needed."""
    if os.fork():
        os._exit(0)  # so the starter has no child to wait for
    os.umask(0o077)  # prompts and answers are in what the server writes
    log = os.open(Path(folder) / "valkey.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    os.close(log)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # Whoever stops a whole group of processes stops the users too, and they need us to drain.
        signal.signal(number, signal.SIG_IGN)
    try:
        Guardian(Path(folder), address, binary).run(say)
    except Exception as error:
        say(f"failed {type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
