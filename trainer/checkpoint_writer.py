"""Writing checkpoints behind the training: shares, the marker that commits them, and which ones stay.

What must hold when any process is killed at any moment: the newest marker belongs to a checkpoint that is whole, and
what killed writes left is removed by a later start, so that it never grows without bound.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from scoreray.data.errors import Unanswered, UserError
from scoreray.data.scratch import scratch_file
from scoreray.data.store import NotFound, Store
from scoreray.data.traces import span
from scoreray.trainer.buffers import state_buffers
from scoreray.trainer.checkpoint import BUFFERS, FOLDER, FORMAT, MARKER, OWNER, SNAPSHOTS, committed
from scoreray.trainer.fragments import Fragment
from scoreray.trainer.tensor_file import write_tensors

PART_BYTES = 512 << 20  # a share beyond this goes on in another file, so that readers of a range read little else
METRICS = "metrics"  # what is written there before a commit, by rank 0 alone


class CheckpointWriter:
    """Saves a rank's share in the background; on rank 0, commits when every rank's share has arrived.

    Ranks meet through the store alone, so training goes on while files travel and no collective is involved.
    Making one on rank 0 takes the run over: a writer of an earlier start raises UserError instead of committing.
    `attempt`: a token shared by the ranks of this start of the worker group; names of two attempts never meet.
    `keep`, `keep_every_images`: which checkpoints stay, see `kept`.
    """

    def __init__(
        self,
        run: Store,
        *,
        attempt: str,
        rank: int,
        world_size: int,
        keep: int,
        keep_every_images: int | None = None,
        timeout_s: float = 1800,
    ):
        self._run, self._attempt, self._rank, self._world_size = run, attempt, rank, world_size
        self._keep, self._keep_every, self._timeout_s = keep, keep_every_images, timeout_s
        self._swept = False
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
            buffers = {name: b.detach().to("cpu", copy=True).contiguous() for name, b in state_buffers(module).items()}
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
        with span("train.commit", run=self._run.url(), rank=self._rank, images=about["images_seen"]):
            name = f"{about['images_seen']:012d}-{self._attempt}"
            if self._rank == 0 and not self._swept:  # first: starts that never reach a commit would pile up
                self._sweep()
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
            try:
                self._check_owner()
            except UserError:  # taken over just now; the new start may have gone on from before, and removes our files
                self._run.delete([f"{folder}/{MARKER}"])
                raise

    def _check_owner(self) -> None:
        owner = self._run.get(OWNER).decode(errors="replace")
        if owner != self._attempt:
            raise UserError(
                f"{self._run.url()}: another start of this run ({owner}) has taken over from this one "
                f"({self._attempt}), which ends without committing"
            )

    def _put(self, key: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        with scratch_file() as (file, path):
            size, digest = write_tensors(file, tensors)
            self._run.put(key, path)
        return {"bytes": size, "sha256": digest}

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

    def _sweep(self) -> None:
        """What killed starts left half-written, which no listing shows, and then what `_clean` removes."""
        for prefix in (FOLDER + "/", SNAPSHOTS + "/", METRICS + "/", "tensorboard/", "quarantined/", OWNER):
            self._run.clear_unfinished(prefix, but=f"-{self._attempt}/")
        self._clean()
        self._swept = True

    def _clean(self) -> None:
        """Remove committed checkpoints that need not stay, and what killed attempts left; markers go first."""
        keys = [key for place in (FOLDER, SNAPSHOTS) for key, _ in self._run.list(place + "/")]
        folders = committed(self._run)
        old = set(folders) - kept(folders, self._keep, self._keep_every)
        orphans = {key.rpartition("/")[0] for key in keys} - set(folders) - set(committed(self._run, SNAPSHOTS))
        gone = old | {folder for folder in orphans if not folder.endswith(f"-{self._attempt}")}
        self._run.delete([f"{folder}/{MARKER}" for folder in sorted(old)])
        self._run.delete([key for key in keys if key.rpartition("/")[0] in gone])


def kept(folders: Sequence[str], keep: int, every_images: int | None) -> set[str]:
    """Which of the committed checkpoints stay, oldest first: the newest `keep`, and the first at or after each multiple
    of `every_images`."""
    stay, before = set(folders[-keep:]), 0
    for folder in folders if every_images else ():
        interval = int(folder.rpartition("/")[2].partition("-")[0]) // (every_images or 1)
        if interval > before:
            stay.add(folder)
            before = interval
    return stay


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
