"""How the package behaves in somebody else's process: imports, forks, modules that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.fleet import Fleet
from tests.support import wait_until

QUIET = ("--without-mingle", "--without-gossip", "--loglevel", "INFO")
BROKEN = {
    "zero": "1 / 0",
    "name": "import os\nos.environ['NO_SUCH_SETTING']",
    "importing": "import no_such_package",
    "syntax": "def broken(:",
    "exit": "import sys\nsys.exit(0)",
    "base": "class Odd(BaseException): pass\nraise Odd('odd')",
}


def modules(fleet: Fleet, sources: dict[str, str]) -> None:
    for name, source in sources.items():
        (fleet.folder / f"app_{name}.py").write_text(source)
    fleet.env["PYTHONPATH"] = f"{fleet.folder}:{fleet.env['PYTHONPATH']}"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("pool", [(), ("-P", "prefork", "-c", "2")], ids=["ours", "prefork"])
def test_a_worker_whose_module_fails_does_not_start(fleet: Fleet, pool: tuple[str, ...]) -> None:
    """Whatever the module raises: an exit code, one line that says what, and never `ready`."""
    modules(fleet, BROKEN)
    started = {}
    for name in BROKEN:
        fleet.env["BATCHLLM_APP"] = f"app_{name}"
        started[name] = fleet.start_celery_worker(*QUIET, *pool, name=name)
    for name, process in started.items():
        assert process.wait(60) == os.EX_CONFIG, fleet.said(name)
        assert f"Error: --app 'app_{name}'" in fleet.said(name)
        assert " ready." not in fleet.said(name)
    assert "app_zero.py:1" in fleet.said("zero")
    assert "app_name.py:2" in fleet.said("name")
    assert "NO_SUCH_SETTING" in fleet.said("name")


@pytest.mark.timeout(120)
def test_the_command_ends_with_its_workers_words(fleet: Fleet) -> None:
    """`batchllm worker` imports nothing itself; a child that can't ends the start, exit 2."""
    modules(fleet, BROKEN)
    for name in ("zero", "exit"):
        done = fleet.run("worker", "--processes", "2", "--app", f"app_{name}")
        assert done.returncode == 2, done.stderr
        assert f"Error: --app 'app_{name}'" in done.stderr
        assert "can't import its --app" in done.stderr


@pytest.mark.timeout(120)
def test_a_module_is_imported_once_by_each_process_that_needs_it(fleet: Fleet) -> None:
    """Not by the command that starts workers; under prefork by the parent, before the fork."""
    note = "import os\nwith open({!r}, 'a') as file:\n    file.write(f'{{os.getpid()}}\\n')\n"
    pids = {name: fleet.folder / f"{name}.pids" for name in ("children", "forked")}
    modules(fleet, {name: note.format(str(file)) for name, file in pids.items()})
    fleet.start("worker", "--processes", "2", "--app", "app_children", name="command")
    fleet.env["BATCHLLM_APP"] = "app_forked"
    prefork = fleet.start_celery_worker(*QUIET, "-P", "prefork", "-c", "2", name="prefork")
    wait_until(lambda: fleet.said("command").count(" ready.") == 2, 60)
    wait_until(lambda: " ready." in fleet.said("prefork"), 60)
    command = fleet.processes[0].pid
    imported = pids["children"].read_text().split()
    assert len(set(imported)) == len(imported) == 2
    assert str(command) not in imported
    assert pids["forked"].read_text().split() == [str(prefork.pid)]


_LOOK = """
import copy, inspect, os, pickle, pydoc, socket, sys, threading

def no_socket(*args, **kwargs):
    raise AssertionError("a socket")

import batchllm_celery
assert "celery" not in sys.modules and "redis" not in sys.modules
socket.socket.connect = no_socket
dir(batchllm_celery), inspect.getmembers(batchllm_celery), pydoc.render_doc(batchllm_celery)
assert hasattr(batchllm_celery, "app")
app = batchllm_celery.app
repr(app), dir(app), pydoc.render_doc(app), app.tasks, app.conf.task_default_queue
inspect.getmembers(batchllm_celery)
copy.copy(app), pickle.loads(pickle.dumps(app))
for module in list(sys.modules.values()):
    hasattr(module, "app")
assert threading.active_count() == 1, threading.enumerate()
assert not os.path.exists(sys.argv[1]), os.listdir(sys.argv[1])
print("nothing")
"""


def test_importing_and_looking_start_nothing(tmp_path: Path) -> None:
    """No Valkey, no socket, no thread, no folder, until the app is used for real."""
    state = tmp_path / "state"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BATCHLLM_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOOK, str(state)],
        env=environment | {"BATCHLLM_STATE_DIR": str(state)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "nothing\n", done.stderr


_FORKING = """
import os, sys
from batchllm_celery import LLMCallStrategy, Producer
producer = Producer()
first = producer.submit(["one"], strategy="napping", batch_id="before")
for number in range(2):  # as `gunicorn --preload` does
    if (child := os.fork()) == 0:
        batch = producer.submit(["two", "three"], strategy="napping", batch_id=f"child-{number}")
        assert batch.progress().fed == 2
        assert first.progress().fed == 1
        producer.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
assert producer.submit(["four"], strategy="napping", batch_id="after").progress().fed == 1
assert len(producer.batches()) == 4
print("all")
"""


def test_a_producer_that_was_used_before_a_fork_works_in_the_children(fleet: Fleet) -> None:
    """Each child opens its own connections; the parent's go on."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORKING],
        env=fleet.env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "all\n", done.stderr
