"""Strategies in real worker processes: two of them, four slots each, for all tests of this file."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from batchllm_celery import (
    BatchResult,
    FailureKind,
    LLMCallStrategy,
    LLMWorkItem,
    ParallelBatchProcessor,
    ProcessorConfig,
    Producer,
    Quota,
    QuotaLimits,
    RetryConfig,
    WorkItemResult,
)
from batchllm_celery.models import BatchProgress, BatchState, CooldownPolicy
from batchllm_celery.providers import GeminiCachedStrategy
from batchllm_celery.settings import Settings
from batchllm_celery.simulation import SimulatedProvider
from tests.acceptance.fleet import (
    Fleet,
    assert_nothing_left,
    assert_one_line_each,
    write_rows,
)
from tests.acceptance.strategies_app import cached
from tests.support import ValkeyServer, keys_without_ttl, wait_until

pytestmark = pytest.mark.xdist_group("strategies_fleet")  # its tests share what they start

APP = "tests.acceptance.strategies_app"
QUICK = ProcessorConfig(retry=RetryConfig(max_attempts=3, initial_wait=0.01, max_wait=0.02))
PRICES = {
    "gemini:m": {"input": 0, "output": 1000},
    "gemini:cheap": {"input": 0, "output": 1000},
    "gemini:good": {"input": 0, "output": 50_000},
}
SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string"}, "score": {"type": "number"}},
    "required": ["label", "score"],
}

Results = dict[int, WorkItemResult[Any, Any]]


@dataclass
class Stage:
    """Two standing worker processes, the provider that they call, and what they noted."""

    fleet: Fleet
    provider: SimulatedProvider
    producer: Producer
    notes_file: Path

    def run(self, strategy: str, prompts: Iterable[str], **options: Any) -> Results:
        """Submit and read everything."""
        return self.run_and_look(strategy, prompts, **options)[0]

    def run_and_look(
        self, strategy: str, prompts: Iterable[str], **options: Any
    ) -> tuple[Results, BatchProgress]:
        options = {"config": QUICK, "items_per_task": 1, **options}
        batch = self.producer.submit(prompts, strategy=strategy, **options)
        results = {result.index: result for result in batch.results()}
        return results, batch.progress()

    def noted(self, tag: str) -> tuple[Counter[str], list[dict[str, Any]]]:
        """How often each hook ran under `tag`, and all its lines."""
        lines = [json.loads(line) for line in self.notes_file.read_text().splitlines()]
        ours = [line for line in lines if line["tag"] == tag]
        return Counter(line["hook"] for line in ours), ours

    def cleaned_up(self, tag: str, times: int) -> Counter[str]:
        """The counts once the last `cleanup` was noted."""
        wait_until(lambda: self.noted(tag)[0]["cleanup"] >= times, timeout=10)
        return self.noted(tag)[0]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, valkey: ValkeyServer) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("strategies")
    namespace = f"t{uuid.uuid4().hex[:10]}"
    (folder / "prices.json").write_text(json.dumps(PRICES))
    notes = folder / "notes"
    notes.touch()
    with SimulatedProvider.in_thread() as provider:
        fleet = Fleet(
            folder,
            valkey.url,
            namespace,
            GOOGLE_GEMINI_BASE_URL=provider.url,
            BATCHLLM_PRICES_FILE=str(folder / "prices.json"),
            STRATEGIES_NOTES=str(notes),
            BATCHLLM_UNRUNNABLE_AFTER="0",  # a `prepare` that fails ends its item
        )
        fleet.start(
            *("worker", "--processes", "2", "--slots", "4", "--app", APP),
            *("--base-url", f"{provider.url}/v1"),
            name="worker",
        )
        settings = Settings(redis_url=valkey.url, namespace=namespace)
        with Producer(settings) as producer:
            wait_until(lambda: len(producer.workers()) == 2, timeout=60)
            yield Stage(fleet, provider, producer, notes)
        fleet.stop()
    assert_nothing_left(folder, timeout=20)
    assert keys_without_ttl(valkey.url, namespace) == []


@pytest.fixture(autouse=True)
def clean_provider(request: pytest.FixtureRequest) -> None:
    """Each test begins with a provider that remembers nothing and has no vices."""
    provider = request.getfixturevalue("stage").provider
    provider.reset()
    provider.change(
        latency=0.0, error_rate=0.0, error_statuses=(500, 503), bad_output_rate=0.0,
        block_rate=0.0, truncated_rate=0.0, output_tokens=None, thoughts_tokens=0, rpd=None,
    )  # fmt: skip


def prompts(count: int, prefix: str = "") -> list[str]:
    return [f"{prefix}question number {n}" for n in range(count)]


# -- the life cycle


def test_two_processes_share_one_strategy(stage: Stage) -> None:
    """100 items: prepared once in each process that takes part, executed and cleaned up 100
    times, and each answer belongs to its prompt."""
    results = stage.run("noting", prompts(100), params={"tag": "shared"})
    counts = stage.cleaned_up("shared", 100)
    assert counts == {"prepare": 2, "execute": 100, "cleanup": 100}
    assert len({line["pid"] for line in stage.noted("shared")[1]}) == 2
    assert {n: one.output for n, one in results.items()} == {
        n: f"answer to {prompt}" for n, prompt in enumerate(prompts(100))
    }


def test_a_prepare_that_always_fails_fails_each_item_with_its_message(stage: Stage) -> None:
    """Five items: five prepares, five cleanups, no execute, five failures that say why."""
    results = stage.run("noting", prompts(5), params={"tag": "no", "what": "prepare fails"})
    assert stage.cleaned_up("no", 5) == {"prepare": 5, "cleanup": 5}
    assert [one.error for one in results.values()] == ["RuntimeError: the model is on holiday"] * 5


def test_three_refusals_use_up_no_attempt(stage: Stage) -> None:
    """With max_attempts=3: success, and all four calls saw attempt 1."""
    quota = Quota(name="refused", policy=CooldownPolicy(cooldowns=(0.05,)))
    params = {"tag": "refused", "what": "refused thrice"}
    results = stage.run("noting", ["one"], params=params, quota=quota)
    assert results[0].success
    assert results[0].attempts == 1
    calls = [line for line in stage.noted("refused")[1] if line["hook"] == "execute"]
    assert [line["attempt"] for line in calls] == [1, 1, 1, 1]


def test_a_number_that_looks_like_a_status_is_not_one(stage: Stage) -> None:
    """ValueError("Expected 4290 tokens"): one execute, no cooldown for anybody."""
    params = {"tag": "number", "what": "wrong number"}
    results = stage.run("noting", ["one"], params=params, quota="number")
    assert results[0].error_kind is FailureKind.LOGIC_ERROR
    assert results[0].error == "ValueError: Expected 4290 tokens"
    assert stage.cleaned_up("number", 1)["execute"] == 1
    state = stage.producer.quota("number")
    assert state is not None
    assert (state.consecutive, state.failures_in_a_row, state.cooldown_remaining) == (0, 0, 0.0)


def test_tokens_of_a_failed_attempt_are_counted(stage: Stage) -> None:
    """15 of the bad answer and 15 of the good one are 30, in the result and in the batch."""
    params = {"tag": "tokens", "what": "one bad attempt"}
    results, progress = stage.run_and_look("noting", ["one"], params=params)
    assert (results[0].success, results[0].attempts) == (True, 2)
    assert results[0].token_usage.total_tokens == 30
    assert (progress.input_tokens, progress.output_tokens) == (20, 10)


# -- Gemini's context cache


async def process_here(
    settings: Settings, strategy: LLMCallStrategy[Any], texts: list[str]
) -> BatchResult[Any, Any]:
    """A run in this process, which shares nothing with the workers but the provider."""
    async with ParallelBatchProcessor[str, str, None](settings=settings) as processor:
        for n, text in enumerate(texts):
            await processor.add_work(LLMWorkItem(item_id=str(n), strategy=strategy, prompt=text))
        return await processor.process_all()


def test_a_fleet_that_starts_at_once_creates_one_cache(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processes prepare together: one create. A later run elsewhere, with a Redis that
    knows nothing, finds it at the provider by its tags: none. Other tags: one more."""
    caches = stage.provider.provider.caches
    stage.provider.change(latency=0.1)
    tags = {"customer": "acme"}
    results = stage.run("cached", prompts(40), params={"tag": "first", "tags": tags})
    assert len({line["pid"] for line in stage.noted("first")[1]}) == 2
    assert (caches.created, caches.updated) == (1, 0)
    assert all(one.success and one.token_usage.cached_input_tokens for one in results.values())

    for name, value in stage.fleet.env.items():
        if name.startswith(("GOOGLE_", "GEMINI_", "STRATEGIES_")):
            monkeypatch.setenv(name, value)
    alone = Settings(redis_url=stage.fleet.env["BATCHLLM_REDIS_URL"], namespace=uuid.uuid4().hex)
    later = asyncio.run(process_here(alone, cached("later", tags), prompts(4)))
    assert all(one.success and one.token_usage.cached_input_tokens for one in later.results)
    assert (caches.created, caches.updated) == (1, 0)

    stage.run("cached", prompts(8), params={"tag": "other", "tags": {"customer": "globex"}})
    assert (caches.created, caches.updated) == (2, 0)


