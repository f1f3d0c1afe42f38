"""The real lock, read by the pips that come with Python, while newer releases exist."""

from __future__ import annotations

import base64
import ensurepip
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.version import Version

from tests.unit.test_lock import HASH, LOCK, pins_of, version_of

pytestmark = pytest.mark.xdist_group("install")  # its tests share what they start


def bundled_pips() -> list[Path]:
    """The pips that `python -m venv` installs: of this Python, and of others that lie beside it."""
    folders = [Path(ensurepip.__file__).parent / "_bundled"]
    if folder := sysconfig.get_config_var("WHEEL_PKG_DIR"):
        folders.append(Path(folder))
    folders += Path(sys.base_prefix).parent.glob("*/lib/python3.1[1-9]/ensurepip/_bundled")
    newest = {path.name: path for folder in folders for path in folder.glob("pip-*.whl")}
    return [path for name, path in sorted(newest.items()) if _major(name) >= 23]


def _major(wheel: str) -> int:
    return int(wheel.removeprefix("pip-").split(".")[0])


def build_wheel(folder: Path, name: str, version: str, metadata: list[str]) -> str:
    """A wheel that holds nothing but its metadata; returns its hash as pip writes it."""
    base = f"{name.replace('-', '_')}-{version}"
    texts = {
        "METADATA": "\n".join(
            ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *metadata, ""]
        ),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{base}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        record = []
        for file, text in texts.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            record.append(f"{base}.dist-info/{file},sha256={digest.decode().rstrip('=')},")
            wheel.writestr(f"{base}.dist-info/{file}", text)
        wheel.writestr(f"{base}.dist-info/RECORD", "\n".join(record) + "\n")
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def metadata_of(name: str) -> list[str]:
    """Requirements and extras of the package as it is installed here."""
    try:
        told = importlib.metadata.metadata(name)
    except PackageNotFoundError:
        return []
    fields = ("Requires-Dist", "Provides-Extra")
    return [f"{field}: {value}" for field in fields for value in told.get_all(field) or []]


@pytest.fixture(scope="module")
def newer_index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An index with every pinned package and a newer release of each, and the lock for it.

    The lock is the real one; only its hashes are those of the index' own files.
    """
    folder = tmp_path_factory.mktemp("index")
    text = HASH.sub("", LOCK)
    for name, pin in pins_of(LOCK).items():
        metadata = metadata_of(name)
        digest = build_wheel(folder, name, version_of(pin), metadata)
        newer = ".".join([*map(str, Version(version_of(pin)).release[:2]), "9999"])
        build_wheel(folder, name, newer, metadata)
        head = re.escape(str(pin.name)) + r"(\[.*?\])?==.*?(?= \\$)"
        text, changed = re.subn(rf"^({head})", rf"\1 --hash={digest}", text, flags=re.M)
        assert changed == 1, name
    lines = (line.removesuffix(" \\") for line in text.splitlines())
    return folder, "\n".join(line for line in lines if re.match(r"[A-Za-z0-9]", line)) + "\n"


def resolve(pip: Path, index: Path, lock: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`pip install --require-hashes` of a lock, by this pip and from this index, as a dry run."""
    file = folder / "requirements.lock"
    file.write_text(lock, encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    command = [sys.executable, str(pip / "pip"), "install", "-q", "--dry-run", "--ignore-installed"]
    sources = ["--isolated", "--no-cache-dir", "--no-index", "--find-links", str(index)]
    return subprocess.run(
        [*command, *sources, "--require-hashes", "-r", str(file)],
        env=clean | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pip", bundled_pips(), ids=lambda path: path.name.split("-py3")[0])
def test_the_lock_installs_although_newer_releases_exist(
    pip: Path, newer_index: tuple[Path, str], tmp_path: Path
) -> None:
    """The pip that comes with Python takes the lock as it is, whatever was released since."""
    index, lock = newer_index
    ended = resolve(pip, index, lock, tmp_path)
    assert ended.returncode == 0, ended.stderr
    if pip.name.startswith("pip-23."):  # that pip refuses what lost an extra, so the index bites
        ended = resolve(pip, index, lock.replace("google-auth[requests]", "google-auth"), tmp_path)
        assert ended.returncode != 0
        assert "google-auth[requests]" in ended.stderr
