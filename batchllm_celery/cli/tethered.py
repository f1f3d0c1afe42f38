"""`python -m batchllm_celery.cli.tethered MODULE ARGS...`: run a module until standard input ends.

Whoever starts us holds the other end of the pipe, so we end when it does, by whatever means,
kill -9 included: first as on SIGTERM (calls in flight may be recorded), then for certain.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

#: The promise is that nothing is left 10 s after `run` was killed; Valkey needs a moment after us.
GRACE_SECONDS = 6.0


def main() -> None:
    """Watch standard input from a thread; run the module as `python -m` would."""
    threading.Thread(target=_end_with_stdin, name="tether", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)  # with the children of a prefork pool
    os._exit(1)


if __name__ == "__main__":
    main()
