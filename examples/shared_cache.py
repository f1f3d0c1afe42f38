"""Summaries that share a long context: it is sent once, and billed at a tenth afterwards.

    batchllm worker --app shared_cache --processes 2
    python shared_cache.py

However many worker processes there are, the provider holds one cache; it is renewed while the
batch runs, and found again by the next run. Gemini wants a context of at least 1,000 tokens or so.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchllm_celery import GeminiCachedStrategy, LLMCallStrategy, Producer, strategy

DATA = Path(__file__).parent / "data" / "docstrings.jsonl"


def house_style() -> str:
    """What every call needs to know: here, fifty docstrings to take the tone from."""
    texts = [json.loads(line)["text"] for line in DATA.read_text(encoding="utf-8").splitlines()]
    return "Write in the tone of these docstrings:\n\n" + "\n\n---\n\n".join(texts[:50])


@strategy("summarise-in-style", quota="gemini")
def summarise(model: str = "gemini-2.5-flash") -> LLMCallStrategy[str]:
    """One instance per process, one cache for the fleet."""
    return GeminiCachedStrategy(model, cached_content=[house_style()], cache_ttl_seconds=3600)


def rows(limit: int) -> Iterator[dict[str, Any]]:
    """The texts that are not part of the context."""
    for line in DATA.read_text(encoding="utf-8").splitlines()[50 : 50 + limit]:
        row = json.loads(line)
        yield {"item_id": row["item_id"], "prompt": f"In one sentence:\n\n{row['text']}"}


def main() -> None:
    if not os.environ.get("GEMINI_API_KEY"):
        sys.exit("GEMINI_API_KEY is not set: get a key at https://aistudio.google.com/apikey")
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with Producer() as producer:
        batch = producer.submit(rows(limit), strategy="summarise-in-style")
        for result in batch.results():
            print(f"{result.item_id}: {result.output if result.success else result.error}")
        progress = batch.progress()
    cached = progress.cached_input_tokens / max(1, progress.input_tokens)
    print(f"{progress.input_tokens:,} input tokens, {cached:.0%} of them cached", file=sys.stderr)


if __name__ == "__main__":
    main()
