"""The README's example of what a shared cache saves, computed by `batchllm estimate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchllm_celery.cli.commands.estimate import estimate

SECTION = (
    (Path(__file__).parents[2] / "README.md")
    .read_text(encoding="utf-8")
    .split("Critical: Shared Strategies for Cost Optimization")[1]
    .split("\n### ")[0]
)


def number(pattern: str) -> float:
    """A figure of the README's section."""
    found = re.search(pattern, SECTION)
    assert found, pattern
    return float(found[1].replace(",", ""))


@pytest.fixture
def estimated(tmp_path: Path) -> dict[str, float]:
    """What the command says of the job that the section describes."""
    items = int(number(r"(\d+) items"))
    shared = int(number(r"a context of ([\d,]+) tokens"))
    prompt = int(number(r"a prompt of ([\d,]+)"))
    answer = int(number(r"an answer of ([\d,]+)"))
    rows = tmp_path / "documents.jsonl"
    row = json.dumps({"prompt": "abc" * prompt})  # the estimate counts three bytes as a token
    rows.write_text(f"{row}\n" * items)
    arguments = ["--model", "gemini:gemini-2.5-flash", "--cached-tokens", str(shared)]
    arguments += ["--output-tokens", str(answer), "--json"]
    ended = CliRunner().invoke(
        estimate,
        [str(rows), *arguments],
        env={"GEMINI_API_KEY": "none", "BATCHLLM_PRICES_FILE": None},
        standalone_mode=False,
    )
    assert ended.exception is None, ended.output
    found: dict[str, float] = json.loads(ended.stdout)
    return found


def test_one_shared_cache_turns_ten_dollars_into_three(estimated: dict[str, float]) -> None:
    """100 items cost $10.00 with a strategy each and $3.00 with one for all: 70 % are saved."""
    wrong, right = estimated["cost_without_cache"], estimated["cost"]
    told_wrong = number(r"= \*\*\$([\d.]+)\*\*\.")
    told_right = number(r"= \*\*\$([\d.]+)\*\*:")
    assert (round(wrong, 2), round(right, 2)) == (told_wrong, told_right) == (10.0, 3.0)
    assert (round(wrong / 100, 2), round(right / 100, 2)) == (0.10, 0.03)
    assert round(wrong - right, 2) == number(r"\$([\d.]+) \(\d+ %\) saved") == 7.0
    assert round(100 * (1 - right / wrong)) == number(r"\((\d+) %\) saved") == 70
