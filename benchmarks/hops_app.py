"""Notes which functions of the package a worker enters (`BATCHLLM_APP` of `hops.py`).

Imported before the event loop's thread starts, so that both threads an item passes through are
seen: Celery's and the loop's. What runs in other threads is left out.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import batchllm_celery

PACKAGE = str(Path(str(batchllm_celery.__file__)).parent) + os.sep
FOLDER = Path(os.environ["BENCH_NOTES"])

_seen: set[CodeType] = set()
_recording = False


def _note(frame: FrameType, event: str, _: Any) -> None:
    if _recording and event == "call":
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            thread = threading.current_thread().name
            if "heartbeat" not in thread:
                _seen.add(code)


def _follow_orders() -> None:
    """Begin when `hops.py` makes the file `record`, write what was seen when it is gone."""
    global _recording
    order = FOLDER / "record"
    while not order.exists():
        time.sleep(0.02)
    _recording = True
    while order.exists():
        time.sleep(0.02)
    _recording = False
    seen = sorted((c.co_filename.removeprefix(PACKAGE), c.co_qualname) for c in _seen)
    (FOLDER / "hops.new").write_text(json.dumps(seen))
    (FOLDER / "hops.new").rename(FOLDER / "hops.json")


sys.setprofile(_note)
threading.Thread(target=_follow_orders, daemon=True).start()
threading.setprofile(_note)
