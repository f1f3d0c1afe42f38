"""Lua scripts: read from the package once, run by their hash."""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Self

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

#: A line that stands for the text of another file, whose path is relative to the script's folder.
_INCLUDE = re.compile(r"^--#include (\S+)\n", re.MULTILINE)
#: Clients whose server does not know a first line `#!lua`: Redis before 7.0.
_before_7: weakref.WeakSet[Redis] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script; call it with a client, its keys and its arguments.

    ACQUIRE = Script.load("batchllm_celery.limiter", "lua/acquire.lua")
    reply = await ACQUIRE(connection.client, [key], [process, sequence])
    """

    name: str
    text: str
    sha: str
    before_7: Script | None = None
    """The same for a server that refuses `#!lua`; None where this one has no such line."""

    @classmethod
    def load(cls, package: str, name: str, *, head: str = "", head_before_7: str = "") -> Self:
        """The script in file `name` of `package`.

        A line `--#include FILE` in it stands for the text of that file, in the script's folder.
        `head` goes before all. Redis before 7.0 refuses a first line `#!lua flags=...` and gets
        `head_before_7` in place of such a head.
        """
        *folders, file = name.split("/")
        folder = resources.files(package).joinpath(*folders)
        body = _read(folder, file)
        first_line = head.startswith("#!")
        return cls.of(name, head + body, head_before_7 + body if first_line else None)

    @classmethod
    def of(cls, name: str, text: str, before_7: str | None = None) -> Self:
        """A script from its text."""
        # The hash is Redis' name for the script, not a protection.
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        return cls(name, text, sha, None if before_7 is None else cls.of(name, before_7))

    async def __call__(
        self,
        client: Redis,
        keys: Sequence[str],
        args: Sequence[bytes | str | int | float] = (),
    ) -> Any:
        """Run the script: one round trip, two when Redis has not seen it yet."""
        old = self.before_7
        known = old if old is not None and client in _before_7 else self
        try:
            return await client.execute_command("EVALSHA", known.sha, len(keys), *keys, *args)
        except ResponseError as error:
            if not isinstance(error, NoScriptError) and not refuses_first_line(error):
                raise
            # EVAL loads and runs in one step: nothing can flush the script in between
        try:
            reply = await client.execute_command("EVAL", self.text, len(keys), *keys, *args)
        except ResponseError as error:
            if old is None or not refuses_first_line(error):
                raise
            _before_7.add(client)
            return await client.execute_command("EVAL", old.text, len(keys), *keys, *args)
        _before_7.discard(client)  # a newer server has taken its place
        return reply


def refuses_first_line(error: Exception) -> bool:
    """Whether a server did not run a script because of its first line `#!lua`."""
    return "1: unexpected symbol near '#'" in str(error)


def _read(folder: Traversable, name: str) -> str:
    text = folder.joinpath(*name.split("/")).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda line: _read(folder, line[1]), text)
