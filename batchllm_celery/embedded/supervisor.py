"""The supervisor of one embedded Valkey: starts it, restarts it, stops it after its last user.

It runs as a script in a session of its own and imports only the standard library:

    python -I -S supervisor.py FOLDER SOCKET VALKEY-SERVER

File locks say who is alive, because the kernel releases them however their holder dies:

    users.lock       shared by every user; a supervisor that gets it exclusively stops the server
    supervisor.lock  held by the supervisor, so that each folder has one
    server.lock      passed on to Valkey by the supervisor, so that each folder has one server even
                     after a supervisor was killed

The supervisor reports `ready` or `failed WHY` in one line on standard output.
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

#: Seconds between two looks at the server and its users.
POLL_SECONDS = 0.2
#: Seconds that the server of a killed supervisor may take to end.
ORPHAN_SECONDS = 15.0
#: Seconds from SIGTERM to SIGKILL.
STOP_SECONDS = 15.0
#: Seconds without any reply after which a start has failed.
SILENCE_SECONDS = 20.0
#: Seconds of life after which earlier failures of the server no longer count.
STABLE_SECONDS = 30.0
#: The longest wait before a restart, in seconds.
LONGEST_RESTART_WAIT = 3.0
#: Bytes of the server's log above which a start empties it.
LOG_LIMIT = 1_000_000


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting. Returns False if another process holds the lock."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_lock(path: Path) -> int:
    """Open a lock file, closed on exec."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock exclusively."""
    fd = open_lock(path)
    try:
        return not try_lock(fd, shared=True)
    finally:
        unlock(fd)


def unlock(fd: int) -> None:
    """Unlock and close. Closing alone would leave the lock to a copy in a forked child."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def ask(path: str, command: str, timeout: float = 2.0) -> bytes:
    """The server's reply to an inline command; empty if it does not reply in `timeout` seconds."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout)
        client.connect(path)
        client.sendall(command.encode() + b"\r\n")
        return client.recv(65536)
    return b""


def last_line(log: Path, offset: int) -> str:
    """The last line of the server's log, without process number and date."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(offset)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        if lines:
            for mark in (" # ", " * ", " - ", " . "):
                lines[-1] = lines[-1].partition(mark)[2] or lines[-1]
            return lines[-1].strip()
    return "it said nothing"


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Poll `condition`. Returns whether it became true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def arguments(binary: str, address: str) -> list[str]:
    """The command line of Valkey: Unix socket only, append-only file, no eviction."""
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


def end_with_supervisor(supervisor: int) -> None:
    """Ask Linux, in the child, to send SIGTERM to Valkey when the supervisor dies."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != supervisor:
        os._exit(1)


class Supervisor:
    """The server of one folder, and the folder's locks."""

    def __init__(self, folder: Path, address: str, binary: str) -> None:
        self.folder = folder
        self.address = address
        self.binary = binary
        self.log = folder / "valkey.log"
        self.log_offset = 0
        self.supervisor_fd = open_lock(folder / "supervisor.lock")
        self.users_fd = open_lock(folder / "users.lock")
        self.server: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0

    def run(self, report: Callable[[str], None]) -> None:
        """Run the server until it has no user."""
        # `is_locked` of another process may hold the lock for a moment.
        if not wait_for(lambda: try_lock(self.supervisor_fd), 1.0):
            return  # another supervisor was faster
        problem = self.start() or self.wait_until_up()
        if problem is None:
            report("ready")
            self.watch()
        self.stop()
        if problem is not None:
            report(f"failed {problem}")

    def start(self) -> str | None:
        """Start Valkey. Returns None, or why it can't be started."""
        lock = open_lock(self.folder / "server.lock")
        try:
            if not self.take_server_lock(lock):
                return "another Valkey holds the folder and does not end"
            self.server = self.spawn(lock)
            self.started_at = time.monotonic()
        except OSError as error:
            return str(error)
        finally:
            os.close(lock)  # from here on only the server and its forks hold it
        return None

    def take_server_lock(self, lock: int) -> bool:
        """Take the server's lock when the server of a killed supervisor, an orphan, has ended.

        Linux ends an orphan by SIGTERM. Elsewhere we send it SHUTDOWN.
        """
        started = time.monotonic()

        def ended() -> bool:
            if try_lock(lock):
                return True
            if time.monotonic() > started + 1.0:
                ask(self.address, "SHUTDOWN")
            return False

        return wait_for(ended, ORPHAN_SECONDS)

    def spawn(self, lock: int) -> subprocess.Popen[bytes]:
        supervisor = os.getpid()
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
                preexec_fn=lambda: end_with_supervisor(supervisor),
            )

    def wait_until_up(self) -> str | None:
        """Wait for the server to load. Returns None, or the last line of its log if it failed."""
        replied_at = time.monotonic()
        while not self.has_ended() and time.monotonic() < replied_at + SILENCE_SECONDS:
            if self.is_abandoned():
                return "nobody waits for it"
            reply = ask(self.address, "PING")
            if reply.startswith(b"+PONG"):
                return None
            if reply:
                replied_at = time.monotonic()
            time.sleep(0.01)
        return last_line(self.log, self.log_offset)

    def has_ended(self) -> bool:
        return self.server is None or self.server.poll() is not None

    def watch(self) -> None:
        """Restart the server when it ends, until it has no user."""
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
        """Whether no user is left. If so we hold the users' lock, and a new user waits."""
        return try_lock(self.users_fd) or self.folder_is_gone()

    def folder_is_gone(self) -> bool:
        try:
            now = os.stat(self.folder / "supervisor.lock")
        except OSError:
            return True
        return not os.path.samestat(now, os.fstat(self.supervisor_fd))

    def stop(self) -> None:
        """Stop the server. On SIGTERM it writes its append-only file to the end."""
        if self.server is None or self.server.poll() is not None:
            return
        self.server.terminate()
        try:
            self.server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()


def report(line: str) -> None:
    """Write a line to the process that started us, which may have ended."""
    with contextlib.suppress(OSError):
        os.write(1, line.encode(errors="replace") + b"\n")
    os.dup2(2, 1)  # the starter reads until its pipe is closed


def main(folder: str, address: str, binary: str) -> None:
    """Become a daemon and run the supervisor."""
    if os.fork():
        os._exit(0)  # so the starter has no child to wait for
    os.umask(0o077)  # prompts and answers are in what the server writes
    log = os.open(Path(folder) / "valkey.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    os.close(log)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # A signal to the whole process group stops the users too. They need the server to drain.
        signal.signal(number, signal.SIG_IGN)
    try:
        Supervisor(Path(folder), address, binary).run(report)
    except Exception as error:
        report(f"failed {type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
