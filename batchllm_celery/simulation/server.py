"""The simulated provider as an HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Self

from aiohttp import web

from batchllm_celery.simulation import anthropic, gemini, openai, responses
from batchllm_celery.simulation.config import SimulationConfig
from batchllm_celery.simulation.journal import Call
from batchllm_celery.simulation.provider import Provider, Stats
from batchllm_celery.simulation.quotas import QuotaRefusal
from batchllm_celery.simulation.replies import GenerateRequest, Reply, ReplyOutcome
from batchllm_celery.simulation.wire import HttpAnswer, WireError

_GEMINI_VERSIONS = ("v1", "v1beta", "v1alpha")
_MAX_BODY_BYTES = 64 * 1024 * 1024
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class SimulatedProvider:
    """A simulated provider, listening while its context is open.

        async with SimulatedProvider(SimulationConfig(rpm=600)) as provider:
            os.environ["GOOGLE_GEMINI_BASE_URL"] = provider.url

    Args:
        config: what the provider is like.
        **settings: fields of `SimulationConfig`, instead of or on top of `config`.
    """

    def __init__(self, config: SimulationConfig | None = None, **settings: Any) -> None:
        self.provider = Provider((config or SimulationConfig()).changed(**settings))
        self._port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Base URL for Gemini's client (`GOOGLE_GEMINI_BASE_URL`)."""
        return f"http://{_url_host(self.provider.config.host)}:{self._port}"

    @property
    def openai_url(self) -> str:
        """Base URL for OpenAI's client."""
        return f"{self.url}/v1"

    @property
    def stats(self) -> Stats:
        """Counts since the start or the last reset."""
        return self.provider.stats

    @property
    def calls(self) -> deque[Call]:
        """The latest calls, in order of arrival."""
        return self.provider.calls

    def change(self, **settings: Any) -> None:
        """Change settings (`rpm=300`) in mid-run."""
        self.provider.change(**settings)

    def refuse(self, count: int, retry_after: float = 1.0) -> None:
        """Refuse the next `count` calls with a 429 that asks for `retry_after` seconds."""
        self.provider.refuse(count, retry_after)

    def reset(self) -> None:
        """Forget every call, cache and charge."""
        self.provider.reset()

    async def __aenter__(self) -> Self:
        config = self.provider.config
        # A client that hangs up frees its place, as a dead worker's calls must.
        self._runner = web.AppRunner(
            application(self.provider),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=0.5,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, config.host, config.port, backlog=4096)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()
        self.provider.close()

    @classmethod
    @contextlib.contextmanager
    def in_thread(
        cls, config: SimulationConfig | None = None, **settings: Any
    ) -> Iterator[SimulatedProvider]:
        """Run a provider on a thread of its own, for code without an event loop."""
        simulated = cls(config, **settings)
        started: threading.Event = threading.Event()
        failures: list[BaseException] = []
        stop = _Stop()

        async def main() -> None:
            async with simulated:
                stop.arm()
                started.set()
                await stop.wait()

        def run() -> None:
            try:
                asyncio.run(main())
            except BaseException as failure:
                failures.append(failure)
            finally:
                started.set()

        thread = threading.Thread(target=run, name="simulated-provider", daemon=True)
        thread.start()
        started.wait()
        if failures:
            raise failures[0]
        try:
            yield simulated
        finally:
            stop.set()
            thread.join(timeout=10)


