"""Checkpoints: safetensors of fragments, hashed, committed by a marker that is written last.

    <run>/checkpoints/000000012800-3f9a1c02/      images seen, and the attempt that wrote it
        rank-00000.safetensors                    this rank's fragments: "<state>/<parameter>@<start>" -> [length] fp32
        rank-00000-001.safetensors                more of them, where one file would be large
        rank-00000.json                           their table, the files' sizes and SHA-256; says this rank is done
        COMMITTED.json                            the marker, written last: the files' hashes, and what was trained
    <run>/snapshots/000000012800-3f9a1c02/        the averages alone, in fp16, kept for good: what `posthoc.py` mixes

No file is a pickle. A file is read only after its SHA-256 was found to be the marker's. Any world size and ZeRO stage
can read what any other wrote (`fragments.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scoreray.data.errors import DataError, StorageError, Unanswered, UserError
from scoreray.data.store import NotFound, Store, open_store
from scoreray.trainer.fragments import MASTER, Fragment, StoredFragment, overlaps

FOLDER = "checkpoints"
SNAPSHOTS = "snapshots"
MARKER = "COMMITTED.json"
OWNER = "owner"  # holds the token of the newest start of the run; an older one that still lives may not commit
FORMAT = 1
BUFFERS = "buffers"
PART_BYTES = 512 << 20  # a share beyond this goes on in another file, so that readers of a range read little else


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder in the run's store and what its marker says."""

    store: Store
    folder: str
    marker: dict[str, Any]

    @property
    def images_seen(self) -> int:
        return int(self.marker["images_seen"])

    @property
    def num_steps(self) -> int:
        return int(self.marker["num_steps"])

    @property
    def url(self) -> str:
        return self.store.url(self.folder)

    def restore(self, fragments: Iterable[Fragment], module: torch.nn.Module) -> None:
        """Write the stored state into `fragments` (any partition of the same parameters) and the module's buffers.

        Raises DataError when a file is not what the marker says, or a parameter is missing or of another shape.
        """
        stored = self._stored()
        by_file: dict[str, list[tuple[Fragment, StoredFragment, int, int, int]]] = {}
        for fragment in fragments:
            try:
                copies = overlaps(fragment.start, fragment.length, stored.get(fragment.name, ()))
            except ValueError as error:
                raise DataError(f"{self.url}: parameter {fragment.name}: {error}") from None
            for piece, source, target, length in copies:
                by_file.setdefault(piece.file, []).append((fragment, piece, source, target, length))
        for file, wanted in by_file.items():
            with self._verified(file) as path, safe_open(path, "pt") as tensors:
                for fragment, piece, source, target, length in wanted:
                    for key, into in fragment.tensors.items():
                        values = self._tensor(tensors, f"{key}/{piece.key}")
                        into[target : target + length].copy_(values[source : source + length])
        self._restore_buffers(module)

    def full_state(self, key: str = MASTER) -> dict[str, torch.Tensor]:
        """Whole fp32 parameters by name: masters, or a tracked average ("ema_0.050"), and the module's buffers."""
        names = {MASTER, *self.marker["state_keys"]}
        if key not in names:
            raise UserError(f"{self.url} holds no '{key}'; it holds {', '.join(sorted(names))}")
        shapes = self.marker["shapes"]
        flat = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in shapes.items()}
        module = torch.nn.Module()
        self.restore((Fragment(name, 0, len(values), {key: values}) for name, values in flat.items()), module)
        state = {name: values.view(shapes[name]) for name, values in flat.items()}
        return state | self.buffers()

    def _stored(self) -> dict[str, list[StoredFragment]]:
        stored: dict[str, list[StoredFragment]] = {}
        for file, about in self.marker["files"].items():
            for name, start, length in about["fragments"]:
                stored.setdefault(name, []).append(StoredFragment(name, start, length, file))
        return stored

    def _tensor(self, tensors: Any, key: str) -> torch.Tensor:
        try:
            return tensors.get_tensor(key)
        except Exception:
            raise DataError(f"{self.url}: holds no '{key}'; was another EMA length or optimizer tracked?") from None

    def _verified(self, file: str) -> contextlib.AbstractContextManager[Path]:
        return verified_copy(self.store, f"{self.folder}/{file}", self.marker["files"][file])

    def buffers(self) -> dict[str, torch.Tensor]:
        """The module's buffers by name."""
        file = f"{BUFFERS}.safetensors"
        if file not in self.marker["files"]:
            return {}
        with self._verified(file) as path, safe_open(path, "pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118

    def _restore_buffers(self, module: torch.nn.Module) -> None:
        targets = dict(module.named_buffers())
        if not targets:
            return
        for name, value in self.buffers().items():
            targets[name].copy_(value)


@contextlib.contextmanager
def verified_copy(store: Store, key: str, about: dict[str, Any]) -> Iterator[Path]:
    """A local copy of an object whose size and SHA-256 are those of `about`, while it is used. Raises DataError."""
    size, digest, chunk = about["bytes"], hashlib.sha256(), 64 << 20
    with tempfile.TemporaryDirectory(prefix="scoreray-") as folder:
        path = Path(folder, "file.safetensors")
        with open(path, "wb") as local:
            for start in range(0, max(size, 1), chunk):
                try:
                    data = store.get(key, start, min(start + chunk, size))
                except NotFound:
                    raise DataError(f"{store.url(key)}: missing, though it was committed") from None
                digest.update(data)
                local.write(data)
        if path.stat().st_size != size or digest.hexdigest() != about["sha256"]:
            raise DataError(f"{store.url(key)}: its bytes are not those that were committed (SHA-256)")
        yield path


def committed(run: Store, place: str = FOLDER) -> list[str]:
    """Folders of a run's committed checkpoints (or `SNAPSHOTS`), oldest first."""
    end = "/" + MARKER
    return sorted(key.removesuffix(end) for key, _ in run.list(place + "/") if key.endswith(end))


def latest(run: Store) -> Checkpoint | None:
    """The newest committed checkpoint of a run, None when there is none."""
    folders = committed(run)
    return open_checkpoint(run, folders[-1]) if folders else None


def open_checkpoint(store: Store, folder: str) -> Checkpoint:
    """A committed checkpoint by its folder. Raises UserError when it is not there or was never committed."""
    try:
        data = store.get(f"{folder}/{MARKER}")
    except NotFound:
        raise UserError(f"{store.url(folder)}: no committed checkpoint (its {MARKER} is missing)") from None
    try:
        marker = json.loads(data)
        if marker["format"] != FORMAT:
            raise DataError(f"{store.url(folder)}: format {marker['format']}, this version reads {FORMAT}")
        _check_marker(marker)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store.url(folder)}/{MARKER}: not a marker: {error!r}") from None
    return Checkpoint(store, folder, marker)


