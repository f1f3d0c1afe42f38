"""This package's version, as it was installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The version in the distribution's metadata; `0.0.0+dev` in a tree that is not installed."""
    try:
        return version("batchllm-celery")
    except PackageNotFoundError:
        return "0.0.0+dev"


__version__ = installed_version()
