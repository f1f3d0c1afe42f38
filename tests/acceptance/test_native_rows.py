"""Batch files of the providers as they are: `batchllm run`, its bodies, its result files."""

from __future__ import annotations

import array
import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the openai extra is not installed")

from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from batchllm_celery.simulation import SimulatedProvider
from tests.unit.dialects import native_rows as samples

#: Bodies with a context cache are for a provider that has one.
_CACHED = {"cachedContent", "cached_content"}


@pytest.fixture
def provider() -> Iterator[SimulatedProvider]:
    with SimulatedProvider.in_thread(keep_bodies=True, output_tokens=5) as running:
        yield running


def bodies(name: str) -> list[dict[str, Any]]:
    portable, native = getattr(samples, f"PORTABLE_{name}"), getattr(samples, f"NATIVE_{name}")
    return [*portable, *(body for body, _ in native)]


def run(
    folder: Path, provider: SimulatedProvider, rows: list[dict[str, Any]], *arguments: str
) -> subprocess.CompletedProcess[str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = {
        **os.environ,
        "BATCHLLM_SIMULATED_URL": provider.url,
        "BATCHLLM_STATE_DIR": str(folder / "state"),
        "OPENAI_BASE_URL": provider.openai_url,
        "OPENAI_API_KEY": "test-key",
        "ANTHROPIC_BASE_URL": provider.url,
        "ANTHROPIC_API_KEY": "test-key",
    }
    command = [sys.executable, "-m", "batchllm_celery.cli", "run", "rows.jsonl", *arguments]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def canonical(found: list[Any]) -> list[str]:
    return sorted(json.dumps(one, sort_keys=True) for one in found)


def test_an_openai_batch_file_runs_unchanged_and_answers_as_openai_does(
    tmp_path: Path, provider: SimulatedProvider
) -> None:
    """Every documented field of three endpoints arrives; the SDK's types parse what comes back; a
    row that fails is in the file of errors."""
    urls = {
        "/v1/chat/completions": bodies("CHATS"),
        "/v1/responses": bodies("RESPONSES"),
        "/v1/embeddings": samples.EMBEDDINGS,
    }
    rows = [
        {"custom_id": f"{url}-{n}", "method": "POST", "url": url, "body": body}
        for url, given in urls.items()
        for n, body in enumerate(given)
    ]
    wrong = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "x"}], "sede": 1}
    rows.append({**rows[0], "custom_id": "wrong", "body": wrong})
    done = run(tmp_path, provider, rows, "--out-format", "openai", "--max-attempts", "1")
    assert done.returncode == 1, done.stderr
    assert canonical([call.body for call in provider.calls]) == canonical([r["body"] for r in rows])
    answers = lines(tmp_path / "rows.jsonl.results.openai.jsonl")
    types: dict[str, Any] = {
        "/v1/chat/completions": ChatCompletion,
        "/v1/responses": Response,
        "/v1/embeddings": CreateEmbeddingResponse,
    }
    assert len(answers) == len(rows) - 1 >= 40
    for answer in answers:
        response = answer["response"]
        assert answer["error"] is None
        assert (response["status_code"], bool(response["request_id"])) == (200, True)
        for entry in response["body"].get("data", ()):
            if isinstance(entry["embedding"], str):  # asked for; the SDK's client decodes it first
                floats = array.array("f", base64.b64decode(entry["embedding"], validate=True))
                entry["embedding"] = list(floats)
        types[answer["custom_id"].rpartition("-")[0]].model_validate(response["body"])
    [failed] = lines(tmp_path / "rows.jsonl.results.openai.errors.jsonl")
    assert failed["custom_id"] == "wrong"
    assert failed["response"]["status_code"] == 400
    assert "sede" in failed["response"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("name", "options"), [("GEMINI", ["--model", "simulated:m"]), ("ANTHROPIC", [])]
)
def test_files_of_the_others_run_unchanged_too(
    tmp_path: Path, provider: SimulatedProvider, name: str, options: list[str]
) -> None:
    """Field by field; results in their own form, one file for good and bad."""
    if name == "ANTHROPIC":
        pytest.importorskip("anthropic", reason="the anthropic extra is not installed")
    given = [body for body in bodies(name) if not _CACHED & body.keys()]
    rows = [
        {"key": f"k{n}", "request": body}
        if name == "GEMINI"
        else {"custom_id": f"k{n}", "params": body}
        for n, body in enumerate(given)
    ]
    done = run(tmp_path, provider, rows, "--out-format", name.lower(), *options)
    assert done.returncode == 0, done.stderr
    sent = [{k: v for k, v in body.items() if name != "GEMINI" or k != "model"} for body in given]
    assert canonical([call.body for call in provider.calls]) == canonical(sent)
    found = lines(tmp_path / f"rows.jsonl.results.{name.lower()}.jsonl")
    assert len(found) == len(rows)
    for line in found:
        if name == "GEMINI":
            assert line["response"]["candidates"]
        else:
            assert line["result"]["message"]["type"] == "message"


def test_two_models_in_one_file_are_two_quotas(tmp_path: Path, provider: SimulatedProvider) -> None:
    """Each with the limits of the command; --model beside them is refused without --override."""
    rows = [
        {
            "custom_id": f"c{n}",
            "body": {"model": f"m{n % 2}", "messages": samples.USER and [samples.USER]},
        }
        for n in range(10)
    ]
    refused = run(tmp_path, provider, rows, "--model", "openai:other")
    assert refused.returncode == 2
    assert "line 1 names the model 'm0', and --model names 'other'" in refused.stderr
    assert not provider.calls
    done = run(tmp_path, provider, rows, "--rpm", "6000", "--batch-id", "two", "--keep-raw")
    assert done.returncode == 0, done.stderr
    results = lines(tmp_path / "rows.jsonl.results.jsonl")
    assert {line["metadata"]["priced_as"] for line in results} == {"openai:m0", "openai:m1"}
    assert {call.model for call in provider.calls} == {"m0", "m1"}
