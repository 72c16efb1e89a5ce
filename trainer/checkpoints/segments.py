"""JSON lines committed with checkpoints: <run>/<folder>/<images seen>.jsonl holds what was found since the one before.

They are written before the marker of their checkpoint, so a killed start can leave lines of a checkpoint that was never
committed; readers take those up to the newest commit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from scoreray.data.errors import DataError, Unanswered, shortened
from scoreray.data.storage.store import NotFound, Store
from scoreray.trainer.checkpoints.checkpoint import TRIES, Checkpoint, latest

T = TypeVar("T")


@dataclass(frozen=True)
class Segments(Generic[T]):
    """The segments in one folder of a run. `line`: of which dataclass each line is."""

    folder: str
    line: TypeAdapter[T]

    def write(self, images_seen: int, found: Sequence[T]) -> tuple[str, bytes]:
        """(key, bytes) of the segment that goes with the checkpoint at `images_seen`."""
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in found)  # type: ignore[call-overload]
        return f"{self.folder}/{images_seen:012d}.jsonl", lines.encode()

    def read(self, run: Store, newest: Checkpoint | None = None, after: int = 0) -> list[T]:
        """All lines up to the newest committed checkpoint, without the segments up to `after` images.

        `newest`: that checkpoint, where the caller has it. Raises DataError that names a damaged file and its line.
        """
        for _ in range(TRIES):
            files = self._files(run)
            if max(files, default=0) <= after:
                return []
            newest = newest or latest(run)
            end = newest.images_seen if newest else 0
            try:
                return [
                    one for seen in sorted(files) if after < seen <= end for one in self._read_file(run, files[seen])
                ]
            except NotFound:  # a start that resumed from before it has removed it since
                newest = None
        raise Unanswered(f"{run.url(self.folder)}: files go while they are read; is something removing them?")

    def _files(self, run: Store) -> dict[int, str]:
        """Keys by images seen; other files in the folder are none of ours."""
        names = ((re.fullmatch(r".*/(\d{12,18})\.jsonl", key), key) for key, _ in run.list(f"{self.folder}/"))
        return {int(found[1]): key for found, key in names if found}

    def _read_file(self, run: Store, key: str) -> list[T]:
        found = []
        for number, line in enumerate(run.get(key).splitlines(), 1):
            try:
                found.append(self.line.validate_json(line))
            except ValidationError as error:
                first: Any = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(map(str, first["loc"]))
                why = shortened(ascii(f"{where}: {first['msg']}" if where else first["msg"])[1:-1])
                raise DataError(
                    f"{run.url(key)}: line {number} is no record of a run ({why}); the checkpoints are not affected: "
                    "put the file back as it was, or remove it and what it held"
                ) from None
        return found
