"""Results as a typed strategy promises them: the JSON of an output made its type again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter, ValidationError

from batchllm_celery.errors import FailureKind
from batchllm_celery.models import WorkItemResult


class Outputs:
    """Reads result lines.

    Args:
        output_type: of the outputs; `Any`: their JSON form is what they are.
    """

    def __init__(self, output_type: Any = Any) -> None:
        self._type = output_type

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self._type)

    def read(self, line: bytes | Mapping[str, Any]) -> WorkItemResult[Any, Any]:
        """The result of a line, its output validated back.

        An answer that this process's type refuses (the worker has another version of it) is a
        failure here, of kind `validation`; its JSON is in `metadata["output"]`.
        """
        fields = line if isinstance(line, Mapping) else json.loads(line)
        result = WorkItemResult.from_json(fields)
        if self._type is Any or not result.success or result.metadata.get("dry_run"):
            return result
        try:
            # From JSON: a tuple, a date, a set has no form of its own there.
            output = self._adapter.validate_json(
                json.dumps(result.output), by_alias=True, by_name=True
            )
        except ValidationError as error:
            # Pydantic's own words quote the answer.
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the answer"
            return result.model_copy(
                update={
                    "success": False,
                    "output": None,
                    "error_kind": FailureKind.VALIDATION,
                    "error": f"OutputMismatch: the answer is no {_name(self._type)} of this "
                    f"process ({place}: {first['type']}); is a worker's version another?",
                    "metadata": {**result.metadata, "output": result.output},
                }
            )
        return result.model_copy(update={"output": output})


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