def test_a_cache_that_ends_in_mid_run_is_replaced_once_and_fails_nobody(stage: Stage) -> None:
    """A cache of somebody's earlier run is adopted and, when its end comes near, renewed once.
    Then the provider loses it: created anew, once. All items are answered."""
    caches = stage.provider.provider.caches
    stage.provider.change(latency=0.1)
    params: dict[str, Any] = {"tag": "expiry", "tags": {"run": "expiry"}, "buffer": 4}
    built = cached(**params)
    assert isinstance(built, GeminiCachedStrategy)
    caches.create("models/m", built.display_name, tokens=500, ttl=8)
    counts = []

    def rows() -> Iterator[str]:
        deadline = time.monotonic() + 30
        while not caches.updated and time.monotonic() < deadline:
            yield f"before {time.monotonic()}"
            time.sleep(0.04)
        counts.append((caches.created, caches.updated))
        yield from prompts(40, "renewed ")
        caches._live.clear()
        yield from prompts(60, "gone ")

    results = list(stage.producer.stream(rows(), strategy="cached", params=params, config=QUICK))

    assert len(results) > 100
    assert [one.error for one in results if not one.success] == []
    assert all(one.token_usage.cached_input_tokens for one in results)
    assert counts == [(1, 1)]
    assert (caches.created, caches.updated) == (2, 1)


