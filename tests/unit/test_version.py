"""The version is written down once, in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import batchllm_celery
from batchllm_celery import _version

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_installed_distributions() -> None:
    """`batchllm_celery.__version__` is what pip says, and pip says what pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert batchllm_celery.__version__ == version("batchllm-celery") == project["version"]


def test_the_version_can_be_asked_from_a_shell() -> None:
    """A new process prints the same version."""
    code = "import batchllm_celery; print(batchllm_celery.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == version("batchllm-celery")


def test_a_tree_that_is_not_installed_is_a_development_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without metadata the version is 0.0.0+dev instead of an error."""

    def not_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_version, "version", not_installed)
    assert _version.installed_version() == "0.0.0+dev"
