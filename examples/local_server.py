"""A model of your own, on any server that speaks OpenAI's language (vLLM, Ollama, llama.cpp).

    batchllm worker --app local_server
    python local_server.py

LOCAL_LLM_URL names the server (http://127.0.0.1:11434/v1 is Ollama's), LOCAL_LLM_MODEL the model.
It needs no key. A local server has no quota but a capacity: bound the calls in flight.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

from batchllm_celery import (
    LLMCallStrategy,
    OpenAICompatibleStrategy,
    Producer,
    Quota,
    QuotaLimits,
    strategy,
)

URL = os.environ.get("LOCAL_LLM_URL", "http://127.0.0.1:11434/v1")
MODEL = os.environ.get("LOCAL_LLM_MODEL", "qwen3")


@strategy("local", quota="local")
def local() -> LLMCallStrategy[str]:
    """The server's address stands here, in code that the worker runs: a message can't set it."""
    return OpenAICompatibleStrategy(
        MODEL, base_url=URL, api_key="none needed", max_output_tokens=200
    )


def check_server() -> None:
    """Say what is missing before anything is sent."""
    try:
        urllib.request.urlopen(f"{URL}/models", timeout=5).close()
    except (urllib.error.URLError, OSError) as error:
        sys.exit(
            f"no server at {URL} ({error}): start one (`ollama serve`), set LOCAL_LLM_URL, "
            f"or try `batchllm simulate`"
        )


def main() -> None:
    check_server()
    quota = Quota(name="local", limits=QuotaLimits(max_concurrency=8))
    with Producer() as producer:
        prompts = (f"Name a city with {number} letters." for number in range(3, 13))
        batch = producer.submit(prompts, strategy="local", quota=quota)
        for result in batch.results():
            print(result.index, result.output if result.success else result.error)


if __name__ == "__main__":
    main()
