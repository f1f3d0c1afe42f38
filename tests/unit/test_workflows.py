"""CI, release and pre-commit: they cover what pyproject.toml promises, and call what there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def workflow(name: str) -> dict[str, Any]:
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    # YAML 1.1 takes the key `on` for a truth value; GitHub does not.
    loaded: dict[str, Any] = yaml.load(text.replace("\non:", "\n'on':"), yaml.SafeLoader)
    return loaded


def steps(name: str) -> Iterator[dict[str, Any]]:
    for job in workflow(name)["jobs"].values():
        yield from job["steps"]


def supported() -> set[str]:
    found = (re.fullmatch(r"Programming .* (3\.\d+)", one) for one in PROJECT["classifiers"])
    return {one[1] for one in found if one}


def minors(versions: list[str]) -> set[str]:
    return {".".join(version.split(".")[:2]) for version in versions}


def test_every_python_that_we_name_is_tested() -> None:
    """3.11 to 3.14: by `make check` and `make test` in CI, and by the wheel before a release."""
    assert supported() == {"3.11", "3.12", "3.13", "3.14"}
    assert minors(workflow("ci")["jobs"]["test"]["strategy"]["matrix"]["python"]) == supported()
    wheel = workflow("release")["jobs"]["wheel"]
    assert minors(wheel["strategy"]["matrix"]["python"]) == supported()
    called = {step.get("run") for step in steps("ci")}
    assert {"make check", "make test", "make demo"} <= called


def test_the_newest_releases_are_tried_every_week() -> None:
    """Not those of the lock: the newest that pyproject.toml lets in."""
    assert len(workflow("newest")["on"]["schedule"]) == 1
    runs = " ".join(step.get("run", "") for step in steps("newest"))
    assert "--upgrade-strategy eager" in runs
    assert "requirements.lock" not in runs


def test_a_tag_publishes_what_was_built_and_checked() -> None:
    """Publishing comes last, alone may ask for a token, and takes the files that were checked."""
    release = workflow("release")
    jobs = release["jobs"]
    assert release["on"] == {"push": {"tags": ["v*"]}}
    assert jobs["wheel"]["needs"] == "build"
    assert jobs["publish"]["needs"] == "wheel"
    assert "make check-wheel" in [step.get("run") for step in jobs["wheel"]["steps"]]
    may = {name: job["permissions"].get("id-token") for name, job in jobs.items()}
    assert may == {"build": None, "wheel": None, "publish": "write"}
    assert not [step for step in jobs["publish"]["steps"] if "run" in step]
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_no_more_rights_than_it_needs(path: Path) -> None:
    """No right by default, a limit of time, no token left in the checkout, only our own targets."""
    loaded = workflow(path.stem)
    assert loaded["permissions"] == {}
    assert all(job["timeout-minutes"] <= 90 for job in loaded["jobs"].values())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in steps(path.stem):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert set(re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))) <= targets


def test_the_changelog_has_a_section_for_this_version() -> None:
    """The release refuses a tag without it."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{PROJECT['version']}] - " in changelog


def test_pre_commit_runs_what_make_check_runs() -> None:
    """The same four tools, from the project's own environment; nothing is fetched."""
    loaded = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = loaded["repos"]
    assert local["repo"] == "local"
    entries = [hook["entry"] for hook in local["hooks"]]
    assert all(entry.startswith(".venv/bin/") for entry in entries)
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert check is not None
    tools = re.findall(r"\$\(BIN\)/(\S+)", check[1])
    assert set(tools) <= {entry.split()[0].removeprefix(".venv/bin/") for entry in entries}


def test_make_hears_of_pip_only_where_packages_come_from_and_of_proxies_not_here() -> None:
    """The caller's shell may hold options that would install elsewhere, or nothing; and a proxy,
    which does not lead to servers on this machine."""
    make = shutil.which("make")
    assert make is not None
    shell = {
        "PIP_ROOT": "/x", "PIP_DRY_RUN": "1", "PIP_CONSTRAINT": "/x", "PYTEST_ADDOPTS": "-x",
        "PIP_INDEX_URL": "http://kept", "no_proxy": "a.example", "NO_PROXY": "b.example",
    }  # fmt: skip
    command = [make, "--no-print-directory", "-C", str(ROOT), "--eval=show: ; @env", "show"]
    shown = subprocess.run(command, env=os.environ | shell, check=True, capture_output=True)
    seen = dict(line.partition("=")[::2] for line in shown.stdout.decode().splitlines())
    assert not seen.keys() & {"PIP_ROOT", "PIP_DRY_RUN", "PIP_CONSTRAINT", "PYTEST_ADDOPTS"}
    assert seen["PIP_INDEX_URL"] == "http://kept"
    assert seen["no_proxy"] == seen["NO_PROXY"]
    assert {"a.example", "b.example", "127.0.0.1"} <= set(seen["no_proxy"].split(","))
