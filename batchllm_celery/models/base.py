"""The base of our models: frozen, strict about names, JSON only."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

#: Version of everything we write to Redis and to result files. A reader refuses a newer one.
SCHEMA_VERSION = 1

#: Largest amount (calls, tokens, US dollars, bytes) that a bound may be. The scripts in Redis count
#: in doubles, and take a larger number in a batch for damage.
MOST = 10**15
#: Longest duration, in seconds: about 30 years.
MOST_SECONDS = 10**9
#: Highest price, in US dollars per million tokens.
MOST_DOLLARS = 10**6


class Model(BaseModel):
    """A frozen value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
