"""Lua scripts: read from the package once, run by their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Self

from redis.asyncio import Redis
from redis.exceptions import NoScriptError


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script; call it with a client, its keys and its arguments.

    ACQUIRE = Script.load("batchllm_celery.limiter", "acquire.lua", shared="live.lua")
    reply = await ACQUIRE(connection.client, [key], [process, sequence])
    """

    name: str
    text: str
    sha: str

    @classmethod
    def load(cls, package: str, name: str, *, shared: str, head: str = "") -> Self:
        """The script in file `name` of `package`, after what it shares with others (`shared`);
        `head` goes before both."""
        files = [resources.files(package).joinpath(file) for file in (shared, name)]
        return cls.of(name, head + "\n".join(file.read_text(encoding="utf-8") for file in files))

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
