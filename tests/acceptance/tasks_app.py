"""A host's app with a result backend, whose strategies are Celery tasks."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from celery import Celery

from batchllm_celery import CallableStrategy, LLMCallStrategy, install, strategy
from batchllm_celery.connection import broker_url

URL, NAMESPACE = os.environ["BATCHLLM_REDIS_URL"], os.environ["BATCHLLM_NAMESPACE"]
#: Who looks for prompts and answers in the broker and in Flower looks for these.
SECRET = "SECRET-PROMPT-4711"

prefix = {"global_keyprefix": f"{NAMESPACE}:celery:"}
app = Celery("host", set_as_current=False)
app.conf.update(
    broker_url=broker_url(URL),
    result_backend=broker_url(URL),
    broker_transport_options={**prefix, "visibility_timeout": 3600},
    result_backend_transport_options=prefix,
    result_expires=600,
    broker_connection_retry_on_startup=True,
    task_default_queue="host",
    worker_send_task_events=True,
    task_send_sent_event=True,
    worker_prefetch_multiplier=1,
)


async def answer(prompt: str) -> str:
    """Notes each call, for those who count them."""
    if journal := os.environ.get("JOURNAL"):
        with Path(journal).open("a") as file:
            file.write(f"{time.monotonic()} {os.getpid()} {prompt!r}\n")
    if "slow" in prompt:
        await asyncio.sleep(float(os.environ.get("SLOW", "2")))
    if "fail" in prompt:
        raise ValueError(f"refused: {prompt}")
    return f"<{prompt}>"


@strategy("summarise")
def summarise(suffix: str = "") -> LLMCallStrategy[str]:
    """Summarises."""

    async def call(prompt: str) -> str:
        return await answer(prompt) + suffix

    return CallableStrategy(call)


install(app)


@strategy("translate")  # registered after `install`
def translate() -> LLMCallStrategy[str]:
    return CallableStrategy(answer)


@app.task(name="host.fetch")
def fetch(name: str) -> str:
    return f"{SECRET} of {name}"


@app.task(name="host.join")
def join(parts: list[str]) -> str:
    return "|".join(sorted(parts))


@app.task(name="host.note")
def note(text: str) -> str:
    return f"noted {text}"


@app.task(name="host.report")
def report(batch_id: str, kind: str = "over") -> str:
    with Path(os.environ["JOURNAL"]).open("a") as file:
        file.write(f"{kind} {batch_id}\n")
    return f"{kind} {batch_id}"


@app.task(name="host.mourn")
def mourn(request: object, error: object, traceback: object) -> None:
    return None
