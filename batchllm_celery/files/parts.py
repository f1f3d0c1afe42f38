"""Files that the parts of a request name: read before anything is enqueued."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any

from batchllm_celery.models import Request
from batchllm_celery.models.request import FilePart, ImagePart

#: Bytes of a file that a part may name: no provider takes more in a request.
MOST_FILE_BYTES = 50 * 1024 * 1024
#: Files that are kept for the next rows, which often name the same one.
KEPT_FILES = 4


class PartError(ValueError):
    """A part's file can't be used; the text names the part, never its content."""


class PartReader:
    """Reads the files of parts.

    Args:
        root: folder that all files must lie in, for requests that are somebody's data; None: paths
            are written in code, and any file may be named.
        most_bytes: of one file.
    """

    def __init__(self, root: Path | None = None, *, most_bytes: int = MOST_FILE_BYTES) -> None:
        self._root = None if root is None else Path(os.path.realpath(root))
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[str, int, int, int], bytes] = OrderedDict()

    def read(self, request: Request) -> Request:
        """The request with bytes in the place of paths.

        Raises:
            PartError: naming the part (`messages[0].content[1].path`) and what is wrong.
        """
        if all(part.path is None for _, part in request.media()):
            return request
        return request.map_media(self._change)

    def _change(self, place: str, part: ImagePart | FilePart) -> ImagePart | FilePart:
        if part.path is None:
            return part
        try:
            data = self._bytes(part.path)
        except PartError as problem:
            raise PartError(f"{place}.path: {problem}") from None
        changes: dict[str, Any] = {"path": None, "data": data}
        if isinstance(part, FilePart) and part.name is None:
            changes["name"] = os.path.basename(part.path)
        return part.model_copy(update=changes)

    def _bytes(self, path: str) -> bytes:
        try:
            found = self._resolved(path)
            state = os.stat(found)
            if not stat.S_ISREG(state.st_mode):
                raise PartError("it is no regular file")
            if state.st_size > self._most_bytes:
                raise PartError(
                    f"the file has {state.st_size:,} bytes; at most {self._most_bytes:,} are taken"
                )
            if not state.st_size:
                raise PartError("the file is empty")
            key = (found, state.st_mtime_ns, state.st_size, state.st_ino)
            if key not in self._kept:
                with open(found, "rb") as file:
                    self._kept[key] = file.read(self._most_bytes + 1)
                while len(self._kept) > KEPT_FILES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]
        except (OSError, ValueError) as error:
            if isinstance(error, PartError):
                raise
            why = error.strerror if isinstance(error, OSError) else "it is no path"
            raise PartError(f"the file can't be read: {why}") from None

    def _resolved(self, path: str) -> str:
        """The file's real path.

        Raises:
            PartError: it lies outside of the root, by `..`, by a link, or by an absolute path.
        """
        if self._root is None:
            return os.path.realpath(path)
        found = os.path.realpath(self._root / path)
        if not Path(found).is_relative_to(self._root):
            raise PartError("the file lies outside of the folder that files are read from")
        return found
