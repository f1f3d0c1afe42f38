"""What is shipped and pinned: the wheel, the lock, the rules of the house."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SKIPPED = {".git", ".venv", "demo", "dist", "build", ".bench"}


def _files() -> Iterator[Path]:
    """Every text file of the project that could be shipped."""
    for top in ROOT.iterdir():
        if top.name not in SKIPPED and not top.name.endswith("_cache"):
            yield from (path for path in [top, *top.rglob("*")] if path.is_file())


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    """Each pinned package and its block of the lock."""
    blocks = re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text(), flags=re.I)
    return {canonicalize_name(re.split(r"[=\[ ]", block)[0]): block for block in blocks}


def test_no_file_names_a_package_index() -> None:
    """Whoever installs us uses the index of their own configuration."""
    hosts = ["pypi" + ".org", "python" + "hosted.org", "--index" + "-url"]
    guilty = [
        f"{path.relative_to(ROOT)}: {host}"
        for path in _files()
        if path.suffix != ".pyc"
        for host in hosts
        if host.encode() in path.read_bytes()
    ]
    assert guilty == []


def test_every_pin_has_a_version_and_hashes(lock: dict[str, str]) -> None:
    """`pip install --require-hashes` refuses what is not pinned completely."""
    loose = [
        name
        for name, block in lock.items()
        if not re.match(r"[^=;]+==\S+", block) or "--hash=sha256:" not in block
    ]
    assert loose == []


def test_what_pyproject_asks_for_is_pinned_within_its_bounds(lock: dict[str, str]) -> None:
    """The lock was made anew after the last change of the dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        if (name := canonicalize_name(requirement.name)) == "batchllm-celery":
            continue
        pinned = re.match(r"[^=;]+==([^\s;]+)", lock.get(name, ""))
        assert pinned, f"{name} is not in requirements.lock: make lock"
        assert requirement.specifier.contains(pinned[1], prereleases=True), name


def test_the_wheel_holds_the_scripts_and_the_types(tmp_path: Path) -> None:
    """Lua files and py.typed are shipped; tests and examples are not."""
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "batchllm_celery"
    wanted = [path for kind in ("py", "lua", "typed") for path in package.rglob(f"*.{kind}")]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= shipped
    assert "batchllm_celery/py.typed" in shipped
    assert {name.split("/")[0].partition("-")[0] for name in shipped} == {"batchllm_celery"}
    assert any(name.endswith("licenses/LICENSE") for name in shipped)
