"""The base of our models: frozen, strict about names, JSON only."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

#: Version of everything we write to Redis and to result files. A reader refuses a newer one.
SCHEMA_VERSION = 1


class Model(BaseModel):
    """A frozen value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
