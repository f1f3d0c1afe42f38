"""Lua scripts: read from the package once, run by their hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Self

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

#: A line that stands for the text of another file, whose path is relative to the script's folder.
_INCLUDE = re.compile(r"^--#include (\S+)\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script; call it with a client, its keys and its arguments.

    ACQUIRE = Script.load("batchllm_celery.limiter", "lua/acquire.lua")
    reply = await ACQUIRE(connection.client, [key], [process, sequence])
    """

    name: str
    text: str
    sha: str

    @classmethod
    def load(cls, package: str, name: str, *, shared: str | None = None, head: str = "") -> Self:
        """The script in file `name` of `package`, with what its `--#include` lines name.

        `head` goes before it, then the file `shared`.
        """
        *folders, file = name.split("/")
        folder = resources.files(package).joinpath(*folders)
        texts = [_read(folder, one) for one in (shared, file) if one is not None]
        return cls.of(name, head + "\n".join(texts))

    @classmethod
    def of(cls, name: str, text: str) -> Self:
        """A script from its text."""
        # The hash is Redis' name for the script, not a protection.
        return cls(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    async def __call__(
        self,
        client: Redis,
        keys: Sequence[str],
        args: Sequence[bytes | str | int | float] = (),
    ) -> Any:
        """Run the script: one round trip, two when Redis has not seen it yet."""
        try:
            return await client.execute_command("EVALSHA", self.sha, len(keys), *keys, *args)
        except NoScriptError:
            # EVAL loads and runs in one step: nothing can flush the script in between.
            return await client.execute_command("EVAL", self.text, len(keys), *keys, *args)


def _read(folder: Traversable, name: str) -> str:
    text = folder.joinpath(*name.split("/")).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda line: _read(folder, line[1]), text)
