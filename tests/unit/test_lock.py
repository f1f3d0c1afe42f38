"""requirements.lock: complete, and closed under what its packages ask for."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PYTHONS = ("3.11.2", "3.11.7", "3.12.1", "3.13.0", "3.14.0")
OURS = "batchllm-celery"
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")

Pins = dict[str, Requirement]


def pins_of(text: str) -> Pins:
    """Each pinned package's line, as a requirement with extras and marker."""
    lines = re.findall(r"^([A-Za-z0-9].*?) \\$", text, re.MULTILINE)
    return {canonicalize_name(one.name): one for one in map(Requirement, lines)}


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    return specifier.version


def environments() -> Iterator[dict[str, str]]:
    """Where we say that we run: Linux and macOS, on each Python that we support."""
    for python in PYTHONS:
        for system, platform in (("linux", "Linux"), ("darwin", "Darwin")):
            yield {
                "python_version": ".".join(python.split(".")[:2]),
                "python_full_version": python,
                "implementation_name": "cpython",
                "implementation_version": python,
                "platform_python_implementation": "CPython",
                "platform_system": platform,
                "platform_machine": "x86_64",
                "sys_platform": system,
                "os_name": "posix",
            }


def asked_for(
    requirements: Iterable[str], extras: set[str]
) -> Iterator[tuple[Requirement, dict[str, str]]]:
    """What these requirements mean in each environment, with these extras chosen."""
    for requirement in map(Requirement, requirements):
        for environment in environments():
            chosen = [{**environment, "extra": extra} for extra in ("", *sorted(extras))]
            marker = requirement.marker
            if marker is None or any(marker.evaluate(one) for one in chosen):
                yield requirement, environment


def missing_from(
    pins: Pins, requirements: Iterable[str], extras: set[str], asking: Requirement | None = None
) -> list[str]:
    """What the pins don't satisfy: a package, a version, a marker or an extra of it.

    `asking` is whose requirements they are: where it is not installed, nobody asks.
    """
    found = set()
    for requirement, environment in asked_for(requirements, extras):
        if asking is not None and asking.marker and not asking.marker.evaluate(environment):
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            found.add(f"{requirement.name} is not pinned")
        elif pin.marker is not None and not pin.marker.evaluate(environment):
            found.add(f"{requirement.name} is not pinned for {environment['python_full_version']}")
        elif not requirement.specifier.contains(version_of(pin), prereleases=True):
            found.add(f"{pin} is not {requirement.specifier}")
        elif lost := requirement.extras - pin.extras:
            found.add(f"{requirement.name} is pinned without [{','.join(sorted(lost))}]")
    return sorted(found)


def unsatisfied(pins: Pins) -> list[str]:
    """What some pinned package asks for and the pins don't give; of those installed here."""
    found = []
    for name, pin in pins.items():
        try:
            requirements = importlib.metadata.requires(name) or []
        except PackageNotFoundError:  # for another system than this one
            continue
        found += [
            f"{name}: {problem}" for problem in missing_from(pins, requirements, pin.extras, pin)
        ]
    return found


def project() -> tuple[list[str], dict[str, list[str]]]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table["dependencies"], table["optional-dependencies"]


@pytest.fixture(scope="module")
def pins() -> Pins:
    return pins_of(LOCK)


def test_every_pin_has_a_version_and_hashes(pins: Pins) -> None:
    """`pip install --require-hashes` refuses what is not pinned completely."""
    blocks = re.split(r"\n(?=[a-z0-9])", LOCK, flags=re.IGNORECASE)
    assert len(blocks) == len(pins)
    assert [block.split()[0] for block in blocks if not HASH.search(block)] == []
    assert [str(pin) for pin in pins.values() if "*" in version_of(pin)] == []


def test_what_pyproject_asks_for_is_pinned_with_its_extras(pins: Pins) -> None:
    """The lock was made anew after the last change of the dependencies."""
    dependencies, extras = project()
    wanted = [*dependencies, *(text for group in extras.values() for text in group)]
    others = [text for text in wanted if canonicalize_name(Requirement(text).name) != OURS]
    assert missing_from(pins, others, set()) == []


def test_what_a_pinned_package_asks_for_is_pinned_with_its_extras(pins: Pins) -> None:
    """An extra that a line leaves out is one that pip looks for elsewhere, without a hash."""
    assert unsatisfied(pins) == []


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("google-auth[requests]", "google-genai: google-auth is pinned without [requests]"),
        ("async-timeout", "redis: async-timeout is not pinned"),
        ("multidict", "aiohttp: multidict is not pinned"),
    ],
)
def test_a_lock_with_something_left_out_is_noticed(lost: str, told: str) -> None:
    """A missing extra, a package for one Python only, one that two others need."""
    bare = LOCK.replace(lost, lost.partition("[")[0])
    if "[" not in lost:
        bare = re.sub(rf"^{lost}==(.*\n)(?:    .*\n)*", "", LOCK, flags=re.MULTILINE)
    assert bare != LOCK
    assert any(problem == told for problem in unsatisfied(pins_of(bare)))
