"""The actor beside a run that evaluates its checkpoints: started and ended with the run, never in its way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from scoreray.data import own_code
from scoreray.data.fields.description import DataDescription
from scoreray.trainer.config import Config, load_config

POLL_S = 0.5
RESTARTS = 4
CALL_S = 30.0  # for an answer of an actor that only hands out lines


class CheckpointEvaluator:
    """Follows a run's commits, on one thread and at the lowest priority."""

    def __init__(self, config: dict[str, Any]) -> None:
        from scoreray.sampling.evaluation.follow import give_way

        give_way()
        self._config = load_config(config)
        self._ending = False
        self._lines: list[str] = []

    def follow(self) -> int:
        from scoreray.sampling.evaluation.follow import follow

        return follow(self._config, lambda: self._ending, lambda line: self._lines.append(line))

    def end(self) -> None:
        """Only the last checkpoint still counts."""
        self._ending = True

    def read(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


def wants_evaluation(config: Config) -> bool:
    """Whether anything is to be measured or drawn beside the run."""
    return bool(config.evaluation.metrics) or config.evaluation.sheet > 0


def check_beside(config: Config, data: DataDescription) -> None:
    """`follow.check_evaluation`, where the config says anything of it: its imports take a second that others save."""
    if wants_evaluation(config) or config.evaluation.reference is not None:
        from scoreray.sampling.evaluation.follow import check_evaluation

        check_evaluation(config, data)


@contextlib.contextmanager
def beside(config: Config, note: Callable[[str], None]) -> Iterator[None]:
    """Evaluates the run's checkpoints while the block trains it, as `config.evaluation` says; at the end waits for the
    last one. What fails in it is reported by `note` and fails nothing else.
    """
    if not wants_evaluation(config):
        yield
        return
    started = _start(config, note)
    try:
        yield
    except BaseException:
        _end(started, note, wait=False)
        raise
    _end(started, note, wait=True)


def _start(config: Config, note: Callable[[str], None]) -> tuple[Any, Any, threading.Event] | None:
    import ray

    try:
        actor = ray.remote(
            num_cpus=0,  # it takes only what training leaves, so it must not wait for a slot of its own
            max_concurrency=3,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **own_code.environment()}},
        )(CheckpointEvaluator).remote(config.model_dump(mode="json"))
        following, done = actor.follow.remote(), threading.Event()
        threading.Thread(target=_pass_on, args=(actor, note, done), daemon=True).start()
    except Exception as error:
        note(f"evaluation beside the run could not start: {_line(error)}")
        return None
    return actor, following, done


def _end(started: tuple[Any, Any, threading.Event] | None, note: Callable[[str], None], *, wait: bool) -> None:
    import ray

    if started is None:
        return
    actor, following, done = started
    try:
        if wait:
            ray.get(actor.end.remote(), timeout=CALL_S)
            if not ray.wait([following], timeout=2 * POLL_S)[0]:
                note("evaluating the last checkpoint (Ctrl-C leaves it; scoreray evaluate does it later)")
            ray.get(following)
            for line in ray.get(actor.read.remote(), timeout=CALL_S):
                note(line)
    except Exception as error:
        note(f"evaluation beside the run ended early: {_line(error)}")
    finally:
        done.set()
        with contextlib.suppress(Exception):
            ray.kill(actor)


def _pass_on(actor: Any, note: Callable[[str], None], done: threading.Event) -> None:
    import ray

    while not done.wait(POLL_S):
        try:
            lines = ray.get(actor.read.remote(), timeout=CALL_S)
        except Exception:  # it is started again, or is too busy to say
            continue
        for line in lines:
            note(line)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
