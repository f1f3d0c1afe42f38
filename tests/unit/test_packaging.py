"""Packaging: what the wheel holds, no package index in a file, no broken link."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKIPPED = {".git", ".venv", "demo", "dist", "build", ".bench"}


def _files() -> Iterator[Path]:
    """Every text file of the project that could be shipped."""
    for top in ROOT.iterdir():
        if top.name not in SKIPPED and not top.name.endswith("_cache"):
            yield from (path for path in [top, *top.rglob("*")] if path.is_file())


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


def test_every_link_to_a_file_leads_somewhere() -> None:
    """Pictures, guides and sources that the README and the guides point at are in the tree."""
    code = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(
            r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", code.sub("", page.read_text(encoding="utf-8"))
        )
        if not (page.parent / target).exists()
    ]
    assert broken == []
