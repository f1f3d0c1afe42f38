"""Submit and follow a batch from async code, without ever blocking its loop.

batchllm worker --app async_code
python async_code.py
"""

from __future__ import annotations

import asyncio
import os
import sys

from batchllm_celery import GeminiStrategy, LLMCallStrategy, Producer, strategy


@strategy("haiku", quota="gemini")
def haiku(model: str = "gemini-2.5-flash") -> LLMCallStrategy[str]:
    return GeminiStrategy(model, system="Answer with a haiku.")


async def tick(stopped: asyncio.Event) -> int:
    """Stands for everything else that your loop has to do in the meantime."""
    ticks = 0
    while not stopped.is_set():
        await asyncio.sleep(0.01)
        ticks += 1
    return ticks


async def main() -> None:
    if not os.environ.get("GEMINI_API_KEY"):
        sys.exit("GEMINI_API_KEY is not set: get a key at https://aistudio.google.com/apikey")
    stopped = asyncio.Event()
    ticking = asyncio.create_task(tick(stopped))
    seasons = ["spring", "summer", "autumn", "winter"]

    producer = await asyncio.to_thread(Producer)
    batch = await asyncio.to_thread(producer.submit, seasons, strategy="haiku")
    async for result in batch.results():
        print(result.output if result.success else result.error)
    await asyncio.to_thread(producer.close)

    stopped.set()
    print(f"the loop ticked {await ticking} times", file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main())
