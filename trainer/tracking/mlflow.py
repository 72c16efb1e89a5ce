"""One run of an MLflow server: `<run>/mlflow.json` names it, and the server knows how far it has come."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from scoreray.data.storage.store import NotFound
from scoreray.trainer.config import Config, leaves
from scoreray.trainer.monitoring.metrics import TrainingRecord
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.tracking.base import Ending

KEY = "mlflow.json"
PARAMS_AT_ONCE, PARAM_CHARACTERS = 100, 500  # limits of MLflow's interface
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing is sent to anyone else
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # we try again, at our own pace
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


@dataclass(frozen=True)
class _MlflowRun:
    """`<run>/mlflow.json`: which MLflow run, at which server, is this run's."""

    uri: str
    run_id: str


_STORED = TypeAdapter(_MlflowRun)


class MlflowTracker:
    """See `Tracker`. `uri`: of the server."""

    key = "mlflow"

    def __init__(self, config: Config, uri: str) -> None:
        self._config, self._run, self.place = config, run_store(config), uri
        self._client: Any = None
        self._run_id = ""

    def open(self) -> int:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self._client = MlflowClient(tracking_uri=self.place)
        self._run_id = ""
        with contextlib.suppress(NotFound):
            stored = _STORED.validate_json(self._run.get(KEY))
            if stored.uri == self.place:
                self._run_id = stored.run_id
        if self._run_id:
            try:
                self._client.update_run(self._run_id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._run_id = ""
        self._run_id = self._run_id or self._make()
        history = self._client.get_metric_history(self._run_id, "train/loss")
        return max((point.step for point in history), default=0)

    def send(self, records: Sequence[TrainingRecord]) -> None:
        self._client.log_batch(self._run_id, metrics=[point for record in records for point in _points(record)])

    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self._run_id, ending)

    def _make(self) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "scoreray")
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                experiment_id = self._client.create_experiment(name)
            except MlflowException:  # somebody else made it just now
                experiment_id = self._client.get_experiment_by_name(name).experiment_id
        else:
            experiment_id = experiment.experiment_id
        tags = {"scoreray.run": self._run.url()}
        run = self._client.create_run(experiment_id, run_name=self._config.run.name, tags=tags)
        run_id = str(run.info.run_id)
        self._run.put(KEY, json.dumps(asdict(_MlflowRun(self.place, run_id))).encode())
        values = [Param(key, str(value)[:PARAM_CHARACTERS]) for key, value in leaves(self._config.model_dump())]
        for start in range(0, len(values), PARAMS_AT_ONCE):
            self._client.log_batch(run_id, params=values[start : start + PARAMS_AT_ONCE])
        return run_id


def _points(record: TrainingRecord) -> list[Any]:
    """A record as MLflow's values, whose names may hold no < and >; steps are images seen."""
    from mlflow.entities import Metric

    scalars = ((name.replace("<", "below ").replace(">", "above "), value) for name, value in record.scalars())
    time_ms = int(record.time * 1000)
    return [Metric(name, float(value), timestamp=time_ms, step=record.images) for name, value in scalars]
