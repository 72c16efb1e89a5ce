"""Code of somebody else's: parts that are named `package.module:Name`, which of it may be imported, and how it travels.

Importing a module runs it, so a name alone is never enough: its package must have been brought to this process by
  `--with PATH|PACKAGE` of the command (`bring`),
  a name in the command's own arguments, config file or overrides (`name_in_command`),
  the variable SCORERAY_WITH, by which both reach child processes and workers, or
  an installed package's entry point of the group `scoreray`.
A name that stands in a checkpoint, a run, an exported model or a data set brings nothing: `require` refuses it in one
line. Parts with keys of their own, sections of a config, are in `part.py`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scoreray.data.errors import ScorerayError, UserError, nearest, shortened

VARIABLE = "SCORERAY_WITH"
GROUP = "scoreray"  # of entry points
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
OURS = "scoreray"
PARTS_OF_OURS = ("scoreray.data.shapes:MatchesCaption",)  # no other name in our package is a part: `bring` is in it too
COLLECTIVES = ("torch.distributed", "deepspeed")
DEVICE_ERRORS = ("OutOfMemoryError", "AcceleratorError")  # torch's, compared as text: nothing here needs torch
SHOWN_PATHS = 6  # of sys.path, in a message

_paths: dict[str, str] = {}  # package -> where it is, of those brought by a path
_names: dict[str, None] = {}  # packages brought by name alone, in their order


def is_own(kind: Any) -> bool:
    """Whether a kind names a part as `package.module:Name`."""
    return isinstance(kind, str) and NAME.fullmatch(kind) is not None


def or_own(kind: str) -> str:
    """The end of a message about an unknown kind that has some mark of a part of somebody else's, and not its form."""
    return "; a part of yours is written package.module:Name" if re.search(r"[.:/]", kind) else ""


def bring(entries: Sequence[str]) -> None:
    """Lets packages be imported: each a package's folder, a .py file, or the name of an installed package.

    Raises UserError for what is none of these, or would hide another module.
    """
    for entry in entries:
        if not entry.strip():
            raise UserError(
                f"--with {entry.strip()}: is empty; give a package's folder, a .py file or an installed package's name"
            )
        if _is_path(entry):
            _bring_path(entry)
        elif entry == OURS:
            raise UserError(f"--with {entry}: scoreray's own parts are named by their kinds; bring code of yours")
        elif entry.isidentifier() and _found(entry) is not None:
            _names[entry] = None
        else:
            raise UserError(
                f"--with {shortened(entry)}: no such package folder or .py file, and no package of this name is "
                f"installed on {_here()}"
            )


def name_in_command(value: Any) -> Any:
    """Lets the packages be imported that `value` names: an argument of the caller's command, or all values of its
    config. Returns `value`."""
    _names.update(dict.fromkeys(package for kind in _kinds(value) if (package := _package(kind)) != OURS))
    return value


def brought() -> tuple[str, ...]:
    """What may be imported, as `bring` takes it: paths, then names. Without entry points, which every process reads."""
    _read_variable(os.environ.get(VARIABLE, ""))
    return (*_paths.values(), *(name for name in _names if name not in _paths))


def with_words() -> list[str]:
    """What a later command needs to have the same: `--with` and each of `brought`."""
    return [word for entry in brought() for word in ("--with", entry)]


def environment(*, on_cluster: bool | None = None) -> dict[str, str]:
    """Variables by which a process that this one starts has the same packages; none where none were brought.

    On a cluster, that of RAY_ADDRESS if it is not said, whose machines get folders and files by `py_modules`, names
    alone.
    """
    entries = brought()
    if "RAY_ADDRESS" in os.environ if on_cluster is None else on_cluster:
        entries = tuple(Path(entry).stem if _is_path(entry) else entry for entry in entries)
    return {VARIABLE: os.pathsep.join(entries)} if entries else {}


def py_modules() -> list[str]:
    """The folders and files that Ray copies to the workers of a cluster (`runtime_env`)."""
    return [entry for entry in brought() if _is_path(entry)]


def require(value: Any, where: str) -> None:
    """Raises UserError, which begins with `where`, if a stored config names a part that was not brought."""
    for kind in _kinds(value):
        if not _may_import(kind):
            raise UserError(f"{where}: {_not_brought(kind)}")


