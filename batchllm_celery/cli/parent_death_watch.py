"""Runs a module, and ends this process when the process that started it dies.

    python -m batchllm_celery.cli.parent_death_watch MODULE ARGS...

The parent holds the writing end of our standard input. The kernel closes that end when the parent
dies, by kill -9 too. We then send ourselves SIGTERM, so that calls in flight are recorded, and kill
our process group after `GRACE_SECONDS`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

#: Seconds from SIGTERM to SIGKILL. No process may be left 10 s after `run` was killed, and the
#: embedded Valkey stops only after its last user.
GRACE_SECONDS = 6.0


def main() -> None:
    """Watch standard input in a thread, and run the module as `python -m` does."""
    threading.Thread(target=_end_with_parent, name="parent-death-watch", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)  # with the children of a prefork pool
    os._exit(1)


if __name__ == "__main__":
    main()
