"""The provider's own record of every call, against which tests check a fleet."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from batchllm_celery.simulation.answers import digest_of


@dataclass(slots=True)
class Call:
    """One request for an answer. `outcome` and `status` are settled when it arrives."""

    number: int
    """Order of arrival, from 1."""
    time: float
    """Unix seconds of the arrival."""
    wire: str
    """`gemini` or `openai`."""
    model: str
    prompt: str
    attempt: int
    """Number of this call among the admitted ones of its prompt, from 1; 0 if it was refused."""
    status: int
    outcome: str
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    limit: str | None = None
    """The limit that refused it."""
    retry_after: float | None = None
    """Seconds that the refusal asked for, before the hint's rounding."""
    finished: float | None = None
    """Unix seconds at which the answer was sent; None while in flight."""
    aborted: bool = False
    """Whether the client went away before its answer."""
    user: str | None = None
    """OpenAI's `user`, where one was given."""
    body: Mapping[str, Any] | None = None
    """The whole body, under `keep_bodies`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """What its answer says of the limits, as they stood when it arrived."""

    def to_json(self) -> dict[str, Any]:
        """The call as a JSON object, with the digest that its answer holds."""
        fields = asdict(self)
        del fields["headers"]
        if self.body is None:
            del fields["body"]
        return {**fields, "digest": digest_of(self.prompt)}


class Journal:
    """Appends JSON lines to a file, each by one write, so a killed server has lost none.

    A call is written when it arrives; one whose client went away before the answer has a second
    line, `{"number": N, "aborted": true, "time": ...}`.

    Args:
        path: the file; None: nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = None if path is None else os.open(path, flags, 0o600)

    def arrived(self, call: Call) -> None:
        """Write the call's line."""
        if self._file is not None:
            line = call.to_json()
            del line["finished"], line["aborted"]
            self._write(line)

    def aborted(self, call: Call) -> None:
        """Write that the call's client went away."""
        if self._file is not None:
            self._write({"number": call.number, "aborted": True, "time": call.finished})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        os.write(self._file, json.dumps(line, ensure_ascii=False).encode() + b"\n")
