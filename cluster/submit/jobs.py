"""A verb and its arguments as a Ray job: they are checked on this machine, before anything is sent.

A job is named after its run. Its code (as a wheel) and its configs are sent with it; credentials are not: everybody who
can open the dashboard can read a job's environment, so that names variables of the nodes instead of values.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scoreray.cluster.submit.credentials import (
    NAMES,
    refuse_arguments,
    refuse_folder,
    refuse_text,
    refuse_wheel,
    shape_of,
)
from scoreray.cluster.wheel import build_wheel
from scoreray.data import own_code
from scoreray.data.errors import StorageError, UserError, nearest
from scoreray.data.presets import preset
from scoreray.data.scratch import scratch_folder
from scoreray.data.yaml_text import dump_yaml, parse_yaml

PREFIX = "scoreray_"  # of our keys in a job's metadata
VERBS = ("train", "tune", "sample", "evaluate", "export", "encode", "compare", "doctor", "data")
SAVE_WITHIN_S = 120  # after `stop`, before Ray kills the driver
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}")

Parse = Callable[[list[str]], dict[str, Any]]
"""Arguments of a verb -> its parameters by name, as the command line reads them (`cluster/cli/options.py`)."""


@dataclass(frozen=True)
class JobMetadata:
    """What a job's metadata say of it: its verb, its run's name, and the URL of the run that it writes; "" for none."""

    verb: str
    run: str = ""
    writes: str = ""

    def to_ray(self) -> dict[str, str]:
        return {f"{PREFIX}{name}": value for name, value in asdict(self).items()}

    @classmethod
    def from_ray(cls, metadata: Mapping[str, str] | None) -> JobMetadata:
        """Of any job; "" where another program submitted it."""
        return cls(*((metadata or {}).get(f"{PREFIX}{one.name}", "") for one in fields(cls)))


@dataclass(frozen=True)
class Submission:
    """What is sent: a shell line, Ray's runtime_env for it, and what the job's metadata say."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: JobMetadata
    name: str


@contextlib.contextmanager
def prepared(
    arguments: list[str], env: list[str], from_env: list[str], name: str | None, parse: Parse
) -> Iterator[Submission]:
    """The job of `arguments`, a verb first; its files last as long as the context. Raises UserError."""
    if not arguments or arguments[0] not in VERBS:
        given = arguments[0] if arguments else ""
        raise UserError(f"submit {given}: not a verb that runs as a job; {nearest(given, VERBS)}")
    if name is not None and not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: a job's name has letters, digits, '.', '_' and '-' only, 150 at most")
    variables, references = _variables(env), _references(from_env)
    refuse_arguments([*arguments, name or ""])
    config, run, writes = _examined(arguments, parse)
    with scratch_folder() as folder:
        place = folder / "files"
        place.mkdir()
        line = "python -m scoreray.cluster.cli " + shlex.join(_with_files(_without_with(arguments), config, place))
        if references:
            line = "; ".join([*map(_reference, references), f"exec {line}"])
        wheel = build_wheel(folder)
        refuse_wheel(wheel)
        modules = [str(wheel), *own_code.py_modules()]
        for module in modules[1:]:
            refuse_folder(Path(module))
        variables = {**own_code.environment(on_cluster=True), **variables}
        runtime_env = {"py_modules": modules, "working_dir": str(place), "env_vars": variables}
        verb = arguments[0]
        default_name = "-".join(filter(None, ("scoreray", verb, run)))
        yield Submission(line, runtime_env, JobMetadata(verb, run, writes), name or default_name)


def _without_with(arguments: list[str]) -> list[str]:
    """Without --with, whose packages the job gets by `py_modules` and a variable."""
    kept, words = list[str](), iter(arguments)
    for word in words:
        if word == "--with":
            next(words, None)
        elif not word.startswith("--with="):
            kept.append(word)
    return kept


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
    """Shell that sets the first variable to the node's value of the second, or ends with a line where it has none."""
    mine, theirs = names
    error = f"scoreray: --from-env {mine}={theirs}: the node that runs the job has no variable {theirs}"
    return f'[ -n "${{{theirs}+set}}" ] || {{ echo "{error}" >&2; exit 2; }}; export {mine}="${theirs}"'


def _examined(arguments: list[str], parse: Parse) -> tuple[Path | None, str, str]:
    """The config among the arguments, its run's name, and where the verb writes that run; empty where there is none.

    Raises UserError for mistakes in the arguments, in a training config and in a sweep.
    """
    options = parse(arguments)
    _refuse_relative(options)
    if arguments[0] not in ("train", "tune", "doctor") or options.get("config") is None:
        return None, "", ""
    config, overrides = Path(options["config"]), list(options.get("overrides") or ())
    try:
        if arguments[0] == "tune":
            from scoreray.tune.load import load_sweep

            study = load_sweep(config, overrides).sweep.study
            name, storage = study.name, study.storage
        else:
            from scoreray.trainer.config import load_config

            run = load_config(config, overrides).run
            name, storage = run.name, run.storage
    except StorageError:  # a config in S3 that can be read from the cluster only
        return config, "", ""
    only_looks = arguments[0] == "doctor" or options.get("check") or options.get("print_config")
    return config, name, "" if only_looks else f"{storage.rstrip('/')}/{name}"


def _refuse_relative(options: Mapping[str, Any]) -> None:
    """A job's own folder is a temporary one on the head: what is written there is lost, what this machine has is not
    there. Raises UserError."""
    encoders = [word.partition("=") for word in options.get("encoder") or ()]
    paths = [options.get("url"), options.get("out"), *(path for kind, _, path in encoders if not own_code.is_own(kind))]
    for path in filter(None, map(str, filter(None, paths))):
        if "://" not in path and not path.startswith(("/", "~")):
            raise UserError(
                f"submit {path}: is relative to the job's own folder, which is removed after it; give a URL, or a path "
                "from the root that all of the cluster's machines see"
            )


def _with_files(arguments: list[str], config: Path | None, place: Path) -> list[str]:
    """The arguments with local YAML files copied to `place`, by the names of the copies. Raises UserError."""
    sent = []
    for word in arguments:
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
    """The text of a file that is sent, and its YAML ({} where it is none: the verb itself reports that)."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file on this machine, from which jobs get their configs") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    page = None
    with contextlib.suppress(UserError):
        page = parse_yaml(text, str(path))
    refuse_text(str(path), text, page)
    return text, page if isinstance(page, dict) else {}
