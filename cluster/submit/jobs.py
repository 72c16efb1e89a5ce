"""A verb and its words as a job: what is checked here, before anything is sent, and what travels.

A job is named after its run; its code is this checkout's, its configs are files that travel with it. Credentials do
not: whoever may see the dashboard sees a job's environment, so it names the cluster's variables, not values.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scoreray.cluster.submit.credentials import NAMES, refuse_text, refuse_wheel, refuse_words, shape_of
from scoreray.cluster.wheel import build_wheel
from scoreray.data.errors import StorageError, UserError, nearest
from scoreray.data.presets import preset
from scoreray.data.scratch import scratch_folder
from scoreray.data.yaml_text import dump_yaml, parse_yaml

VERBS = ("train", "tune", "sample", "evaluate", "export", "compare", "doctor", "data")
SAVE_WITHIN_S = 120  # after `stop`, before Ray kills the driver
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}")

Parse = Callable[[list[str]], dict[str, Any]]
"""Words of a verb -> its options and arguments, as the command line reads them (`cluster/cli/words.py`)."""


@dataclass(frozen=True)
class Job:
    """What is sent: a shell line, where it runs (Ray's runtime_env), and what its metadata says.

    `scoreray_run` in the metadata is the run's name, `scoreray_writes` where it is written, if it is.
    """

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    name: str


@contextlib.contextmanager
def prepared(words: list[str], env: list[str], from_env: list[str], name: str | None, parse: Parse) -> Iterator[Job]:
    """The job of a verb and its words; its files last as long as the context. Raises UserError."""
    if not words or words[0] not in VERBS:
        given = words[0] if words else ""
        raise UserError(f"submit {given}: not a verb that runs as a job; {nearest(given, VERBS)}")
    if name is not None and not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: a job's name has letters, digits, '.', '_' and '-' only, 150 at most")
    variables, references = _variables(env), _references(from_env)
    refuse_words([*words, name or ""])
    config, run, writes = _examined(words, parse)
    with scratch_folder() as folder:
        place = folder / "files"
        place.mkdir()
        line = "python -m scoreray.cluster.cli " + shlex.join(_with_files(words, config, place))
        if references:
            line = "; ".join([*map(_reference, references), f"exec {line}"])
        wheel = build_wheel(folder)
        refuse_wheel(wheel)
        runtime_env = {"py_modules": [str(wheel)], "working_dir": str(place), "env_vars": variables}
        metadata = {"scoreray_verb": words[0], "scoreray_run": run, "scoreray_writes": writes}
        yield Job(line, runtime_env, metadata, name or "-".join(filter(None, ("scoreray", words[0], run))))


def _variables(pairs: list[str]) -> dict[str, str]:
    found = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_JOB_STOP_WAIT_TIME_S": f"{SAVE_WITHIN_S}"}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not VARIABLE.fullmatch(name):
            raise UserError(f"--env {name}: write NAME=VALUE")
        if NAMES.search(name) or shape_of(value):
            raise UserError(f"--env {name}: a credential's value would be shown with the job; write "
                            f"--from-env {name}=VARIABLE, a variable that the cluster's nodes have")  # fmt: skip
        found[name] = value
    return found


def _references(pairs: list[str]) -> list[tuple[str, str]]:
    found = []
    for pair in pairs:
        mine, _, theirs = pair.partition("=")
        theirs = theirs or mine
        if not VARIABLE.fullmatch(mine) or not VARIABLE.fullmatch(theirs) or shape_of(theirs):
            raise UserError(f"--from-env {mine.partition('=')[0]}: write NAME=VARIABLE, both names of variables")
        found.append((mine, theirs))
    return found


def _reference(names: tuple[str, str]) -> str:
    """Shell that sets the first variable to what the second is on the node, or says there that it has none."""
    mine, theirs = names
    told = f"scoreray: --from-env {mine}={theirs}: the node that runs the job has no variable {theirs}"
    return f'[ -n "${{{theirs}+set}}" ] || {{ echo "{told}" >&2; exit 2; }}; export {mine}="${theirs}"'


def _examined(words: list[str], parse: Parse) -> tuple[Path | None, str, str]:
    """The config among the words, its run's name, and where the verb writes that run; empty where there is none.

    Mistakes in the words, a training config or a sweep are told here. Raises UserError.
    """
    options = parse(words)
    if words[0] not in ("train", "tune", "doctor") or options.get("config") is None:
        return None, "", ""
    config, overrides = Path(options["config"]), list(options.get("overrides") or ())
    try:
        if words[0] == "tune":
            from scoreray.tune.load import load_sweep

            study = load_sweep(config, overrides).sweep.study
            name, storage = study.name, study.storage
        else:
            from scoreray.trainer.config import load_config

            run = load_config(config, overrides).run
            name, storage = run.name, run.storage
    except StorageError:  # a config in S3 that can be read from the cluster only
        return config, "", ""
    looks = words[0] == "doctor" or options.get("check") or options.get("print_config")
    return config, name, "" if looks else f"{storage.rstrip('/')}/{name}"


def _with_files(words: list[str], config: Path | None, place: Path) -> list[str]:
    """The words with local YAML files copied to `place` and named as there. Raises UserError."""
    sent = []
    for word in words:
        path = preset(Path(word))
        is_yaml = path.suffix in (".yaml", ".yml") and not word.startswith("-") and "=" not in word
        if "://" in word or not (path.is_file() if path == config else is_yaml):
            sent.append(word)
            continue
        text, page = _read(path)
        base = page.get("base")
        if isinstance(base, str) and (path.parent / base).is_file():  # of a sweep
            below, _ = _read(path.parent / base)
            named = _stored(place, f"base-{Path(base).name}", below)
            text = dump_yaml(page | {"base": named})
        sent.append(_stored(place, path.name, text))
    return sent


def _stored(place: Path, name: str, text: str) -> str:
    """The name of a new file with this text; another file's of the same name is left alone."""
    path, number = place / name, 1
    while path.exists() and path.read_text(encoding="utf-8") != text:
        number += 1
        path = place / f"{Path(name).stem}-{number}{Path(name).suffix}"
    path.write_text(text, encoding="utf-8")
    return path.name


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """A file that travels, and what it says as YAML (nothing if it is none: the verb tells that)."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file here, and jobs get their configs from here") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    page = None
    with contextlib.suppress(UserError):
        page = parse_yaml(text, str(path))
    refuse_text(str(path), text, page)
    return text, page if isinstance(page, dict) else {}
