"""Crash in the middle, go on later: the batch id is all that has to be remembered.

    batchllm worker --app resume
    python resume.py --crash-after 20       # dies without a word, as a machine would
    python resume.py                        # the same batch: finished items are not paid again

The worker may be killed as well: what it held is taken over by the others, or by itself when it
is back.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchllm_celery import GeminiStrategy, LLMCallStrategy, Producer, strategy

DATA = Path(__file__).parent / "data" / "docstrings.jsonl"


@strategy("title", quota="gemini")
def title(model: str = "gemini-2.5-flash") -> LLMCallStrategy[str]:
    return GeminiStrategy(model, system="Answer with a title of at most six words.")


def rows(limit: int) -> Iterator[dict[str, Any]]:
    """The same rows in the same order each time; a changed one would be run again."""
    for line in DATA.read_text(encoding="utf-8").splitlines()[:limit]:
        row = json.loads(line)
        yield {"item_id": row["item_id"], "prompt": row["text"]}


def main() -> None:
    if not os.environ.get("GEMINI_API_KEY"):
        sys.exit("GEMINI_API_KEY is not set: get a key at https://aistudio.google.com/apikey")
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--crash-after", type=int, default=0)
    parser.add_argument("--batch-id", default="titles")
    arguments = parser.parse_args()

    with Producer() as producer:
        batch = producer.submit(rows(arguments.rows), strategy="title", batch_id=arguments.batch_id)
        titles: dict[str, str] = {}
        for result in batch.results():
            titles[result.item_id] = result.output if result.success else f"({result.error})"
            if len(titles) == arguments.crash_after:
                os._exit(1)
    for name, text in sorted(titles.items()):
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