def load(kind: str, what: str) -> Any:
    """What `package.module:Name` names. Raises UserError, which begins with `what`: --scorer, "kind", ...

    The error of a module that can't be imported names the machine and the process's own entries of sys.path: on a
    worker these are not the command's.
    """
    if not is_own(kind):
        raise UserError(f"{what} '{shortened(str(kind))}': write package.module:Name")
    if not _may_import(kind):
        raise UserError(f"{what} {_not_brought(kind)}")
    module, _, attribute = kind.partition(":")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the module is somebody else's: whatever it raises is its mistake
        raise UserError(
            f"{what} '{kind}': can't be imported on {_here()}: {line_of(error)}; {_where_looked()}"
        ) from None
    if not hasattr(found, attribute):
        public = [name for name, one in vars(found).items() if getattr(one, "__module__", "") == module]
        raise UserError(f"{what} '{kind}': {module} has no '{attribute}'; {nearest(attribute, public)}")
    part = getattr(found, attribute)
    home = getattr(part, "__module__", None)
    if isinstance(home, str) and _package(home) != _package(kind):
        # A stored file that names a brought package must not reach what that imports, such as subprocess's Popen.
        raise UserError(f"{what} '{kind}': {attribute} is {home}'s, not defined in {_package(kind)}")
    return part


def instance(kind: str, what: str) -> Any:
    """What is named, or where that is a class, `Name()`. Raises UserError as `load` does."""
    found = load(kind, what)
    if not isinstance(found, type):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} '{kind}': {kind.partition(':')[2]}() failed: {line_of(error)}") from None


@functools.cache
def code_hash(kind: str) -> str:
    """SHA-256 of the package's Python sources (or the file's) that `kind` is in, by their names, sorted."""
    spec = _found(_package(kind))
    if spec is None:
        raise UserError(f"'{kind}': no package {_package(kind)} is on {_here()}")
    files: dict[str, Path] = {}
    if spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            files |= {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*.py")}
    elif spec.origin and Path(spec.origin).is_file():
        files = {Path(spec.origin).name: Path(spec.origin)}
    about = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        about.update(f"{name} {len(content)}\n".encode() + content)
    return about.hexdigest()


def own_kinds(config: Any) -> list[str]:
    """Every part of somebody else's that a config (`model_dump`) names."""
    return sorted(set(_kinds(config)))


def code_hashes(config: Any) -> dict[str, str]:
    """The hash of each of them, to be stored with what was made."""
    return {kind: code_hash(kind) for kind in own_kinds(config)}


def check_stored(config: Any, recorded: Mapping[str, str], where: str) -> None:
    """Before a config that is stored at `where` is read: raises UserError if it names a part that was not brought, and
    logs a warning for each package whose code is not what it was when its hash was recorded."""
    require(config, where)
    for kind, sha256 in {_package(kind): (kind, sha256) for kind, sha256 in recorded.items()}.values():
        if code_hash(kind) != sha256:
            _warn(
                f"{where}: the code of '{kind}' has changed since it was stored (SHA-256 {code_hash(kind)[:12]}, not "
                f"{sha256[:12]}): results may differ"
            )


@functools.cache
def _warn(line: str) -> None:
    """Once a process, as a model is looked up more than once."""
    logging.getLogger("scoreray").warning(line)


def line_of(error: BaseException) -> str:
    """An exception in one line, for a message; with the line of somebody else's code that raised it, if one did."""
    frame = _own_frame(error)
    place = f" ({frame.file}:{frame.line})" if frame else ""
    return f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 300)}{place}"


def own_mistake(error: BaseException, config: Any) -> UserError | None:
    """One line of an error that a part of somebody else's in the config (`model_dump`) raised, and always would; its
    traceback is logged. None where something else raised it, or it is a machine's: memory, files, devices, peers."""
    frame = _own_frame(error)
    of_machine = isinstance(error, OSError | MemoryError) or type(error).__name__ in DEVICE_ERRORS
    if frame is None or of_machine or isinstance(error, ScorerayError):
        return None
    kinds = [kind for kind in _kinds(config) if _package(kind) == _package(frame.module)]
    called = [kind for kind in kinds if kind.partition(":")[0] in frame.callers]
    line = f"kind '{next(iter(called or kinds), frame.module)}' failed: {line_of(error)}"
    logging.getLogger("scoreray").error(line, exc_info=error)
    return UserError(line)


@dataclass(frozen=True)
class _OwnFrame:
    """Where code of somebody else's raised an error. callers: the modules on the way there."""

    module: str
    file: str
    line: int
    callers: frozenset[str]


def _own_frame(error: BaseException) -> _OwnFrame | None:
    """The innermost frame that is no library's, if it is somebody else's; libraries raise what their callers did wrong.
    Collectives are the exception: what they raise is another rank's end."""
    frames = [(one.f_globals.get("__name__", ""), one.f_code.co_filename, line)
              for one, line in traceback.walk_tb(error.__traceback__)]  # fmt: skip
    for module, path, line in reversed(frames):
        package = _package(module)
        if package == OURS or module.startswith(COLLECTIVES):
            return None
        if _is_brought(package):
            depth = 1 + module.count(".") + (Path(path).name == "__init__.py")
            callers = frozenset(one for one, _, _ in frames)
            return _OwnFrame(module, "/".join(Path(path).parts[-depth:]), line, callers)
    return None