# -- providers


def outcome_of(result: WorkItemResult[Any, Any]) -> tuple[Any, ...]:
    usage = result.token_usage
    tokens = (usage.input_tokens, usage.output_tokens)
    return result.success, result.error_kind, result.output, result.attempts, tokens


def test_openai_s_client_has_the_same_outcomes_as_gemini_s(stage: Stage) -> None:
    """`worker --base-url`: errors, blocked and cut answers, retries and tokens item by item."""
    outcomes = {}
    for wire in ("gemini", "openai"):
        stage.provider.reset()
        stage.provider.change(
            error_rate=0.2, error_statuses=(400, 500, 502), block_rate=0.1, truncated_rate=0.1
        )
        results = stage.run(wire, prompts(60), params={"model": "m"})
        assert {call.wire for call in stage.provider.calls} == {wire}
        outcomes[wire] = {index: outcome_of(one) for index, one in results.items()}
    assert outcomes["gemini"] == outcomes["openai"]
    kinds = {outcome[1] for outcome in outcomes["openai"].values()}
    assert kinds >= {None, "invalid_request", "content_blocked", "truncated"}
    assert max(outcome[3] for outcome in outcomes["openai"].values()) > 1


@pytest.mark.parametrize("wire", ["gemini", "openai"])
def test_a_fifth_of_malformed_answers(stage: Stage, wire: str) -> None:
    """Every item ends valid or says why; the second prompt says what was wrong with the first
    answer; tokens add up to the provider's own count exactly."""
    stage.provider.change(bad_output_rate=0.2, thoughts_tokens=7)
    config = ProcessorConfig(retry=RetryConfig(max_attempts=2, initial_wait=0.01))
    results, progress = stage.run_and_look(
        wire, prompts(150), params={"model": "m", "schema": SCHEMA}, config=config
    )
    stats = stage.provider.provider.stats
    for one in results.values():
        if one.success:
            assert isinstance(one.output["label"], str)
            assert isinstance(one.output["score"], int | float)
        else:
            assert one.error_kind is FailureKind.VALIDATION
            assert "not valid JSON" in (one.error or "")
    assert {one.attempts for one in results.values()} == {1, 2}
    assert 0 < progress.failed < 20
    again = [
        call.prompt
        for call in stage.provider.calls
        if "previous answer was rejected" in call.prompt
    ]
    assert len(again) == sum(one.attempts == 2 for one in results.values())
    assert stats.calls == 150 + len(again)
    counted = [one.token_usage for one in results.values()]
    ours = sum(u.input_tokens for u in counted), sum(u.output_tokens for u in counted)
    assert ours == (stats.input_tokens, stats.output_tokens)
    assert ours == (progress.input_tokens, progress.output_tokens)


