"""Every program of examples/ against real workers and the simulated provider."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from batchllm_celery.simulation import SimulationClient, answer_to, spawn
from tests.acceptance.nursery import play
from tests.acceptance.servers import valkey_on_tcp
from tests.support import wait_until

pytestmark = pytest.mark.xdist_group("examples")  # its tests share what they start

EXAMPLES = Path(__file__).parents[2] / "examples"
APPS = "classify,shared_cache,wrap_client,local_server,resume,async_code,web_app"


@dataclass(frozen=True)
class Stage:
    """A provider, a worker that imports all examples, and the environment of both."""

    provider: SimulationClient
    environment: dict[str, str]

    def play(
        self, program: str, *arguments: str, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        ended = play(EXAMPLES / program, arguments, self.environment)
        assert ended.returncode == code, ended.stderr
        return ended


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=EXAMPLES,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()


def environment_for(provider: SimulationClient, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(EXAMPLES.parent),
        "GOOGLE_GEMINI_BASE_URL": provider.url,
        "GEMINI_API_KEY": "simulated",
        "OPENAI_BASE_URL": provider.openai_url,
        "OPENAI_API_KEY": "simulated",
        "LOCAL_LLM_URL": provider.openai_url,
        **more,
    }


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    folder = Path(tempfile.mkdtemp(prefix="examples-"))
    with spawn(latency=0.05, min_cache_tokens=1000) as provider:
        environment = environment_for(provider, BATCHLLM_STATE_DIR=str(folder / "state"))
        command = ["batchllm_celery.cli", "worker", "--app", APPS]
        with running(command, environment, folder / "worker.log"):
            yield Stage(provider, environment)
    shutil.rmtree(folder, ignore_errors=True)


def test_classify_counts_the_topics(stage: Stage) -> None:
    """All rows are classified by the schema, under the quota's name."""
    counted = [line.split() for line in stage.play("classify.py", "40").stdout.splitlines()]
    assert sum(int(count) for count, _ in counted) == 40
    assert len(counted) > 2


def test_summaries_share_one_cache(stage: Stage) -> None:
    """One context cache is made, and nearly all input tokens come from it."""
    before = stage.provider.stats()["caches"]["created"]
    ended = stage.play("shared_cache.py", "20")
    assert len(ended.stdout.splitlines()) == 20
    assert "98% of them cached" in ended.stderr
    assert stage.provider.stats()["caches"]["created"] - before == 1


def test_an_async_client_is_wrapped(stage: Stage) -> None:
    """Each prompt gets its own answer from the wrapped client."""
    prompts = [
        f"Define {word!r} in a sentence."
        for word in ("ledger", "lease", "fence", "quota", "cooldown")
    ]
    assert sorted(stage.play("wrap_client.py").stdout.splitlines()) == sorted(
        map(answer_to, prompts)
    )


def test_a_local_server_is_called(stage: Stage) -> None:
    """The OpenAI-compatible server at LOCAL_LLM_URL answers every prompt."""
    lines = stage.play("local_server.py").stdout.splitlines()
    expected = {f"{n - 3} {answer_to(f'Name a city with {n} letters.')}" for n in range(3, 13)}
    assert set(lines) == expected


def test_async_code_keeps_its_loop_running(stage: Stage) -> None:
    """Results come by `async for` while the program's own loop goes on ticking."""
    ended = stage.play("async_code.py")
    assert len(ended.stdout.splitlines()) == 4
    ticks = int(ended.stderr.split("ticked ")[1].split()[0])
    assert ticks > 5


def test_a_crashed_program_resumes(stage: Stage) -> None:
    """After a crash the same batch id goes on, and no prompt is answered a second time."""
    before = stage.provider.stats()["calls"]
    stage.play("resume.py", "--rows", "60", "--crash-after", "10", code=1)
    ended = stage.play("resume.py", "--rows", "60")
    assert len(set(ended.stdout.splitlines())) >= 60
    asked = [call["prompt"] for call in stage.provider.calls(after=before)]
    assert len(asked) == len(set(asked)) == 60


def test_a_web_application_enqueues(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI answers at once with the batch's id, then shows its progress and its results."""
    testclient = pytest.importorskip("fastapi.testclient")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("GEMINI_API_KEY", "BATCHLLM_STATE_DIR"):
        monkeypatch.setenv(name, stage.environment[name])
    web_app = importlib.import_module("web_app")
    with testclient.TestClient(web_app.app) as client:
        created = client.post("/batches", json={"prompts": ["Why?", "How?"]})
        assert created.status_code == 202
        url = f"/batches/{created.json()['id']}"
        wait_until(lambda: client.get(url).json()["succeeded"] == 2)
        outputs = {one["output"] for one in client.get(f"{url}/results").json()}
        assert outputs == {answer_to("Why?"), answer_to("How?")}
        assert client.get("/batches/unknown").status_code == 404


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with valkey_on_tcp() as url:
        yield url.removesuffix("/0")


@pytest.mark.parametrize(("pool", "database"), [("threads", 0), ("prefork", 1)])
def test_an_application_s_own_celery_runs_batches(
    tmp_path: Path, stage: Stage, broker: str, pool: str, database: int
) -> None:
    """Workers of an existing Celery app, of another pool, run the batch that one of the app's
    scheduled tasks submits."""
    environment = stage.environment | {"CELERY_BROKER_URL": f"{broker}/{database}"}
    environment.pop("BATCHLLM_STATE_DIR")
    before = stage.provider.stats()["answered"]
    command = ["celery", "-A", "celery_app", "worker", "-P", pool, "-c", "2"]
    with running(command, environment, tmp_path / "worker.log"):
        trigger = tmp_path / "trigger.py"
        trigger.write_text(
            f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
            "import celery_app as c\n"
            "scheduled = {entry['task'] for entry in c.app.conf.beat_schedule.values()}\n"
            "assert scheduled <= set(c.app.tasks), scheduled\n"
            "c.nightly_digest.delay()\n"
        )
        ended = play(trigger, (), environment)
        assert ended.returncode == 0, ended.stderr
        wait_until(lambda: stage.provider.stats()["answered"] == before + 2, timeout=60)


def test_the_schedule_is_beat_s(tmp_path: Path, stage: Stage) -> None:
    """Celery beat reads the schedule of the example's app."""
    program = tmp_path / "schedule.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import celery_app as c\n"
        "schedule = c.app.Beat(app=c.app, socket_timeout=1).Service(c.app).get_scheduler()\n"
        "print(sorted(schedule.get_schedule()))\n"
    )
    ended = play(program, (), stage.environment)
    assert "nightly-digest" in ended.stdout, ended.stderr