def find(url: str) -> Checkpoint:
    """The checkpoint that a person means: a run (its newest committed one) or one checkpoint's own folder."""
    store = open_store(url.rstrip("/"))
    store.check_reachable()
    if store.exists(MARKER):
        parent, _, name = url.rstrip("/").rpartition("/")
        return open_checkpoint(open_store(parent), name)
    checkpoint = latest(store)
    if checkpoint is None:
        raise UserError(f"{url}: neither a run with a committed checkpoint nor a checkpoint")
    return checkpoint


def _check_marker(marker: dict[str, Any]) -> None:
    int(marker["images_seen"]), int(marker["num_steps"]), marker["config"], list(marker["state_keys"])
    for name, about in marker["files"].items():
        if "/" in name or len(about["sha256"]) != 64 or int(about["bytes"]) < 0:
            raise ValueError(f"bad entry for file {name!r}")
        for _, start, length in about["fragments"]:
            if int(start) < 0 or int(length) <= 0:
                raise ValueError(f"bad fragment in {name!r}")


class CheckpointWriter:
    """Saves a rank's share in the background; on rank 0, commits when every rank's share has arrived.

    Ranks meet through the store alone, so training goes on while files travel and no collective is involved.
    Making one on rank 0 takes the run over: a writer of an earlier start raises UserError instead of committing.
    `attempt`: a token shared by the ranks of this start of the worker group; names of two attempts never meet.
    """

    def __init__(self, run: Store, *, attempt: str, rank: int, world_size: int, keep: int, timeout_s: float = 1800):
        self._run, self._attempt, self._rank, self._world_size = run, attempt, rank, world_size
        self._keep, self._timeout_s = keep, timeout_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Any = None
        self._stop = threading.Event()
        self.last_commit: tuple[int, float] | None = None
        if rank == 0:
            run.put(OWNER, attempt.encode())

    def save(
        self,
        images_seen: int,
        num_steps: int,
        fragments: Sequence[Fragment],
        module: torch.nn.Module,
        about: dict[str, Any],
        before_commit: Callable[[], None] | None = None,
        snapshot: Sequence[str] = (),
    ) -> None:
        """Copy the state and return; writing goes on behind. Waits for the save before this one first.

        `about` (rank 0): what the marker says beside the files: config, shapes, state_keys. `before_commit` (rank 0)
        writes what must be there once the checkpoint is. `snapshot`: state keys that are also kept on their own, for
        good; they are committed before the checkpoint is. Errors of a save are raised by the next call or `wait`.
        """
        self.wait()
        tensors = {
            f"{key}/{fragment.name}@{fragment.start}": value.detach().to("cpu", copy=True).contiguous()
            for fragment in fragments
            for key, value in fragment.tensors.items()
        }
        table = [[fragment.name, fragment.start, fragment.length] for fragment in fragments]
        buffers = {}
        if self._rank == 0:
            buffers = {name: b.detach().to("cpu", copy=True).contiguous() for name, b in module.named_buffers()}
        about = {"format": FORMAT, "images_seen": images_seen, "num_steps": num_steps, **about}
        self._pending = self._pool.submit(self._write, tensors, table, buffers, about, before_commit, snapshot)

    def wait(self) -> None:
        """Until the last save is committed (rank 0) or its share is stored (others)."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Stop without waiting for a commit that may never come. `wait` first for an orderly end."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(
        self, tensors: Any, table: Any, buffers: Any, about: Any, before_commit: Any, snapshot: Sequence[str]
    ) -> None:
        name = f"{about['images_seen']:012d}-{self._attempt}"
        if snapshot:
            averages = {key: _halved(t) for key, t in tensors.items() if key.partition("/")[0] in snapshot}
            self._commit(f"{SNAPSHOTS}/{name}", averages, table, buffers, {**about, "state_keys": list(snapshot)})
        self._commit(f"{FOLDER}/{name}", tensors, table, buffers, about, before_commit)
        if self._rank == 0:
            self.last_commit = (about["images_seen"], time.time())
            self._clean()

    def _commit(
        self, folder: str, tensors: Any, table: Any, buffers: Any, about: Any, before_commit: Any = None
    ) -> None:
        """This rank's share; on rank 0 also the marker, when every share has arrived."""
        share, files = f"rank-{self._rank:05d}", {}
        for number, part in enumerate(_parts(tensors, table)):
            file = f"{share}-{number:03d}.safetensors" if number else f"{share}.safetensors"
            ours = {key: tensors[key] for key in tensors if key.partition("/")[2] in part}
            files[file] = {**self._put(f"{folder}/{file}", ours), "fragments": list(part.values())}
        if buffers:
            name = f"{BUFFERS}.safetensors"
            files[name] = {**self._put(f"{folder}/{name}", buffers), "fragments": []}
        self._run.put(f"{folder}/{share}.json", json.dumps(files).encode())
        if self._rank == 0:
            marker = {**about, "world_size": self._world_size, "files": self._collect(folder), "time": time.time()}
            self._check_owner()
            if before_commit is not None:
                before_commit()
            self._run.put(f"{folder}/{MARKER}", json.dumps(marker).encode())

    def _check_owner(self) -> None:
        owner = self._run.get(OWNER).decode(errors="replace")
        if owner != self._attempt:
            raise UserError(
                f"{self._run.url()}: another start of this run ({owner}) has taken over from this one "
                f"({self._attempt}), which ends without committing"
            )

    def _put(self, key: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="scoreray-") as temporary:
            path = Path(temporary, "share.safetensors")
            try:
                save_file(tensors, path)
            except OSError as error:
                raise StorageError(
                    f"{path}: a checkpoint's share can't be written: {error.strerror or error}"
                ) from error
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._run.put(key, path)
            return {"bytes": path.stat().st_size, "sha256": digest}

    def _collect(self, folder: str) -> dict[str, Any]:
        """Every rank's files, once each has said that it is done."""
        files: dict[str, Any] = {}
        deadline, pause_s = time.monotonic() + self._timeout_s, 0.02
        for rank in range(self._world_size):
            while True:
                try:
                    files |= json.loads(self._run.get(f"{folder}/rank-{rank:05d}.json"))
                    break
                except NotFound:
                    if self._stop.is_set() or time.monotonic() > deadline:
                        raise Unanswered(f"{self._run.url(folder)}: rank {rank}'s share did not arrive") from None
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, 1.0)
        return files

    def _clean(self) -> None:
        """Remove committed checkpoints beyond `keep`, and what killed attempts left; markers go first."""
        keys = [key for place in (FOLDER, SNAPSHOTS) for key, _ in self._run.list(place + "/")]
        folders = committed(self._run)
        kept = set(folders[-self._keep :])
        mine = f"-{self._attempt}"
        old = {folder for folder in folders if folder not in kept}
        orphans = {key.rpartition("/")[0] for key in keys} - set(folders) - set(committed(self._run, SNAPSHOTS))
        gone = old | {folder for folder in orphans if not folder.endswith(mine)}
        self._run.delete([f"{folder}/{MARKER}" for folder in sorted(old)])
        self._run.delete([key for key in keys if key.rpartition("/")[0] in gone])


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    """In fp16, unless a value is out of its range."""
    half = tensor.half()
    return half if bool(torch.isfinite(half).all()) else tensor


def _parts(tensors: dict[str, torch.Tensor], table: list[list[Any]]) -> list[dict[str, list[Any]]]:
    """The fragments of `table` by key ("parameter@start"), in groups of at most `PART_BYTES` (or one fragment)."""
    sizes: dict[str, int] = {}
    for key, tensor in tensors.items():
        fragment = key.partition("/")[2]
        sizes[fragment] = sizes.get(fragment, 0) + tensor.nbytes
    parts: list[dict[str, list[Any]]] = [{}]
    filled = 0
    for row in table:
        key = f"{row[0]}@{row[1]}"
        if parts[-1] and filled + sizes[key] > PART_BYTES:
            parts.append({})
            filled = 0
        parts[-1][key] = row
        filled += sizes[key]
    return parts