class _Stop:
    """An event of one loop that any thread may set."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

    def arm(self) -> None:
        self._loop = asyncio.get_running_loop()

    async def wait(self) -> None:
        await self._event.wait()

    def set(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: stopped already
                self._loop.call_soon_threadsafe(self._event.set)


def serve(config: SimulationConfig) -> None:
    """Serve until Ctrl-C or SIGTERM; prints one line with the URL when it listens.

    Raises:
        OSError: if the port is taken.
    """
    asyncio.run(_serve(config))


async def _serve(config: SimulationConfig) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with SimulatedProvider(config) as simulated:
        print(f"Simulated provider on {simulated.url}", flush=True)
        await stopped.wait()


def application(provider: Provider) -> web.Application:
    """The provider's HTTP routes."""
    app = web.Application(client_max_size=_MAX_BODY_BYTES)
    routes = app.router
    for version in _GEMINI_VERSIONS:
        caches = f"/{version}/cachedContents"
        routes.add_post(f"/{version}/models/{{call}}", _bind(_gemini_call, provider))
        routes.add_post(caches, _bind(_create_cache, provider))
        routes.add_get(caches, _bind(_list_caches, provider))
        routes.add_get(f"{caches}/{{id}}", _bind(_get_cache, provider))
        routes.add_patch(f"{caches}/{{id}}", _bind(_update_cache, provider))
        routes.add_delete(f"{caches}/{{id}}", _bind(_delete_cache, provider))
    routes.add_post("/v1/chat/completions", _bind(_chat, provider))
    routes.add_post("/v1/responses", _bind(_responses, provider))
    routes.add_post("/v1/embeddings", _bind(_embeddings, provider))
    routes.add_post("/v1/messages", _bind(_messages, provider))
    routes.add_get("/v1/models", _bind(_models, provider))
    routes.add_get("/_simulation/stats", _bind(_stats, provider))
    routes.add_get("/_simulation/calls", _bind(_calls, provider))
    routes.add_post("/_simulation/settings", _bind(_settings, provider))
    routes.add_post("/_simulation/refuse", _bind(_refuse, provider))
    routes.add_post("/_simulation/reset", _bind(_reset, provider))
    return app


def _bind(handler: Callable[..., Awaitable[web.StreamResponse]], provider: Provider) -> _Handler:
    return functools.partial(handler, provider)


async def _gemini_call(provider: Provider, request: web.Request) -> web.StreamResponse:
    model, _, method = request.match_info["call"].rpartition(":")
    if method == "countTokens":
        return await _gemini_operation(
            provider, request, "count_tokens", lambda body: gemini.count(body)
        )
    body: dict[str, Any] = {}
    try:
        gemini.check_key(provider, _gemini_key(request))
        gemini.check_model(provider, model)
        if method != "generateContent":
            raise WireError(404, f"Method {method!r} is not simulated")
        body = await _body(request)
        asked = gemini.parse_generate(provider, model, body)
    except WireError as problem:
        provider.reject("gemini", model, problem.status, body)
        return _response(gemini.error(problem))
    _, reply = await provider.answer("gemini", asked)
    if isinstance(reply, QuotaRefusal):
        return _response(gemini.refused(provider, asked, reply))
    if reply.outcome is ReplyOutcome.DROPPED:
        return _dropped(request)
    return _response(gemini.generated(asked, reply))


async def _chat(provider: Provider, request: web.Request) -> web.StreamResponse:
    return await _openai_call(provider, request, "openai", openai.parse_chat, openai.completed)


async def _responses(provider: Provider, request: web.Request) -> web.StreamResponse:
    return await _openai_call(
        provider, request, "responses", responses.parse_response, responses.responded
    )


async def _embeddings(provider: Provider, request: web.Request) -> web.StreamResponse:
    def write(provider: Provider, asked: GenerateRequest, reply: Reply, _: int) -> HttpAnswer:
        return responses.embedded(provider, asked, reply)

    return await _openai_call(provider, request, "embeddings", responses.parse_embeddings, write)


async def _openai_call(
    provider: Provider,
    request: web.Request,
    wire: str,
    parse: Callable[[Provider, Mapping[str, Any]], GenerateRequest],
    write: Callable[[Provider, GenerateRequest, Reply, int], HttpAnswer],
) -> web.StreamResponse:
    body: dict[str, Any] = {}
    try:
        openai.check_key(provider, request.headers.get("Authorization"))
        body = await _body(request)
        asked = parse(provider, body)
    except WireError as problem:
        provider.reject(wire, str(body.get("model")), problem.status, body)
        return _response(openai.error(problem))
    call, reply = await provider.answer(wire, asked)
    if isinstance(reply, QuotaRefusal):
        return _response(openai.refused(provider, asked, reply), call.headers)
    if reply.outcome is ReplyOutcome.DROPPED:
        return _dropped(request)
    request_id = {"x-request-id": f"req_{call.number:08x}", **call.headers}
    return _response(write(provider, asked, reply, call.number), request_id)


async def _messages(provider: Provider, request: web.Request) -> web.StreamResponse:
    body: dict[str, Any] = {}
    try:
        headers = request.headers
        anthropic.check_key(provider, headers.get("x-api-key"), headers.get("anthropic-version"))
        body = await _body(request)
        asked = anthropic.parse_message(provider, body)
    except WireError as problem:
        provider.reject("anthropic", str(body.get("model")), problem.status, body)
        return _response(anthropic.error(problem))
    call, reply = await provider.answer("anthropic", asked)
    if isinstance(reply, QuotaRefusal):
        return _response(anthropic.refused(asked, reply), call.headers)
    if reply.outcome is ReplyOutcome.DROPPED:
        return _dropped(request)
    return _response(anthropic.answered(provider, asked, reply, call.number), call.headers)


