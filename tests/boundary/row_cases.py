"""Lines of files and rows of programs, as people have them."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from batchllm_celery import LLMCallStrategy, LLMWorkItem, RetryState
from batchllm_celery.models import BadRow, StrategySpec
from tests.boundary import odd

#: Deeper contexts may be refused; those above must come back.
SURELY_KEPT = 150

calls: Counter[str] = Counter()


class Echo(LLMCallStrategy[str]):
    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Any:
        calls[prompt] += 1
        return f"echo {prompt}", {"input_tokens": 1, "output_tokens": 1}


@dataclass
class Line:
    """A line, and what must come of it: an answer (True), a bad row (False), or either (None)."""

    data: bytes
    good: bool | None
    prompt: str | None = None
    context: Any = None


def jsonl(number: int, seed: int) -> Line:
    rng = random.Random(f"rows {seed} {number}")
    prompt = f"row {number} {odd.text(rng)}"
    row: dict[str, Any] = {"prompt": prompt}
    kind = rng.choices(["plain", "context", "odd", "keys", "bytes"], weights=[2, 4, 4, 2, 4])[0]
    if kind == "context":
        row["context"] = rng.choice(
            [
                odd.plain(rng),
                odd.plain(rng, 5),
                odd.nested(rng.choice([10, SURELY_KEPT])),
                odd.nested(rng.choice([10, SURELY_KEPT]), mapping=True),
                {"big": 2**70, "many": list(range(500))},
                "y" * 200_000,
            ]
        )
    elif kind == "odd":
        return _odd(rng, prompt)
    elif kind == "keys":
        row |= {f"column {n}": odd.plain(rng) for n in range(rng.randint(0, 4))}
        context = {name: value for name, value in row.items() if name != "prompt"} or None
        return Line(json.dumps(row).encode(), True, prompt, context)
    data = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        return _broken(rng, data)
    return Line(data, True, prompt, row.get("context"))


def _odd(rng: random.Random, prompt: str) -> Line:
    """JSON that may be refused, but not dropped, and not half run."""
    depth = rng.choice([260, 700, 983, 3000])
    made: list[str] = [
        json.dumps({"prompt": rng.choice([None, "", "  ", 5, [prompt], {"a": prompt}, True])}),
        json.dumps({"item_id": rng.choice(["", 5, None, "a" * 9000, odd.ESC]), "prompt": prompt}),
        json.dumps({"item_id": rng.choice(["same", "../x", "-x", 1.5, [1]]), "prompt": prompt}),
        '{"prompt": ' + json.dumps(prompt) + ', "context": ' + "[" * depth + "]" * depth + "}",
        '{"prompt": ' + json.dumps(prompt) + ', "context": ' + rng.choice(_NO_JSON) + "}",
        '{"prompt": ' + json.dumps(prompt) + ', "context": ' + "9" * 5000 + "}",
        '{"prompt": ' + json.dumps(prompt) + ', "prompt": "again ' + str(rng.random()) + '"}',
        '{"prompt": "\\ud800 ' + str(rng.random()) + '"}',
        '{"prompt": ' + json.dumps(prompt) + ', "context": {"\\udfff": "\\ud83d"}}',
        json.dumps(rng.choice([[], [prompt], prompt, 5, None, {}, {"text": prompt}, {"": prompt}])),
        json.dumps({"prompt": prompt, "context": None, "item_id": None, "custom_id": None}),
        json.dumps({"custom_id": f"x{rng.random()}", "method": "POST", "body": odd.plain(rng)}),
        json.dumps({"prompt": prompt, "strategy": "x", "params": {"a": 1}, "__class__": "x"}),
        json.dumps({"prompt": prompt * rng.choice([1, 20_000])}),
    ]
    return Line(rng.choice(made).encode("utf-8", "surrogatepass"), None)


_NO_JSON = ["NaN", "Infinity", "-Infinity", "1e999", "'x'", "undefined", "01", "1.", "True", "{,}"]


def _broken(rng: random.Random, data: bytes) -> Line:
    at = rng.randint(1, len(data) - 1)
    made = [
        data[:at],
        data[:at] + b"\xff" + data[at:],
        data[:at] + b"\x00" + data[at:],
        data + b",",
        data + data,
        data.decode("utf-8", "replace").encode("utf-16-le"),
        b"\xef\xbb\xbf" + data,
        b"// " + data,
        b"\x1b[2J" + data,
    ]
    line = rng.choice(made).replace(b"\n", b" ").replace(b"\r", b" ")
    try:
        json.loads(line.decode("utf-8"), parse_constant=lambda name: 1 / 0)
    except (ValueError, RecursionError):
        return Line(line or b"{", False)
    return Line(line, None)


def csv_file(first: int, count: int, seed: int) -> bytes:
    """A CSV file with rows as spreadsheets and people write them. (One with null bytes is refused
    as a whole: it is no text.)"""
    rng = random.Random(f"csv {seed} {first}")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator=rng.choice(["\n", "\r\n"]))
    writer.writerow(["prompt", "label", rng.choice(["other", "", "item_id"])])
    for number in range(first, first + count):
        texts = [odd.text(rng, 10).replace("\x00", ""), odd.text(rng).replace("\x00", "")]
        row = [f"row {number} {texts[0]}", texts[1], f"{number}"]
        deed = rng.randint(0, 9)
        if deed == 0:
            row = row[: rng.randint(0, 2)]
        if deed == 1:
            row += ["one more"]
        if deed == 2:
            row[0] = rng.choice(["", " ", '"', "\n"])
        writer.writerow(row)
        if deed == 3:
            out.write(rng.choice(['"', 'a"b,c\n', "\n\n", ",,\n", "a,b,c,d\n"]))
    return rng.choice([b"", b"\xef\xbb\xbf"]) + out.getvalue().encode()


def program_row(number: int, seed: int) -> Any:
    """What a program hands to `submit`."""
    rng = random.Random(f"objects {seed} {number}")
    prompt = f"object {number}"
    makers: list[Callable[[], Any]] = [
        lambda: {"prompt": prompt, "context": odd.value(rng)},
        lambda: {"prompt": prompt, "item_id": odd.value(rng)},
        lambda: {"prompt": odd.value(rng)},
        lambda: {"prompt": prompt, odd.odd_text(rng): 1},
        lambda: odd.value(rng),
        lambda: odd.odd_text(rng),
        lambda: _item(prompt, rng),
        lambda: BadRow("bad", 5, odd.odd_text(rng)),
        lambda: odd.BadMapping(rng.choice([RuntimeError, ValueError])),
        lambda: {"prompt": f"{prompt} {odd.odd_text(rng)}", "context": odd.odd_text(rng)},
    ]
    return rng.choice(makers)()


def _item(prompt: str, rng: random.Random) -> Any:
    spec = StrategySpec(name="boundary-echo")
    try:
        return LLMWorkItem(odd.text(rng) or "x", spec, prompt, odd.value(rng))
    except ValueError:
        return prompt
