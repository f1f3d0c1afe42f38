"""What the live processes of a fleet can run, and which quotas they get answers from.

Each heartbeat notes it with the server's time. Members of the zset `able` are, for one process:

NAME +       a registered strategy that nothing is known to be wrong with
DIGEST       a strategy that is prepared with its parameters
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from batchllm_celery.connection import Connection
from batchllm_celery.keys import Keys
from batchllm_celery.models import StrategySpec

#: Seconds that what is noted is kept at least.
KEPT_SECONDS = 3600.0


def registered(name: str) -> str:
    """The member of a registered strategy that nothing is known to be wrong with."""
    return f"{name} +"


def prepared(key: str) -> str:
    """The member of a strategy that is prepared with its parameters, by `StrategySpec.key`."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def commands(
    keys: Keys, now: float, able: Iterable[str], succeeded: Mapping[str, float], kept: float
) -> list[tuple[str | int | float, ...]]:
    """The Redis commands that note this at server time `now`.

    Args:
        keys: the fleet's names.
        now: server time.
        able: members, see above.
        succeeded: quota -> seconds since its last successful call.
        kept: seconds after which a note may go.
    """
    kept = max(kept, KEPT_SECONDS)
    noted = {keys.able: dict.fromkeys(able, now)}
    noted[keys.succeeded] = {quota: now - ago for quota, ago in succeeded.items()}
    found: list[tuple[str | int | float, ...]] = []
    for key, scores in noted.items():
        if scores:
            flat = [part for member, score in scores.items() for part in (score, member)]
            found.append(("ZADD", key, "GT", *flat))
        found.append(("ZREMRANGEBYSCORE", key, "-inf", now - kept))
        found.append(("EXPIRE", key, round(2 * kept)))
    return found


async def able_at(connection: Connection, keys: Keys, spec: StrategySpec) -> float:
    """Server time at which a live process last could run `spec`; 0: none that is known."""
    return await _latest(connection, keys.able, registered(spec.name), prepared(spec.key))


async def succeeded_at(connection: Connection, keys: Keys, quota: str) -> float:
    """Server time of a quota's last successful call in any process; 0: none that is known."""
    return await _latest(connection, keys.succeeded, quota)


async def _latest(connection: Connection, key: str, *members: str) -> float:
    client: Any = connection.client
    scores = await connection.patiently(lambda: client.zmscore(key, list(members)))
    return max((float(score) for score in scores if score is not None), default=0.0)
