"""A web application that enqueues and follows batches (FastAPI; Flask looks the same).

    batchllm worker --app web_app
    uvicorn web_app:app

    curl localhost:8000/batches -H 'content-type: application/json' -d '{"prompts": ["Why?"]}'
    curl localhost:8000/batches/ID

The application and the workers share nothing but Redis (BATCHLLM_REDIS_URL).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, Field

from batchllm_celery import GeminiStrategy, LLMCallStrategy, Producer, UsageError, strategy


@strategy("answer", quota="gemini")
def answer(model: str = "gemini-2.5-flash") -> LLMCallStrategy[str]:
    return GeminiStrategy(model)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One producer for the application's life."""
    if not os.environ.get("GEMINI_API_KEY"):
        raise SystemExit(
            "GEMINI_API_KEY is not set: get a key at https://aistudio.google.com/apikey"
        )
    with Producer() as producer:
        app.state.producer = producer
        yield


app = FastAPI(lifespan=lifespan)


class NewBatch(BaseModel):
    prompts: list[str] = Field(min_length=1, max_length=10_000)


# Plain `def`: FastAPI runs these on threads, so that a slow Redis never holds up its loop.


@app.post("/batches", status_code=202)
def submit(new: NewBatch, request: Request) -> dict[str, Any]:
    """Enqueue, and answer at once."""
    batch = request.app.state.producer.submit(new.prompts, strategy="answer")
    return {"id": batch.id, "items": len(new.prompts)}


@app.get("/batches/{batch_id}")
def progress(batch_id: str, request: Request) -> dict[str, Any]:
    """How far it is."""
    try:
        seen = request.app.state.producer.attach(batch_id).progress()
    except UsageError as unknown:
        raise HTTPException(404, str(unknown)) from unknown
    return {"state": seen.state, "succeeded": seen.succeeded, "failed": seen.failed}


@app.get("/batches/{batch_id}/results")
def results(batch_id: str, request: Request) -> list[dict[str, Any]]:
    """The results so far."""
    try:
        batch = request.app.state.producer.attach(batch_id)
        return [result.to_json() for result in batch.results(follow=False)]
    except UsageError as unknown:
        raise HTTPException(404, str(unknown)) from unknown


@app.delete("/batches/{batch_id}", status_code=202)
def cancel(batch_id: str, request: Request) -> None:
    """Stop what has not started."""
    request.app.state.producer.attach(batch_id).cancel()
