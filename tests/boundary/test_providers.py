"""Whatever a provider sends, in either wire format, through the real clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai", reason="the openai extra is not installed")

from batchllm_celery import (
    GeminiStrategy,
    LLMCallStrategy,
    OpenAICompatibleStrategy,
    event_loop,
    strategy,
)
from batchllm_celery.models import WorkItemResult
from tests.boundary import provider_cases as made
from tests.boundary.harness import (
    CONFIG,
    SEED,
    Bench,
    Violation,
    all_logs,
    check_logs,
    check_texts,
    chosen,
    count,
    most_calls,
    one_outcome_each,
    replay,
    require,
)
from tests.boundary.strategy_cases import KEY, PROMPT

CHUNK = 250
#: No case hangs: what is slow is the machine.
PATIENT = CONFIG.model_copy(update={"timeout_per_item": 30.0, "item_timeout": 60.0})
WIRES = ["openai", "openai-schema", "gemini", "gemini-schema"]


@strategy("boundary-wire", quota="wide")
def wire(name: str) -> LLMCallStrategy[Any]:
    schema = made.SCHEMA if name.endswith("-schema") else None
    if name.startswith("openai"):
        return OpenAICompatibleStrategy("m", schema=schema)
    return GeminiStrategy("m", schema=schema)


@pytest.fixture
def server() -> Iterator[made.Server]:
    opened = made.Server()
    event_loop.run(opened.start())
    yield opened
    event_loop.run(opened.stop())


@pytest.fixture
def bench(
    server: made.Server, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
    with Bench(redis_url, namespace) as opened:
        yield opened


def _run(bench: Bench, server: made.Server, name: str, numbers: list[int]) -> None:
    numbers = chosen(name, numbers)
    if not numbers:
        return
    format_ = name.removesuffix("-schema")
    schema = name != format_
    server.cases = {n: made.case(n, SEED, format_, schema) for n in numbers}
    rows = [{"item_id": f"c{n}", "prompt": f"case-{n}- {PROMPT}"} for n in numbers]
    with all_logs() as logged:
        found = bench.run(rows, "boundary-wire", params={"name": name}, config=PATIENT)
    results = one_outcome_each(found, [row["item_id"] for row in rows])
    require(not server.strange, f"requests that name no case: {server.strange[:2]}")
    check_logs(logged, [KEY, PROMPT])
    wrong = []
    for number in numbers:
        try:
            _check(server.cases[number], results[f"c{number}"], schema)
        except Violation as problem:
            sent = [reply.name for reply in server.cases[number].sent]
            wrong.append(f"{replay(name, number)}\n  {sent}\n  {problem}")
    assert not wrong, f"{len(wrong)} violations:\n" + "\n".join(wrong[:20])


def _check(case: made.Case, result: WorkItemResult[Any, Any], schema: bool) -> None:
    check_texts(result, [KEY])
    sent = case.sent
    require(1 <= len(sent) <= most_calls(), f"{len(sent)} requests")
    require(result.attempts <= CONFIG.retry.max_attempts, f"{result.attempts} attempts")
    last = sent[-1]
    if last.right:
        require(result.success, f"a right answer is none: {result.error}")
    require(not any(reply.right for reply in sent[:-1]), "asked again after a right answer")
    if result.success:
        given = made.texts(case.wire, last.body)
        require(bool(given), f"output {result.output!r} of a body without an answer")
        require(200 <= last.status < 300, f"a success of status {last.status}")
        # Of several choices each is an answer.
        for output in result.output if isinstance(result.output, list) else [result.output]:
            if schema:
                require(isinstance(output, dict), f"output {output!r}")
                require(output.get("label") != made.DRAFT, f"a draft: {output!r}")
                whole = any(_holds(text, output) for text in given)
                require(whole, f"{output!r} is not all of {given!r}")
            else:
                require(output in given, f"output {output!r}, sent {given!r}")
        require(isinstance(result.metadata.get("finish_reason"), str | None), "finish_reason")
    known = sum(reply.tokens for reply in sent if reply.tokens is not None)
    open_ = sum(reply.tokens is None for reply in sent)
    total = result.token_usage.total_tokens
    most = known + 30_000_000 * open_
    require(known <= total <= most, f"{total} tokens, of {known} to {most}: {result.error}")


def _holds(text: str, output: Any) -> bool:
    """Whether the text's last JSON object is this one."""
    decode = json.JSONDecoder().raw_decode
    at, found = text.find("{"), None
    while at >= 0:
        try:
            found, end = decode(text, at)
        except ValueError:
            end = at + 1
        at = text.find("{", end)
    return bool(found == output)


@pytest.mark.parametrize("name", WIRES)
def test_an_answer_is_whole_and_the_providers_or_none(
    bench: Bench, server: made.Server, name: str
) -> None:
    """The short form: the same cases each time."""
    _run(bench, server, name, list(range(100)))


@pytest.mark.boundary
@pytest.mark.parametrize("first", range(0, max(1, count(2500) // 4), CHUNK))
@pytest.mark.parametrize("name", WIRES)
def test_an_answer_is_whole_and_the_providers_or_none_long(
    bench: Bench, server: made.Server, name: str, first: int
) -> None:
    _run(bench, server, name, list(range(1000 + first, 1000 + first + CHUNK)))
