"""One execute is one HTTP request, whatever the server answers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from google import genai
from google.genai import types
from openai import AsyncOpenAI

from batchllm_celery import GeminiStrategy, LLMCallStrategy, OpenAICompatibleStrategy
from batchllm_celery.models import FAILURE_POLICIES
from batchllm_celery.providers.pydantic_ai import PydanticAIModelStrategy
from batchllm_celery.strategies import classify_for

PART = {"content": {"role": "model", "parts": [{"text": "half"}]}}
CONTINUED = {
    "candidates": [{**PART, "finishReason": "CONTINUATION", "continuationToken": "dG9rZW4="}],
    "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 2},
}
CALL = {"functionCall": {"name": "add", "args": {"a": 1, "b": 2}}}
WANTS_CALL = {
    "candidates": [{"content": {"role": "model", "parts": [CALL]}, "finishReason": "STOP"}],
    "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 2},
}
ANSWERS: dict[str, tuple[int, Any]] = {
    "continued": (200, CONTINUED),
    "a function call": (200, WANTS_CALL),
    "unavailable": (503, {"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}),
    "refused": (429, {"error": {"code": 429, "message": "slow", "status": "RESOURCE_EXHAUSTED"}}),
    "a broken body": (200, None),
}


class Server(ThreadingHTTPServer):
    """Gives one answer to everybody, and counts."""

    answer: tuple[int, Any] = (200, {})
    requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        server.requests += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = server.answer
        body = b"{" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", opened.url)
        monkeypatch.setenv("GEMINI_API_KEY", "test-key")
        monkeypatch.setenv("OPENAI_BASE_URL", f"{opened.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "test-key")
        yield opened
        opened.shutdown()


def add(a: int, b: int) -> int:
    """A tool that the SDK would call by itself."""
    return a + b


def _users_gemini(server: Server) -> LLMCallStrategy[Any]:
    client = genai.Client(api_key="k", http_options=types.HttpOptions(base_url=server.url))
    config = types.GenerateContentConfig(tools=[add])
    return GeminiStrategy("m", client, config=config)


def _users_openai(server: Server) -> LLMCallStrategy[Any]:
    return OpenAICompatibleStrategy("m", AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k"))


STRATEGIES: dict[str, Any] = {
    "gemini": lambda server: GeminiStrategy("m"),
    "gemini with tools": lambda server: GeminiStrategy("m", config={"tools": [add]}),
    "gemini by a user's client": _users_gemini,
    "openai": lambda server: OpenAICompatibleStrategy("m"),
    "openai by a user's client": _users_openai,
    "pydantic-ai on gemini": lambda server: PydanticAIModelStrategy("gemini:m"),
    "pydantic-ai on openai": lambda server: PydanticAIModelStrategy("openai:m"),
    "pydantic-ai with a schema": lambda server: PydanticAIModelStrategy(
        "gemini:m", schema={"type": "object", "title": "A", "properties": {"a": {}}}
    ),
}


@pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", STRATEGIES)
async def test_one_execute_is_one_request(server: Server, name: str, answer: str) -> None:
    """Continuations, function calls and retries of the SDKs would be paid without a permit."""
    server.answer = ANSWERS[answer]
    strategy: LLMCallStrategy[Any] = STRATEGIES[name](server)
    await strategy.prepare()
    with contextlib.suppress(Exception):
        await strategy.execute("hello", 1, 10.0)
    assert server.requests == 1
    await strategy.close()
    if "user" in name:
        client: Any = strategy.client  # type: ignore[attr-defined]  # both have one
        await (client.aio.aclose() if "gemini" in name else client.close())


async def test_an_answer_that_wants_to_go_on_is_no_success(server: Server) -> None:
    """It is half an answer: the attempt fails, and its tokens count."""
    server.answer = ANSWERS["continued"]
    strategy: GeminiStrategy[Any] = GeminiStrategy("m")
    await strategy.prepare()
    with pytest.raises(Exception, match="CONTINUATION") as caught:
        await strategy.execute("hello", 1, 10.0)
    assert classify_for(strategy, caught.value).usage.total_tokens == 5
    assert FAILURE_POLICIES[classify_for(strategy, caught.value).kind].retried
    await strategy.close()
