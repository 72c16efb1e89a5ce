"""Writing checkpoints in the background of training: shares, the marker that commits them, and which ones stay.

What must hold when any process is killed at any moment: the newest marker belongs to a checkpoint that is whole, and
what killed writes left is removed by a later start, so that it never grows without bound (`test_kills.py`,
`racing_starts.py`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from scoreray.data.errors import DataError, Unanswered
from scoreray.data.scratch import scratch_file
from scoreray.data.storage.lease import Lease, TakenOver
from scoreray.data.storage.store import NotFound, Store
from scoreray.data.traces import span
from scoreray.trainer.checkpoints.checkpoint import BUFFERS, FOLDER, MARKER, OWNER, SNAPSHOTS, committed_of
from scoreray.trainer.checkpoints.marker import Marker, Share, StoredFile
from scoreray.trainer.checkpoints.tensor_file import write_tensors
from scoreray.trainer.diffusion.buffers import state_buffers
from scoreray.trainer.optim.fragments import MASTER, Fragment

PART_BYTES = 512 << 20  # a larger share is split into files of this size, so that readers of a range read little else
Row = tuple[str, int, int]  # a fragment: parameter, first element, how many
LEASE_EVERY_S = 10.0  # how often a run that trains checks whether it still is this start's
TABLES_AT_ONCE = 16  # requests of rank 0 for the tables of other ranks' shares
WAITING_EVERY_S = 2.0  # and while it waits for the other ranks' shares
SWEPT = (FOLDER, SNAPSHOTS, "metrics", "tensorboard", "quarantined")  # where a start writes
Tensors = dict[str, torch.Tensor]
Objects = Sequence[tuple[str, bytes]]  # (key, bytes)


class CheckpointWriter:
    """Saves a rank's share in the background; on rank 0, commits when every rank's share has arrived.

    Ranks meet through the store alone: training goes on while files are uploaded, and no collective is involved, which
    a rank that is late or dead would block.
    Making one on rank 0 takes the run over: a writer of an earlier start raises TakenOver instead of committing.
    `attempt`: a token shared by the ranks of this start of the worker group; no two attempts write the same key.
    `num_shares`: how many ranks store something, from rank 0 on; 1 where every rank holds the whole state. The others
    store nothing, and are not waited for. None: all.
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
        num_shares: int | None = None,
        timeout_s: float = 1800,
    ):
        self._run, self._attempt, self._rank, self._world_size = run, attempt, rank, world_size
        self._num_shares = num_shares or world_size
        self._keep, self._keep_every, self._timeout_s = keep, keep_every_images, timeout_s
        self._swept = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._lease_check: Future[None] | None = None
        self._stop = threading.Event()
        self.last_commit: tuple[int, float] | None = None
        self._lease: Lease | None = None
        # Uncommitted folders of earlier starts. Listed before the lease is taken, as what comes later may be a newer
        # start's; without our own, as a rank that is ahead of this one may have stored its share already.
        self._leftovers: set[str] = set()
        if rank == 0:
            self._leftovers = {folder for folder in self._uncommitted() if not folder.endswith(f"-{attempt}")}
            self._lease = Lease.take(run, OWNER, "run", attempt)

    def save(
        self,
        marker: Marker,
        fragments: Sequence[Fragment],
        module: torch.nn.Module,
        objects: Objects = (),
        snapshot: Sequence[str] = (),
    ) -> None:
        """Copy the state and return; writing goes on in the background. Waits for the save before this one first.

        marker: what is committed; the writer fills in files, world_size and time.  objects (rank 0): written right
        before the marker, so that they are stored once the checkpoint is.  snapshot: state keys that are also kept on
        their own, for good; they are committed before the checkpoint is.
        Errors of a save are raised by the next call or `wait`.
        """
        self.wait()
        if self._rank >= self._num_shares:
            return
        tensors = {
            f"{key}/{fragment.name}@{fragment.start}": value.detach().to("cpu", copy=True).contiguous()
            for fragment in fragments
            for key, value in fragment.tensors.items()
        }
        table = [(fragment.name, fragment.start, fragment.length) for fragment in fragments]
        buffers = {}
        if self._rank == 0:
            buffers = {name: b.detach().to("cpu", copy=True).contiguous() for name, b in state_buffers(module).items()}
        self._pending = self._pool.submit(self._write, marker, tensors, table, buffers, objects, snapshot)

    def wait(self) -> None:
        """Until the last save is committed (rank 0) or its share is stored (others)."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check_lease(self) -> None:
        """Raises TakenOver where a newer start has the run, LeaseRemoved where its folder was removed (rank 0)."""
        if self._lease is not None:
            self._lease.check()

    @contextlib.contextmanager
    def while_reading(self) -> Iterator[None]:
        """A DataError inside is TakenOver where a newer start has the run: it removes what this one still reads."""
        try:
            yield
        except DataError:
            self.check_lease()
            raise

    def poll(self) -> None:
        """Between steps: raises the error of a save that has ended, or that of `check_lease`, which runs in the
        background too."""
        if self._pending is not None:
            if self._pending.done():
                self.wait()
        elif self._lease is not None:
            if self._lease_check is not None and self._lease_check.done():
                self._lease_check.result()
                self._lease_check = None
            if self._lease_check is None:
                self._lease_check = self._pool.submit(self._lease.check_every, LEASE_EVERY_S)

    def close(self) -> None:
        """Stop without waiting for a commit that may never come. `wait` first for an orderly end."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(
        self,
        marker: Marker,
        tensors: Tensors,
        table: list[Row],
        buffers: Tensors,
        objects: Objects,
        snapshot: Sequence[str],
    ) -> None:
        with span("train.commit", run=self._run.url(), rank=self._rank, images=marker.images_seen):
            name = f"{marker.images_seen:012d}-{self._attempt}"
            if self._rank == 0 and not self._swept:  # first: starts that never reach a commit would pile up
                self.check_lease()
                self._sweep()
            if snapshot:
                wanted = (*(f"{key}/" for key in snapshot), *(f"{MASTER}/{name}@" for name in marker.frozen))
                averages = {key: _halved(t) for key, t in tensors.items() if key.startswith(wanted)}
                kept_averages = replace(marker, state_keys=list(snapshot))
                self._commit(f"{SNAPSHOTS}/{name}", kept_averages, averages, table, buffers)
            self._commit(f"{FOLDER}/{name}", marker, tensors, table, buffers, objects)
            if self._rank == 0:
                self.last_commit = (marker.images_seen, time.time())
                self._clean()

    def _commit(
        self, folder: str, marker: Marker, tensors: Tensors, table: list[Row], buffers: Tensors, objects: Objects = ()
    ) -> None:
        """This rank's share; on rank 0 also the marker, when every share has arrived."""
        share, files = f"rank-{self._rank:05d}", dict[str, StoredFile]()
        for number, part in enumerate(_parts(tensors, table)):
            file = f"{share}-{number:03d}.safetensors" if number else f"{share}.safetensors"
            ours = {key: tensors[key] for key in tensors if key.partition("/")[2] in part}
            files[file] = self._put(f"{folder}/{file}", ours, list(part.values()))
        if buffers:
            name = f"{BUFFERS}.safetensors"
            files[name] = self._put(f"{folder}/{name}", buffers, [])
        self._run.put(f"{folder}/{share}.json", Share(files).to_json())
        if self._rank == 0:
            files |= self._collect(folder)
            text = replace(marker, world_size=self._world_size, files=files, time=time.time()).to_json()
            Marker.from_json(text, self._run.url(f"{folder}/{MARKER}"))  # what could not be read is not committed
            self.check_lease()
            for key, data in objects:
                self._run.put(key, data)
            self._run.put(f"{folder}/{MARKER}", text)
            try:
                self.check_lease()
            except TakenOver:  # just now; the new start may have resumed from before, and removes our files
                self._run.delete([f"{folder}/{MARKER}"])
                raise

    def _put(self, key: str, tensors: Tensors, fragments: list[Row]) -> StoredFile:
        with scratch_file() as (file, path):
            size, digest = write_tensors(file, tensors)
            self._run.put(key, path)
        return StoredFile(size, digest, fragments)

    def _collect(self, folder: str) -> dict[str, StoredFile]:
        """The other ranks' files, once the table of each rank is stored. A listing says which are: 1,000 in a request,
        where a look for each would take as many requests, one after another."""
        files: dict[str, StoredFile] = {}
        missing = {f"{folder}/rank-{rank:05d}.json" for rank in range(1, self._num_shares)}
        deadline, pause_s = time.monotonic() + self._timeout_s, 0.02
        with ThreadPoolExecutor(TABLES_AT_ONCE) as pool:
            while missing:
                stored = {key: size for key, size in self._run.list(f"{folder}/rank-") if key in missing}
                for key, share in zip(stored, pool.map(self._share, stored, stored.values()), strict=True):
                    if share is not None:
                        files |= share.files
                        missing.remove(key)
                if missing:
                    first = min(missing).rpartition("-")[2].removesuffix(".json")
                    self._check_waiting(deadline, f"{self._run.url(folder)}: rank {int(first)}'s share did not arrive")
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, 1.0)
        return files

    def _share(self, key: str, size: int) -> Share | None:
        """None where a newer start has removed it."""
        with contextlib.suppress(NotFound):
            data = self._run.get(key, 0, size)  # of a known size: from S3 a tenth of the CPU time
            return Share.from_json(data, self._run.url(key))
        return None

    def _check_waiting(self, deadline: float, otherwise: str) -> None:
        """Raises where what is waited for won't come: the time is up, or a newer start removes what we have stored."""
        if self._lease is not None:
            self._lease.check_every(WAITING_EVERY_S)
        if self._stop.is_set() or time.monotonic() > deadline:
            raise Unanswered(otherwise)

    def _sweep(self) -> None:
        """Remove what killed starts left: unfinished uploads, which no listing shows, and files never committed."""
        for prefix in (*(f"{folder}/" for folder in SWEPT), OWNER):
            self._run.clear_unfinished(prefix, but=f"-{self._attempt}/")
        self._remove(self._leftovers & self._uncommitted())
        self._clean()
        self._swept = True

    def _clean(self) -> None:
        """Remove committed checkpoints that need not stay; their markers go first."""
        keys = [key for key, _ in self._run.list(f"{FOLDER}/")]
        folders = committed_of(keys)
        old = set(folders) - kept(folders, self._keep, self._keep_every)
        markers = {f"{folder}/{MARKER}" for folder in old}
        self._run.delete(sorted(markers))
        self._run.delete([key for key in keys if key.rpartition("/")[0] in old and key not in markers])

    def _uncommitted(self) -> set[str]:
        """Folders without a marker."""
        found = set[str]()
        for prefix in (f"{FOLDER}/", f"{SNAPSHOTS}/"):
            keys = [key for key, _ in self._run.list(prefix)]
            found |= {key.rpartition("/")[0] for key in keys} - set(committed_of(keys, prefix))
        return found

    def _remove(self, folders: set[str]) -> None:
        self._run.delete([key for folder in sorted(folders) for key, _ in self._run.list(folder + "/")])


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


def _parts(tensors: Tensors, table: Sequence[Row]) -> list[dict[str, Row]]:
    """The fragments of `table` by key ("parameter@start"), in groups of at most `PART_BYTES` (or one fragment)."""
    sizes: dict[str, int] = {}
    for key, tensor in tensors.items():
        fragment = key.partition("/")[2]
        sizes[fragment] = sizes.get(fragment, 0) + tensor.nbytes
    parts: list[dict[str, Row]] = [{}]
    filled = 0
    for row in table:
        key = f"{row[0]}@{row[1]}"
        if parts[-1] and filled + sizes[key] > PART_BYTES:
            parts.append({})
            filled = 0
        parts[-1][key] = row
        filled += sizes[key]
    return parts
