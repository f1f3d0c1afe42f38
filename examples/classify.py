"""Classify real text: every answer is checked against a schema.

    batchllm worker --app classify          # one terminal (more of them: a bigger fleet)
    python classify.py                      # another one

Both in this folder, both with GEMINI_API_KEY. Without a key: see README.md, "No key yet".
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from batchllm_celery import GeminiStrategy, LLMCallStrategy, Producer, Quota, QuotaLimits, strategy

DATA = Path(__file__).parent / "data" / "docstrings.jsonl"


class Verdict(BaseModel):
    """What we want to know of a docstring."""

    topic: Literal["text", "files", "network", "concurrency", "mathematics", "language", "other"]
    has_example: bool
    clarity: int = Field(ge=1, le=5)


@strategy("classify", quota="gemini")
def classify(model: str = "gemini-2.5-flash") -> LLMCallStrategy[Verdict]:
    """A wrong answer is sent back to the model with what is wrong about it."""
    return GeminiStrategy(model, schema=Verdict, system="You judge documentation.", temperature=0)


def rows(limit: int) -> Iterator[dict[str, Any]]:
    """A row is a prompt, an id and any context, which comes back with the result."""
    with DATA.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if limit == 0:
                return
            limit -= 1
            yield {
                "item_id": row["item_id"],
                "prompt": f"Classify this docstring:\n\n{row['text']}",
                "context": {"kind": row["kind"]},
            }


def check_key() -> None:
    """Say what is missing before anything is sent."""
    if not os.environ.get("GEMINI_API_KEY"):
        sys.exit("GEMINI_API_KEY is not set: get a key at https://aistudio.google.com/apikey")


def main() -> None:
    check_key()
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    quota = Quota(name="gemini", limits=QuotaLimits(requests_per_minute=600))
    topics: Counter[str] = Counter()
    with Producer() as producer:
        batch = producer.submit(rows(limit), strategy="classify", quota=quota)
        for result in batch.results():
            if result.success:
                topics[result.output["topic"]] += 1
            else:
                print(f"{result.item_id}: {result.error}", file=sys.stderr)
    for topic, count in topics.most_common():
        print(f"{count:5} {topic}")


if __name__ == "__main__":
    main()
