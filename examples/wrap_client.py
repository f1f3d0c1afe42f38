"""Your own async client, distributed: any async function of a prompt is a strategy.

    batchllm worker --app wrap_client
    python wrap_client.py

Here the client is openai's; it could be anything that awaits. What it raises is sorted by its
status code; a 429 cools the whole fleet down, a 400 fails the item at once.
"""

from __future__ import annotations

import functools
import os
import sys

from openai import AsyncOpenAI

from batchllm_celery import CallableStrategy, LLMCallStrategy, Producer, strategy

MODEL = "gpt-4.1-mini"


@functools.cache
def client() -> AsyncOpenAI:
    """One client for the process. Retries are ours: the SDK's would hide the 429s."""
    return AsyncOpenAI(max_retries=0)


async def ask(prompt: str) -> tuple[str, dict[str, int]]:
    """The answer and its tokens, which the limiter and the bill want to know."""
    answer = await client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": prompt}]
    )
    usage = answer.usage
    tokens = (
        {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
        if usage
        else {}
    )
    return answer.choices[0].message.content or "", tokens


@strategy("ask")
def ask_strategy() -> LLMCallStrategy[str]:
    """`model_name` names the quota and the price."""
    return CallableStrategy(ask, model_name=f"openai:{MODEL}")


def main() -> None:
    if not os.environ.get("OPENAI_API_KEY"):
        sys.exit("OPENAI_API_KEY is not set: get a key at https://platform.openai.com/api-keys")
    words = ["ledger", "lease", "fence", "quota", "cooldown"]
    with Producer() as producer:
        batch = producer.submit(
            (f"Define {word!r} in a sentence." for word in words), strategy="ask"
        )
        for result in batch.results():
            print(result.output if result.success else result.error)


if __name__ == "__main__":
    main()
