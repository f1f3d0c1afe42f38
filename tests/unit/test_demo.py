"""The demo's judge: books that differ in any way do not agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchllm_celery.cli.commands.demo import Books, read_journal, read_results
from batchllm_celery.simulation.answers import answer_to

Lines = list[dict[str, Any]]
PROMPTS = ["Row 0: how much is 0 times 7?", "Row 1: how much is 1 times 9?", "Row 2: and 2?"]


def call(prompt: str, status: int = 200) -> dict[str, Any]:
    return {"prompt": prompt, "status": status, "input_tokens": 7, "output_tokens": 3}


def result(index: int) -> dict[str, Any]:
    usage = {"total_tokens": 10}
    return {
        "index": index, "success": True, "output": answer_to(PROMPTS[index]), "token_usage": usage,
    }  # fmt: skip


def judged(folder: Path, calls: Lines, results: Lines, **ledger: int) -> Books:
    (folder / "rows.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in calls))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    known = {"succeeded": 3, "maybe_billed": 1, "ledger_tokens": 30, **ledger}
    books = Books(rows=3, **known)  # type: ignore[arg-type]
    read_journal(folder / "journal.jsonl", books)
    read_results(folder / "results.jsonl", books)
    books.check()
    return books


def calls() -> Lines:
    aborted = {"number": 4, "aborted": True, "time": 5.0}
    return [*(call(prompt) for prompt in PROMPTS), call(PROMPTS[1]), call("x", 429), aborted]


def test_books_of_a_run_that_lost_nothing_agree(tmp_path: Path) -> None:
    """A call that a death cut off is in the journal twice, and in the ledger as maybe billed."""
    books = judged(tmp_path, calls(), [result(n) for n in (2, 0, 1)])
    assert books.problems == []
    assert (books.calls, books.repeats, books.right) == (4, 1, 3)


@pytest.mark.parametrize(
    ("spoil", "ledger", "word"),
    [
        (lambda made, lines: lines.pop(), {}, "lines of the file: 2"),
        (lambda made, lines: lines.append(lines[0]), {}, "lines of the file: 4"),
        (lambda made, lines: lines.__setitem__(0, lines[1]), {}, "right lines of the file: 1"),
        (lambda made, lines: lines[0].update(output=answer_to("x")), {}, "right lines of the file"),
        (lambda made, lines: lines[0].update(success=False), {}, "right lines of the file"),
        (lambda made, lines: made.pop(0), {}, "the provider answered: 2"),
        (lambda made, lines: made.append(call(PROMPTS[0])), {}, "2 calls were repeated"),
        (lambda made, lines: None, {"succeeded": 2}, "the ledger calls answered: 2"),
        (lambda made, lines: None, {"maybe_billed": 0}, "1 calls were repeated"),
        (lambda made, lines: None, {"ledger_tokens": 29}, "tokens"),
        (lambda made, lines: lines[0].update(token_usage={"total_tokens": 9}), {}, "tokens"),
    ],
)
def test_books_that_differ_are_told_apart(
    tmp_path: Path, spoil: Callable[[Lines, Lines], Any], ledger: dict[str, int], word: str
) -> None:
    """Whatever is lost, doubled, invented or not counted."""
    made, lines = calls(), [result(n) for n in range(3)]
    spoil(made, lines)
    books = judged(tmp_path, made, lines, **ledger)
    assert any(word in problem for problem in books.problems), books.problems
