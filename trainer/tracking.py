"""A run's committed records in MLflow, sent from beside the run: a server that does not answer holds nothing up.

    log: {mlflow: "https://mlflow.example"}        a run of experiment MLFLOW_EXPERIMENT_NAME ("scoreray")

Only what was committed is sent, so a killed run plots nothing twice. Which MLflow run is ours is stored in
`<run>/mlflow.json`; the server knows how far it has come. Credentials come from the environment, as for MLflow.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from scoreray.data.errors import UserError
from scoreray.data.extras import install
from scoreray.data.storage.store import NotFound
from scoreray.trainer.config import Config, leaves
from scoreray.trainer.monitoring.metrics import TrainingRecord
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store

KEY = "mlflow.json"
POLL_S, MOST_PAUSE_S = 5.0, 60.0
LAST_S, STOPPED_S = 15.0, 5.0  # for what is left when the run has ended, or was stopped
RECORDS_AT_ONCE, PARAMS_AT_ONCE, PARAM_CHARACTERS = 40, 100, 500  # limits of MLflow's interface: 1,000 values, 100
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


def check_mlflow(config: Config) -> None:
    """Raises UserError where `log.mlflow` is set and its package is missing."""
    if config.log.mlflow is not None and importlib.util.find_spec("mlflow") is None:
        raise UserError(f"log.mlflow: its package is not installed: {install('mlflow')}, or log.mlflow=null")


@contextlib.contextmanager
def tracked(config: Config, note: Callable[[str], None]) -> Iterator[None]:
    """Sends the run's records while the block trains it, and what is left at its end (for at most `LAST_S`).

    The first failure is passed to `note`, and sending is tried again; the same command sends what is left at the end.
    """
    if config.log.mlflow is None:
        yield
        return
    tracker = _Tracker(config, note)
    thread = threading.Thread(target=tracker.follow, name="mlflow", daemon=True)
    thread.start()
    status, patience_s = "FAILED", LAST_S
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status, patience_s = "KILLED", STOPPED_S
        raise
    finally:
        tracker.end(status)
        thread.join(patience_s)


class _Tracker:
    """The thread beside the run. MLflow is imported in it, at the first committed record: that takes seconds."""

    def __init__(self, config: Config, note: Callable[[str], None]) -> None:
        self._config, self._note = config, note
        self._run = run_store(config)
        self._uri = str(config.log.mlflow)
        self._client: Any = None
        self._run_id = ""
        self._sent = 0
        self._status = ""
        self._ended, self._warned = threading.Event(), False

    def end(self, status: str) -> None:
        """No more records will come; `status`: what MLflow calls it."""
        self._status = status
        self._ended.set()

    def follow(self) -> None:
        pause_s = POLL_S
        while True:
            last = self._ended.wait(pause_s)
            try:
                self._send()
                if last and self._client is not None:
                    self._client.set_terminated(self._run_id, self._status)
                pause_s = POLL_S
            except Exception as error:
                pause_s = min(2 * pause_s, MOST_PAUSE_S)
                self._warn(error)
            if last:
                return

    def _send(self) -> None:
        records = read_metrics(self._run, after=self._sent)
        if not records:
            return
        if self._client is None:
            self._open()
            records = [record for record in records if record.images > self._sent]
        for start in range(0, len(records), RECORDS_AT_ONCE):
            some = records[start : start + RECORDS_AT_ONCE]
            self._client.log_batch(self._run_id, metrics=[point for record in some for point in _points(record)])
            self._sent = some[-1].images

    def _open(self) -> None:
        """Finds our MLflow run, or makes it, and finds how far it has come."""
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        client = MlflowClient(tracking_uri=self._uri)
        with contextlib.suppress(NotFound):
            stored = _STORED.validate_json(self._run.get(KEY))
            if stored.uri == self._uri:
                self._run_id = stored.run_id
        if self._run_id:
            try:
                client.update_run(self._run_id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._run_id = ""
        if not self._run_id:
            self._run_id = self._make(client)
        history = client.get_metric_history(self._run_id, "train/loss")
        self._sent = max((point.step for point in history), default=0)
        self._client = client

    def _make(self, client: Any) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "scoreray")
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                experiment_id = client.create_experiment(name)
            except MlflowException:  # somebody else made it just now
                experiment_id = client.get_experiment_by_name(name).experiment_id
        else:
            experiment_id = experiment.experiment_id
        tags = {"scoreray.run": self._run.url()}
        run_id = str(client.create_run(experiment_id, run_name=self._config.run.name, tags=tags).info.run_id)
        self._run.put(KEY, json.dumps(asdict(_MlflowRun(self._uri, run_id))).encode())
        values = [Param(key, str(value)[:PARAM_CHARACTERS]) for key, value in leaves(self._config.model_dump())]
        for start in range(0, len(values), PARAMS_AT_ONCE):
            client.log_batch(run_id, params=values[start : start + PARAMS_AT_ONCE])
        return run_id

    def _warn(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        self._note(
            f"log.mlflow: {self._uri}: {reason}; training goes on, and what is missing there is sent when it "
            "answers, or by the same command later"
        )


def _points(record: TrainingRecord) -> list[Any]:
    """A record as MLflow's values, whose names may hold no < and >; steps are images seen."""
    from mlflow.entities import Metric

    scalars = ((name.replace("<", "below ").replace(">", "above "), value) for name, value in record.scalars())
    time_ms = int(record.time * 1000)
    return [Metric(name, float(value), timestamp=time_ms, step=record.images) for name, value in scalars]