class PlainServer(BaseHTTPRequestHandler):
    """Some other OpenAI-compatible server: the least that the API's shape asks for, no `usage`
    details, fields of its own, no key wanted."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append({"path": self.path, **body})
        text = body["messages"][-1]["content"].upper()
        answer = {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2}, "timings": {"ms": 1},
        }  # fmt: skip
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


def test_any_openai_compatible_server_will_do(stage: Stage, tmp_path: Path) -> None:
    """`run --base-url` without a key, against a server that is not ours."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), PlainServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = Fleet(tmp_path, stage.fleet.env["BATCHLLM_REDIS_URL"], f"t{uuid.uuid4().hex[:10]}")
    here.env.pop("OPENAI_API_KEY", None)
    write_rows(tmp_path / "rows.jsonl", 6)
    try:
        done = here.run(
            *("run", "rows.jsonl", "-o", "out.jsonl", "--workers", "1"),
            *("--model", "openai:llama", "--base-url", f"http://127.0.0.1:{server.server_port}/v1"),
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    for line in assert_one_line_each(tmp_path / "out.jsonl", 6):
        assert line["output"] == f"QUESTION NUMBER {line['index']}"
        assert line["token_usage"]["total_tokens"] == 5
    assert {body["path"] for body in PlainServer.bodies} == {"/v1/chat/completions"}


# -- money and days


def test_max_cost_stops_the_batch_and_the_spent_sum_is_the_results(stage: Stage) -> None:
    """100 tokens an answer at $1,000 a million: the tenth answer spends the budget. Beyond it go
    those in flight (2 x 4) at most, and as many whose answers are on their way to the ledger. The
    user's prices file is what counts."""
    stage.provider.change(output_tokens=100, latency=0.1)
    results, progress = stage.run_and_look(
        "gemini", prompts(60), params={"model": "m"}, max_cost=0.95
    )
    paid = [one for one in results.values() if one.success]
    assert 10 <= len(paid) < 10 + 2 * 8
    assert stage.provider.provider.stats.calls == len(paid)
    assert [one.cost for one in paid] == [pytest.approx(0.1)] * len(paid)
    assert progress.state is BatchState.BUDGET
    assert progress.cost == pytest.approx(0.1 * len(paid))
    unpaid = [one for one in results.values() if not one.success]
    assert {one.error_kind for one in unpaid} == {FailureKind.BUDGET}
    assert len(paid) + len(unpaid) == 60


def test_each_level_of_an_escalation_costs_its_own_price(stage: Stage) -> None:
    """A short answer by the cheap model; a longer one is paid for at both models' prices."""
    long = "Tell the whole story of " + "the river and the sea " * 4
    results = stage.run("escalating", ["hi", long])
    short_usage, long_usage = results[0].token_usage, results[1].token_usage
    assert results[0].metadata["model"] == "gemini:cheap"
    assert results[1].metadata["model"] == "gemini:good"
    assert results[0].cost == pytest.approx(short_usage.output_tokens * 0.001)
    cut = 12
    good = long_usage.output_tokens - cut
    assert results[1].cost == pytest.approx(cut * 0.001 + good * 0.05)


@pytest.mark.parametrize("who_knows", ["limiter", "provider"])
def test_a_day_that_is_over_fails_the_items_by_the_quota_s_choice(
    stage: Stage, who_knows: str
) -> None:
    """`day_exhausted="fail"`: the batch is not parked until tomorrow, it ends."""
    limits = QuotaLimits(requests_per_day=3 if who_knows == "limiter" else None)
    quota = Quota(name=f"day-{who_knows}", limits=limits, day_exhausted="fail")
    stage.provider.change(rpd=3 if who_knows == "provider" else None)
    results, progress = stage.run_and_look("gemini", prompts(8), params={"model": "m"}, quota=quota)
    answered = sum(one.success for one in results.values())
    # The day's last starts may lie with the process that has no item left for them.
    assert answered in ((3,) if who_knows == "provider" else (2, 3))
    failed = [one for one in results.values() if not one.success]
    assert {one.error_kind for one in failed} == {FailureKind.QUOTA_EXHAUSTED}
    assert (progress.state, progress.failed) == (BatchState.FINISHED, 8 - answered)
