"""The exit codes of the commands."""

from __future__ import annotations

from typing import Final

OK: Final = 0
SOME_FAILED: Final = 1
USAGE: Final = 2
STOPPED: Final = 3
INTERRUPTED: Final = 130
