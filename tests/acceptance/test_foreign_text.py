"""Texts of others that a whole run meets: each row has its line, and nothing of them leaks."""

from __future__ import annotations

import json

from batchllm_celery.redaction import printable
from tests.acceptance.fleet import Fleet, assert_one_line_each

APP = """
import os
from batchllm_celery import CallableStrategy, strategy

KEY = os.environ["OWN_API_KEY"]


class Quoting(Exception):
    status_code = 401


async def answer(prompt):
    if prompt == "surrogate":
        raise RuntimeError("half a pair \\ud800, and \\x1b[31mred\\x9b2J")
    if prompt == "key":
        raise RuntimeError(f"wrong key {KEY} in {{'authorization': {KEY!r}}}")
    if prompt == "chain":
        try:
            raise ValueError(KEY)
        except ValueError as error:
            raise RuntimeError("x" * 180 + KEY) from error
    if prompt == "digits":
        return 10 ** 5000
    if prompt == "deep digits":
        return {"a": [10 ** 5000]}
    return "fine \\u202e\\x1b[31m \\ud800"


@strategy("odd")
def odd():
    return CallableStrategy(answer)
"""
PROMPTS = ["surrogate", "key", "chain", "digits", "deep digits", "fine"]


def test_odd_texts_end_in_one_line_each_and_leak_nothing(lone_fleet: Fleet) -> None:
    """Half surrogate pairs, control characters, endless integers, and errors that quote the key:
    the run ends as any run with failures does; key and ESC are in none of its outputs."""
    key = "own0123key"
    lone_fleet.env["OWN_API_KEY"] = key
    (lone_fleet.folder / "odd_app.py").write_text(APP)
    rows = [json.dumps({"item_id": f"{p}\x1b[2J\u202e", "prompt": p}) for p in PROMPTS]
    (lone_fleet.folder / "rows.jsonl").write_text("\n".join(rows))

    done = lone_fleet.run(
        "run", "rows.jsonl", "-o", "out.jsonl", "--strategy", "odd", "--app", "odd_app",
        "--workers", "1", "--max-attempts", "1", "-v",
    )  # fmt: skip

    assert done.returncode == 1, done.stderr
    lines = assert_one_line_each(lone_fleet.folder / "out.jsonl", len(PROMPTS))
    ended = {line["item_id"].partition("\x1b")[0]: line for line in lines}
    assert [prompt for prompt in PROMPTS if ended[prompt]["success"]] == ["fine"]
    assert "half a pair \\ud800, and \\x1b[31mred" in ended["surrogate"]["error"]["message"]
    assert ended["digits"]["error"]["kind"] == "logic_error"
    assert "[key]" in ended["key"]["error"]["message"]
    said = done.stdout + done.stderr
    assert said == printable(said)
    kept = [path.read_bytes() for path in lone_fleet.folder.rglob("*.log")]
    for text in (said.encode(), (lone_fleet.folder / "out.jsonl").read_bytes(), *kept):
        assert key.encode() not in text
        assert key[:8].encode() not in text
