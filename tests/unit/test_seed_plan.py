"""The seed plan's documents are there, and its table names code and tests that exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from batchllm_celery import GeminiCachedStrategy
from batchllm_celery.progress import ProgressReporter

ROOT = Path(__file__).parents[2]
PLAN = (ROOT / "docs" / "seed-plan.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def file_of(name: str) -> Path:
    """A test file, named by its path or (at the top of tests/) by its basename."""
    return ROOT / (name if name.startswith("tests/") else f"tests/{name}")


def proofs() -> list[tuple[str, str]]:
    """(file, name or beginning of a test) of every proof that the table gives."""
    found, file = [], ""
    for named, test in re.findall(r"`((?:tests/)?[\w/]*\.py)?(?:::(\w+)…?)?`", PLAN):
        file = named or file
        if "test_" in file:
            found.append((file, test))
    return found


@pytest.mark.parametrize(("file", "test"), sorted(set(proofs())))
def test_every_proof_that_the_table_names_exists(file: str, test: str) -> None:
    """A row whose test was renamed or never written proves nothing."""
    text = file_of(file).read_text(encoding="utf-8")
    assert not test or re.search(rf"def {test}", text), f"{file} has no {test}..."


def test_the_table_has_every_number_of_the_plan() -> None:
    """1.1 to 6.2, each once, each with a proof."""
    numbers = "1.1 1.2 1.3 2.1 2.2 2.3 2.4 2.5 3.1 3.2 3.3 3.4 3.5 4.1 4.2 4.3 4.4 4.5 4.6 5.1 5.2"
    rows = dict(re.findall(r"^\| (\d\.\d) \|.*\| (.*) \|$", PLAN, re.MULTILINE))
    assert list(rows) == [*numbers.split(), "5.3", "6.1", "6.2"]
    assert all(len(proof) > 3 for proof in rows.values())


def test_there_are_seven_integration_tests_and_eight_benchmarks() -> None:
    """4.4 and 4.5; both deselected unless asked for."""
    counted = {
        name: len(re.findall(r"^async def test_", file_of(name).read_text(), re.MULTILINE))
        for name in ("test_integration.py", "test_performance.py")
    }
    assert counted == {"test_integration.py": 7, "test_performance.py": 8}
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "not benchmark and not integration" in pyproject


def test_few_type_checks_are_turned_off() -> None:
    """2.1: fewer than ten in the package."""
    sources = (ROOT / "batchllm_celery").rglob("*.py")
    assert sum(path.read_text(encoding="utf-8").count("# type: ignore") for path in sources) < 10


def test_the_migration_guide_is_an_index() -> None:
    """4.2: a path finder, versions, a deprecation policy; the README links to it."""
    guide = (ROOT / "docs" / "MIGRATION.md").read_text(encoding="utf-8")
    for heading in ("Migration path finder", "Versions", "Deprecation policy"):
        assert f"## {heading}" in guide
    assert "docs/MIGRATION.md" in README


def test_the_readme_guides_the_choice_of_max_workers_and_the_dry_run() -> None:
    """2.4 and 5.2."""
    guide = README.partition("Choosing max_workers")[2].partition("\n## ")[0]
    for words in (
        "5-10",
        "300 / 60 x 0.8",
        "min(cpu_count() * 2, 20)",
        "rate_limit_count",
        "| 2 |",
    ):
        assert words in guide, words
    assert "--dry-run" in README
    assert "dry_run=True" in README


def test_thread_safety_is_said_where_it_matters() -> None:
    """6.2: at the cache's expiry and at the progress tasks."""
    assert "Thread safety" in (GeminiCachedStrategy._is_cache_expired.__doc__ or "")
    assert "need no lock" in inspect.getsource(ProgressReporter.__init__)
