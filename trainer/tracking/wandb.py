"""One run at Weights & Biases: `<run>/wandb.json` names it. The server knows how far it has come, offline that file.

The package writes what it is given to files and uploads these by a process of its own, which tries again for as long as
it lives. What a server lacks when the run is opened again is sent again, from our own records.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from scoreray.data.errors import UserError
from scoreray.data.scratch import SCRATCH
from scoreray.data.storage.store import NotFound
from scoreray.trainer.config import Config
from scoreray.trainer.monitoring.metrics import TrainingRecord
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.tracking.base import Ending

KEY = "wandb.json"
ITS_OWN_METRICS = "opentelemetry.exporter.otlp.proto.http.metric_exporter"  # a warning each time the server is away
OPEN_S, CLOSE_S = 20.0, 10.0  # for the server to answer, and to take what is left; the rest by the same command later


@dataclass(frozen=True)
class _WandbRun:
    """`<run>/wandb.json`. offline_images: of the newest record in files of runs that were offline."""

    project: str
    run_id: str
    offline_images: int = 0


_STORED = TypeAdapter(_WandbRun)


class WandbTracker:
    """See `Tracker`. `project`: "project" or "entity/project"."""

    key = "wandb"

    def __init__(self, config: Config, project: str) -> None:
        self._config, self._run, self.place = config, run_store(config), project
        self._stored = _WandbRun(project, "")
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._wandb_run: Any = None

    def open(self) -> int:
        import wandb

        logging.getLogger(ITS_OWN_METRICS).setLevel(logging.CRITICAL)
        offline = os.environ.get("WANDB_MODE", "online") != "online"
        if not offline and not wandb.login(prompt=False, timeout=int(OPEN_S)):
            raise UserError("no credentials; set WANDB_API_KEY, or WANDB_MODE=offline")
        self._stored = self._known()
        if not offline and "WANDB_DIR" not in os.environ:
            self._files = tempfile.TemporaryDirectory(prefix="wandb-", dir=os.environ.get(SCRATCH))
        entity, _, project = self.place.rpartition("/")
        self._wandb_run = wandb.init(
            entity=entity or None,
            project=project,
            id=self._stored.run_id,
            name=self._config.run.name,
            notes=self._run.url(),
            config=self._config.model_dump(mode="json"),
            resume="allow",
            dir=None if self._files is None else self._files.name,
            settings=wandb.Settings(
                console="off", silent=True, disable_code=True, disable_git=True, init_timeout=OPEN_S,
                finish_timeout=CLOSE_S,
            ),
        )  # fmt: skip
        return self._stored.offline_images if offline else max(0, self._wandb_run.starting_step - 1)

    def send(self, records: Sequence[TrainingRecord]) -> None:
        for record in records:
            self._wandb_run.log({**dict(record.scalars()), "_timestamp": record.time}, step=record.images)
        if self._wandb_run.offline:
            self._stored = replace(self._stored, offline_images=records[-1].images)
            self._run.put(KEY, json.dumps(asdict(self._stored)).encode())

    def close(self, ending: Ending) -> None:
        self._wandb_run.finish(exit_code=0 if ending == "FINISHED" else 1)
        if self._files is not None:
            self._files.cleanup()

    def _known(self) -> _WandbRun:
        """Our run there. Stored before it is made: a start that is killed in between makes no second one."""
        with contextlib.suppress(NotFound):
            stored = _STORED.validate_json(self._run.get(KEY))
            if stored.project == self.place:
                return stored
        stored = _WandbRun(self.place, uuid.uuid4().hex[:16])
        self._run.put(KEY, json.dumps(asdict(stored)).encode())
        return stored