async def _create_cache(provider: Provider, request: web.Request) -> web.StreamResponse:
    create = functools.partial(gemini.create_cache, provider)
    return await _gemini_operation(provider, request, "create_cache", create)


async def _update_cache(provider: Provider, request: web.Request) -> web.StreamResponse:
    update = functools.partial(gemini.update_cache, provider, _cache_name(request))
    return await _gemini_operation(provider, request, "update_cache", update)


async def _get_cache(provider: Provider, request: web.Request) -> web.StreamResponse:
    name = _cache_name(request)
    return await _gemini_operation(
        provider, request, "get_cache", lambda _: gemini.get_cache(provider, name)
    )


async def _delete_cache(provider: Provider, request: web.Request) -> web.StreamResponse:
    name = _cache_name(request)
    return await _gemini_operation(
        provider, request, "delete_cache", lambda _: gemini.delete_cache(provider, name)
    )


async def _list_caches(provider: Provider, request: web.Request) -> web.StreamResponse:
    return await _gemini_operation(
        provider, request, "list_caches", lambda _: gemini.list_caches(provider, request.query)
    )


async def _gemini_operation(
    provider: Provider,
    request: web.Request,
    name: str,
    operation: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> web.StreamResponse:
    """Anything but a request for an answer: no limit counts it."""
    provider.stats.operations[name] += 1
    try:
        gemini.check_key(provider, _gemini_key(request))
        return _response(HttpAnswer(200, operation(await _body(request))))
    except WireError as problem:
        return _response(gemini.error(problem))


async def _models(provider: Provider, request: web.Request) -> web.StreamResponse:
    provider.stats.operations["models"] += 1
    try:
        openai.check_key(provider, request.headers.get("Authorization"))
    except WireError as problem:
        return _response(openai.error(problem))
    return _response(HttpAnswer(200, openai.models(provider)))


async def _stats(provider: Provider, request: web.Request) -> web.StreamResponse:
    summary = provider.summary()
    if "arrivals" in request.query:
        summary["arrivals"] = [
            [call.time, call.status, call.input_tokens + call.output_tokens]
            for call in provider.calls
        ]
    if "prompts" in request.query:
        summary["prompt_counts"] = dict(provider.prompt_counts())
    return _response(HttpAnswer(200, summary))


async def _calls(provider: Provider, request: web.Request) -> web.StreamResponse:
    after = int(request.query.get("after", 0))
    calls = [call.to_json() for call in provider.calls if call.number > after]
    return _response(HttpAnswer(200, {"calls": calls}))


async def _settings(provider: Provider, request: web.Request) -> web.StreamResponse:
    try:
        provider.change(**await _body(request))
    except (WireError, ValueError) as problem:
        return _response(HttpAnswer(400, {"error": str(problem)}))
    return _response(HttpAnswer(200, provider.config.model_dump(mode="json", exclude={"api_key"})))


async def _refuse(provider: Provider, request: web.Request) -> web.StreamResponse:
    body = await _body(request)
    provider.refuse(int(body.get("count", 1)), float(body.get("retry_after", 1.0)))
    return _response(HttpAnswer(200, {}))


async def _reset(provider: Provider, request: web.Request) -> web.StreamResponse:
    provider.reset()
    return _response(HttpAnswer(200, {}))


async def _body(request: web.Request) -> dict[str, Any]:
    raw = await request.read()
    try:
        body = json.loads(raw) if raw else {}
    except ValueError as cause:
        raise WireError(400, "Invalid JSON payload received.") from cause
    if not isinstance(body, dict):
        raise WireError(400, "Invalid JSON payload received: it must be an object.")
    return body


def _gemini_key(request: web.Request) -> str | None:
    return request.headers.get("x-goog-api-key") or request.query.get("key")


def _cache_name(request: web.Request) -> str:
    return f"cachedContents/{request.match_info['id']}"


def _response(answer: HttpAnswer, limits: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        status=answer.status,
        body=json.dumps(answer.body, ensure_ascii=False).encode(),
        headers={**(limits or {}), **answer.headers},
        content_type="application/json",
    )


def _dropped(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _url_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # what listens everywhere is reached here
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
