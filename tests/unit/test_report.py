"""The report: one page without anything foreign, whatever ids, errors and outputs hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchllm_celery.cli import cli
from batchllm_celery.errors import FailureKind
from batchllm_celery.files.result_file import to_line
from batchllm_celery.models import Timing, TokenUsage, WorkItemResult

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&\u202egnp'\""


def result(index: int, **fields: Any) -> dict[str, Any]:
    return WorkItemResult(
        item_id=f"{HOSTILE}{index}", index=index, attempts=1, cost=0.5,
        token_usage=TokenUsage(input_tokens=3, output_tokens=1),
        timing=Timing(queued=0.1, waited=0.2, executed=float(index), total=index + 0.3),
        **{"success": True, "metadata": {"model": HOSTILE}, **fields},
    ).to_json()  # fmt: skip


class Tags(HTMLParser):
    """The elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_a_report_is_one_page_and_foreign_text_stays_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [result(n, output={HOSTILE: "good" if n % 2 else "bad", "n": n}) for n in range(20)]
    lines += [
        result(n, success=False, error=HOSTILE, error_kind=FailureKind.VALIDATION)
        for n in range(20, 25)
    ]
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"".join(map(to_line, lines)))
    command = ["report", str(out), "-o", str(tmp_path / "page.html")]
    assert CliRunner().invoke(cli, command, standalone_mode=False).exception is None
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert not {"script", "img", "link", "iframe", "object"} & tags.names
    assert {"svg", "table"} <= tags.names
    assert not {name for name in tags.attributes if name.startswith("on")}
    assert not re.findall(r'(?:src|href)="(?!#)', page.replace("xlink:href", "href"))
    assert "\u202e" not in page
    for words in ("<dd>25</dd>", "$12.5000", "50 % within", "validation", "Output: n", ">50%<"):
        assert words in page


def test_a_report_without_a_call_or_a_price_has_fewer_parts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.jsonl"
    out.write_bytes(to_line({**result(0), "attempts": 0, "cost": None, "metadata": {}}))
    assert CliRunner().invoke(cli, ["report", str(out)], standalone_mode=False).exception is None
    page = (tmp_path / "out.jsonl.report.html").read_text(encoding="utf-8")
    assert "price unknown" in page
    assert "Latency" not in page
