"""What `install` leaves in an app, however often it is called."""

from __future__ import annotations

import sys
import types

import pytest
from celery import Celery, signals

from batchllm_celery import event_loop, install
from batchllm_celery.errors import UsageError
from batchllm_celery.queue import RUN_ITEMS
from batchllm_celery.settings import Settings

URL = "redis://localhost:1/0"


def receivers() -> int:
    return len(signals.worker_ready.receivers)


def test_an_app_installed_twice_has_one_runtime() -> None:
    """The second call changes nothing."""
    app = Celery("host", set_as_current=False, broker=URL)
    before = receivers()
    assert install(app) is app
    assert install(app) is app
    assert receivers() == before + 1
    assert RUN_ITEMS in app.tasks


def test_other_settings_the_second_time_are_refused() -> None:
    """Nobody could tell which of them hold."""
    app = Celery("host", set_as_current=False, broker=URL)
    install(app)
    with pytest.raises(UsageError, match="already"):
        install(app, settings=Settings(slots=3))
    with pytest.raises(UsageError, match="already"):
        install(app, redis_url="redis://elsewhere")


@pytest.mark.parametrize(
    ("module", "asked"),
    [("gevent.monkey", "is_module_patched"), ("eventlet.patcher", "is_monkey_patched")],
)
def test_no_uvloop_where_threads_are_greenlets(
    monkeypatch: pytest.MonkeyPatch, module: str, asked: str
) -> None:
    """It waits in C, where no greenlet can run."""
    pytest.importorskip("uvloop")
    assert type(event_loop._new_loop()).__module__.startswith("uvloop")
    patched = types.ModuleType(module)
    setattr(patched, asked, lambda name: True)
    monkeypatch.setitem(sys.modules, module, patched)
    loop = event_loop._new_loop()
    assert type(loop).__module__.startswith("asyncio")
    loop.close()
