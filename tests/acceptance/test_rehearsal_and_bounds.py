"""What a run promises of money and of real results: dry runs touch nothing, bounds bind, one row's
refusal stays that row's, and the times of a result add up."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.acceptance.conftest import StartProvider
from tests.acceptance.fleet import Fleet, read_results, write_rows

GEMINI = ("--model", "gemini:gemini-2.5-flash", "--workers", "1", "--rpm", "60000")

Reply = Callable[[str], tuple[int, str, Any]]


@contextmanager
def openai_server(reply: Reply) -> Iterator[tuple[tuple[str, ...], Counter[str]]]:
    """Options that reach a server which answers each prompt as told; how often it was asked."""
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            asked[prompt] += 1
            status, kind, content = reply(prompt)
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield (
            ("--model", "openai:m", "--base-url", url, "--workers", "1", "--rpm", "60000"),
            asked,
        )
    finally:
        server.shutdown()
        server.server_close()


def answer(text: str, **usage: int) -> tuple[int, str, Any]:
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return 200, "application/json", {"choices": [choice], "usage": usage or None}


PAGE = "<html><h1>Sorry, you have been blocked</h1></html>"


def test_a_dry_run_touches_nothing_of_the_real_batch(
    lone_fleet: Fleet, provide: StartProvider
) -> None:
    """Same id, same file, same quota: its own id, its own file, no call, no tokens, no limit."""
    provider = provide()
    lone_fleet.env["GOOGLE_GEMINI_BASE_URL"] = provider.url
    write_rows(lone_fleet.folder / "rows.jsonl", 20)
    command = ("run", "rows.jsonl", *GEMINI, "--batch-id", "nightly")
    assert lone_fleet.run(*command).returncode == 0
    real = lone_fleet.folder / "rows.jsonl.results.jsonl"
    paid, calls = real.read_bytes(), len(provider.calls)

    for _ in range(2):  # the second one replaces the first one's file
        dry = lone_fleet.run(*command, "--dry-run", "--rpm", "1")
        assert dry.returncode == 0, dry.stderr
        assert dry.stdout.split()[:2] == ["Dry", "run"]
        assert "tokens" not in dry.stdout
        assert "cost" not in dry.stdout

    assert (real.read_bytes(), len(provider.calls)) == (paid, calls)
    rehearsed = read_results(lone_fleet.folder / "rows.jsonl.dry-run.jsonl")
    assert len(rehearsed) == 20
    assert {line["metadata"]["dry_run"] for line in rehearsed} == {True}
    assert {line["token_usage"]["total_tokens"] for line in rehearsed} == {0}
    batches = json.loads(lone_fleet.run("status", "--json").stdout)["batches"]
    assert {batch["batch_id"] for batch in batches} == {"nightly", "dry-nightly"}

    refused = lone_fleet.run(*command, "--dry-run", "-o", real.name, "--overwrite")
    assert refused.returncode == 2
    assert "was not written by a dry run" in refused.stderr
    assert real.read_bytes() == paid
    again = lone_fleet.run(*command)
    assert again.returncode == 0, again.stderr
    assert len(provider.calls) == calls
    reserved = lone_fleet.run("run", "rows.jsonl", *GEMINI, "--batch-id", "dry-nightly")
    assert (reserved.returncode, len(provider.calls)) == (2, calls)


def test_one_row_s_403_fails_that_row(lone_fleet: Fleet) -> None:
    """Eight of thirty rows meet a firewall; the others go on, and nobody is asked twice."""

    def reply(prompt: str) -> tuple[int, str, Any]:
        number = int(prompt.rpartition("number ")[2].split()[0].rstrip("?."))
        return (403, "text/html", PAGE) if number % 4 == 1 else answer("fine")

    write_rows(lone_fleet.folder / "rows.jsonl", 30)
    with openai_server(reply) as (options, asked):
        done = lone_fleet.run("run", "rows.jsonl", *options, "-o", "out.jsonl")
    assert done.returncode == 1, done.stderr
    lines = read_results(lone_fleet.folder / "out.jsonl")
    failed = [line for line in lines if not line["success"]]
    assert [line["error"]["kind"] for line in failed] == ["content_blocked"] * 8
    assert all("Sorry, you have been blocked" in line["error"]["message"] for line in failed)
    assert set(asked.values()) == {1}
    assert {line["metadata"].get("finish_reason") for line in lines} == {"stop", None}


@pytest.mark.parametrize(
    ("content", "most"),
    [
        (PAGE, 60),
        ({"error": {"message": "This API key has no access"}}, 40),
    ],
    ids=["on everything", "of the key"],
)
def test_a_403_that_would_meet_every_row_stops_the_batch(
    lone_fleet: Fleet, content: Any, most: int
) -> None:
    """After twenty in a row, or at once where it speaks of the key."""
    write_rows(lone_fleet.folder / "rows.jsonl", 200)
    limit = ("--max-concurrency", "5")
    with openai_server(lambda _: (403, "application/json", content)) as (options, asked):
        done = lone_fleet.run("run", "rows.jsonl", *options, *limit, "-o", "out.jsonl")
    assert done.returncode == 3, done.stdout + done.stderr
    kinds = Counter(line["error"]["kind"] for line in read_results(lone_fleet.folder / "out.jsonl"))
    assert kinds["aborted"] >= 200 - most
    assert sum(asked.values()) <= most


def test_a_bound_on_money_needs_a_price_and_says_how_to_go_on(lone_fleet: Fleet) -> None:
    """Unknown: refused before any call. Known: it binds, and the resume line says what to give."""
    write_rows(lone_fleet.folder / "rows.jsonl", 40)
    with openai_server(lambda _: answer("x", prompt_tokens=1000, completion_tokens=0)) as (
        options,
        asked,
    ):
        command = ("run", "rows.jsonl", *options, "-o", "out.jsonl", "--max-cost", "0.01")
        limit = ("--max-concurrency", "2", "--batch-id", "b")
        for wrong in ((), ("--price", "openai:other=1,2"), ("--price", "1"), ("--price", "a,b")):
            refused = lone_fleet.run(*command, *limit, *wrong)
            assert refused.returncode == 2, refused.stdout
            assert "--price" in refused.stderr
        assert not asked
        priced = ("--price", "m=1.0,2.0")
        stopped = lone_fleet.run(*command, *limit, *priced)
        assert stopped.returncode == 3, stopped.stderr
        assert 10 <= sum(asked.values()) <= 14
        assert "give --max-cost above 0.01" in stopped.stdout
        assert "stops again at once" in stopped.stdout
        again = lone_fleet.run(*command[:-1], "1", *limit, *priced)
    assert again.returncode == 0, again.stdout + again.stderr
    assert set(asked.values()) == {1}
    lines = read_results(lone_fleet.folder / "out.jsonl")
    assert sum(line["cost"] for line in lines) == pytest.approx(0.04)


def test_a_token_budget_binds_where_the_server_tells_no_tokens(lone_fleet: Fleet) -> None:
    """About 100 estimated tokens an answer: some ten of forty rows are called."""
    write_rows(lone_fleet.folder / "rows.jsonl", 40)
    bound = ("--token-budget", "1000", "--max-concurrency", "2", "-o", "out.jsonl")
    with openai_server(lambda _: answer("x" * 270)) as (options, asked):
        done = lone_fleet.run("run", "rows.jsonl", *options, *bound)
    assert done.returncode == 3, done.stderr
    assert 5 <= sum(asked.values()) <= 15
    lines = read_results(lone_fleet.folder / "out.jsonl")
    assert all(line["metadata"]["usage_estimated"] for line in lines if line["success"])
    assert "give --token-budget above" in done.stdout


@pytest.mark.parametrize("schema", ['{"$ref": "#/nowhere"}', '{"$ref": "#"}', '{"type": "nope"}'])
def test_a_schema_that_no_answer_could_meet_is_refused_before_any_call(
    lone_fleet: Fleet, schema: str
) -> None:
    """Exit 2, also for a rehearsal and for `submit`."""
    write_rows(lone_fleet.folder / "rows.jsonl", 3)
    (lone_fleet.folder / "schema.json").write_text(schema)
    with openai_server(lambda _: answer("{}")) as (options, asked):
        for command in (("run",), ("run", "--dry-run"), ("submit",)):
            allowed = options if command[0] == "run" else ("--model", "openai:m")
            done = lone_fleet.run(*command, "rows.jsonl", *allowed, "--schema", "schema.json")
            assert done.returncode == 2, done.stdout
            assert "--schema schema.json: not a" in done.stderr
    assert not asked


def test_the_times_of_every_result_add_up(lone_fleet: Fleet, provide: StartProvider) -> None:
    """Waiting for a slot, preparing, retries and all: no moment is missing, to the millisecond."""
    provider = provide(latency=0.2, error_rate=0.2, error_statuses=(503,))
    lone_fleet.env["GOOGLE_GEMINI_BASE_URL"] = provider.url
    write_rows(lone_fleet.folder / "rows.jsonl", 120)
    options = (*GEMINI, "--slots", "10", "--max-attempts", "9", "-o", "out.jsonl")
    done = lone_fleet.run("run", "rows.jsonl", *options)
    assert done.returncode == 0, done.stderr
    lines = read_results(lone_fleet.folder / "out.jsonl")
    assert len(lines) == 120
    for line in lines:
        timing = line["timing"]
        parts = timing["queued"] + timing["waited"] + timing["executed"]
        assert timing["total"] == pytest.approx(parts, abs=1e-9)
        assert all(round(value, 3) == value for value in timing.values())
        assert line["metadata"]["finish_reason"] == "STOP"
    # 10 slots at 0.2 s: the last ones waited for theirs, which `queued` tells.
    assert max(line["timing"]["queued"] for line in lines) > 1.5