class _PathsFinder(MetaPathFinder):
    """Finds packages that were brought by a path, and nothing else that is beside them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(Path(_paths[name]).parent)]) if name in _paths else None


def _bring_path(entry: str) -> None:
    path = Path(os.path.abspath(entry))
    if path.name == "__init__.py":
        path = path.parent
    name, folder = path.stem if path.suffix == ".py" else path.name, path.is_dir()
    if not path.exists():
        raise UserError(f"--with {shortened(entry)}: there is no such folder or file")
    if not (folder and (path / "__init__.py").is_file()) and path.suffix != ".py":
        inside = sorted(one.parent.name for one in path.glob("*/__init__.py")) if folder else []
        more = f"; it holds {', '.join(inside[:5])}: --with {Path(entry) / inside[0]}" if inside else ""
        raise UserError(f"--with {entry}: neither a package (a folder with __init__.py) nor a .py file{more}")
    if not name.isidentifier():
        raise UserError(f"--with {entry}: '{name}' is no name of a module; rename it to letters, digits and _")
    if name == OURS or name in sys.stdlib_module_names:
        raise UserError(f"--with {entry}: would hide the module {name}; give it another name")
    if _paths.get(name, str(path)) != str(path):
        raise UserError(f"--with {entry}: {name} is brought already, from {_paths[name]}")
    spec = getattr(sys.modules[name], "__spec__", None) if name in sys.modules else _found(name)
    if (
        spec is not None
        and spec.origin
        and Path(spec.origin).resolve() not in (path.resolve(), (path / "__init__.py").resolve())
    ):
        raise UserError(f"--with {entry}: would hide another {name}, of {spec.origin}; give it another name")
    if not any(isinstance(one, _PathsFinder) for one in sys.meta_path):
        sys.meta_path.insert(0, _PathsFinder())
    _paths[name] = str(path)


@functools.lru_cache(maxsize=1)
def _read_variable(text: str) -> None:
    """Its names need not be there: whether they can be imported is found when they are."""
    for entry in filter(None, text.split(os.pathsep)):
        if entry == OURS:
            continue
        if _is_path(entry):
            _bring_path(entry)
        else:
            _names[entry] = None


@functools.cache
def _of_entry_points() -> frozenset[str]:
    """Packages that registered themselves, by being installed."""
    return frozenset(_package(one.value) for one in entry_points(group=GROUP))


def _may_import(kind: str) -> bool:
    brought()  # reads the variable
    package = _package(kind)
    return kind in PARTS_OF_OURS if package == OURS else _is_brought(package)


def _is_brought(package: str) -> bool:
    return package in _paths or package in _names or package in _of_entry_points()


def _not_brought(kind: str) -> str:
    package = _package(kind)
    if package == OURS:
        return f"'{kind}' is no part; accepted of scoreray's own: {', '.join(PARTS_OF_OURS)}"
    return (
        f"'{kind}' is code of somebody else's, which is imported only where the command brings it: --with {package} "
        f"(installed), --with PATH (its folder or file) or {VARIABLE}"
    )


def _kinds(value: Any) -> Iterator[str]:
    """Every name of a part in a value, or in the mappings and lists that it is made of."""
    if is_own(value):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():  # a sweep's callbacks are keys
            yield from _kinds(key)
            yield from _kinds(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _kinds(one)


def _package(kind: str) -> str:
    return kind.partition(":")[0].partition(".")[0]


def _is_path(entry: str) -> bool:
    return "/" in entry or entry.endswith(".py") or (_found(entry) is None and Path(entry).exists())


def _found(package: str) -> ModuleSpec | None:
    try:
        return find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):  # of a module whose spec is None
        return None


def _here() -> str:
    worker = f", Ray worker {os.getpid()}" if "ray" in sys.modules and "RAY_JOB_ID" in os.environ else ""
    return f"{socket.gethostname()}{worker}"


def _where_looked() -> str:
    """The entries of sys.path that are not Python's own, by which a module on a worker is found or not."""
    python = (sys.prefix, sys.base_prefix)
    own = [place for place in sys.path if not place.startswith(python) and Path(place or ".").is_dir()]
    shown = [*_paths.values(), *own][:SHOWN_PATHS]
    return f"looked in {', '.join(shown) or 'installed packages only'}; bring it by --with PATH, or install it there"
