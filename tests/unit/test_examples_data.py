"""The examples' data, and that no example starts without its key."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "data" / "docstrings.jsonl"
PROVIDERS = {
    "GEMINI_API_KEY": "https://aistudio.google.com/apikey",
    "OPENAI_API_KEY": "https://platform.openai.com/api-keys",
}
KEYED = {
    "classify.py": "GEMINI_API_KEY",
    "shared_cache.py": "GEMINI_API_KEY",
    "resume.py": "GEMINI_API_KEY",
    "async_code.py": "GEMINI_API_KEY",
    "wrap_client.py": "OPENAI_API_KEY",
}


def test_the_data_is_several_hundred_distinct_real_texts() -> None:
    """400 rows, each with an id of its own and a text worth a call."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["item_id"] for row in rows}) == 400
    assert all(150 <= len(row["text"]) <= 1200 for row in rows)
    assert len({row["item_id"].partition(".")[0] for row in rows}) > 60


def test_the_script_gives_the_data() -> None:
    """This Python's library holds nearly every row of the file word for word."""
    script = [sys.executable, str(EXAMPLES / "extract_docstrings.py"), "--limit", "0"]
    produced = subprocess.run(script, capture_output=True, text=True, check=True, timeout=60)
    lines = set(produced.stdout.splitlines())
    committed = DATA.read_text(encoding="utf-8").splitlines()
    assert sum(line in lines for line in committed) >= 0.95 * len(committed)


def test_the_script_draws_by_lot_from_what_all_versions_share(tmp_path: Path) -> None:
    """`--same-in` keeps the rows that the other versions' files have, too."""
    other = tmp_path / "other.jsonl"
    other.write_text(
        "\n".join(DATA.read_text(encoding="utf-8").splitlines()[:50]), encoding="utf-8"
    )
    script = [sys.executable, str(EXAMPLES / "extract_docstrings.py"), "--same-in", str(other)]
    produced = subprocess.run(script, capture_output=True, text=True, check=True, timeout=60)
    assert set(produced.stdout.splitlines()) <= set(other.read_text(encoding="utf-8").splitlines())
    assert len(produced.stdout.splitlines()) >= 45


@pytest.mark.parametrize(("name", "variable"), KEYED.items())
def test_an_example_without_its_key_says_where_to_get_one(name: str, variable: str) -> None:
    """Started without a key, an example ends at once with one line that names where to get it."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_API_KEY")}
    ended = subprocess.run(
        [sys.executable, name],
        cwd=EXAMPLES,
        env=environment | {"PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == f"{variable} is not set: get a key at {PROVIDERS[variable]}\n"


def test_the_local_server_s_example_says_that_there_is_none() -> None:
    """Without a server, the example names the address it tried and how to change it."""
    ended = subprocess.run(
        [sys.executable, "local_server.py"],
        cwd=EXAMPLES,
        env={
            **os.environ,
            "LOCAL_LLM_URL": "http://127.0.0.1:9/v1",
            "PYTHONPATH": str(EXAMPLES.parent),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "no server at http://127.0.0.1:9/v1" in ended.stderr
    assert "LOCAL_LLM_URL" in ended.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_uses_the_public_api_only(path: Path) -> None:
    """Examples import from `batchllm_celery` itself, never from a part of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {
        one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names
    }
    assert not [name for name in modules if name and name.startswith("batchllm_celery.")]
    if path.name != "extract_docstrings.py":
        assert any(name == "batchllm_celery" for name in modules)


def test_every_example_is_listed() -> None:
    """The examples' README names each program."""
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f"({path.name})" not in listed] == []
