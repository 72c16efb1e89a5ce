"""What is stored under a URL: runs, studies, models, data sets and samples, among whatever else lies there.

Found from one listing, by the names that our formats give; then a small object or two of each is read. What can't be
read as ours is passed over, unless its neighbours are ours too: then it is listed as unreadable.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeGuard

from scoreray.data.buckets.bucketed import BucketedSet
from scoreray.data.errors import DataError, ScorerayError, UserError, printable, shortened
from scoreray.data.packing.commit import PLAN
from scoreray.data.reading.manifest import BUCKETS, INDEX, MANIFEST, Manifest
from scoreray.data.storage.interface import StoredObject
from scoreray.data.storage.store import Store, local_path, open_store
from scoreray.data.threads import map_in_threads
from scoreray.data.units import readable_bytes
from scoreray.sampling.evaluation.follow import METRICS as EVALUATED
from scoreray.sampling.offline.place import RECORD
from scoreray.trainer.checkpoints.checkpoint import FOLDER, OWNER, committed_of, open_checkpoint
from scoreray.trainer.checkpoints.exported import MODEL_JSON, ModelManifest
from scoreray.trainer.config import parse_sections
from scoreray.trainer.records import METRICS
from scoreray.trainer.run_folder import CONFIG_FILE
from scoreray.tune.schedule import cost_of
from scoreray.tune.study import STUDY
from scoreray.tune.trial import TRIALS, read_trials

Kind = Literal["run", "study", "model", "data set", "samples"]
State = Literal["done", "under way", "stopped", "unreadable"]
ACTIVE_S = 900.0  # since the newest write, up to which what is not done counts as under way
AT_ONCE = 8  # requests
CHECKPOINT = re.compile(rf"{FOLDER}/\d{{12,18}}-[^/]+/[^/]+")
COLUMNS = ("kind", "state", "images", "last metrics", "size", "written", "where")


@dataclass(frozen=True)
class Stored:
    """One thing that we made.

    images: seen by what was committed; of a data set and of samples how many there are; of a study those of all trials.
    total: at which it is done, where that is known.  metrics: the newest ones, by name; of a study the best trial's.
    bytes: of all objects under the URL.  written_s: Unix time of the newest.  note: what else is to be known.
    """

    url: str
    kind: Kind
    state: State
    images: int | None
    total: int | None
    metrics: Mapping[str, float]
    bytes: int
    written_s: float
    note: str = ""

    def answer(self) -> dict[str, Any]:
        return asdict(self)

    def row(self, now: float) -> tuple[str, ...]:
        images = "" if self.images is None else f"{self.images:,}"
        if self.total not in (None, self.images):
            images += f" of {self.total:,}"
        metrics = self.note or "  ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return (self.kind, self.state, images, metrics, readable_bytes(self.bytes), age(now - self.written_s), self.url)


@dataclass(frozen=True)
class Facts:
    """What is read of one. note: why it can't be read, "" where it can."""

    images: int | None = None
    total: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_done: bool = False
    note: str = ""


def inventory(url: str, now: float | None = None) -> list[Stored]:
    """Everything of ours under `url`, or at it, by URL. Raises UserError for a URL that can't be used, StorageError."""
    store, now = open_store(url), time.time() if now is None else now
    objects = store.objects()
    stored, covered = [], list[str]()
    for place, (kind, about) in places_of(store, objects).items():  # what holds others comes before them
        if any(place.startswith(one) for one in covered):
            continue
        if not about.note:
            covered.append(place)
        stored.append(_stored(store, place, kind, about, objects, now))
    return stored


def places_of(store: Store, objects: Sequence[StoredObject]) -> dict[str, tuple[Kind, Facts]]:
    """Every folder ("" or ending in "/"), at any depth, where something of ours is, and what was read of it."""
    folders = found_in([one.key for one in objects])
    places = list(folders)
    read = map_in_threads(AT_ONCE, lambda n: _read(store, places[n], folders[places[n]], objects), range(len(places)))
    return {place: (folders[place], about) for place, about in zip(places, read, strict=True) if about is not None}


def of_place(url: str) -> Stored | None:
    """What is at this very URL; None where that is nothing of ours, or only holds things."""
    place = open_store(url).url()
    return next((one for one in inventory(url) if one.url == place), None)


def found_in(keys: Iterable[str]) -> dict[str, Kind]:
    """Folders ("" or ending in "/") where something of ours may be, in order -> what it may be, by names alone."""
    names: dict[str, set[str]] = {}
    keys = list(keys)
    for key in keys:
        folder, slash, name = key.rpartition("/")
        names.setdefault(folder + slash, set()).add(name)
    above = set(names)
    for folder in names:
        while folder:
            folder = folder.rstrip("/").rpartition("/")[0]
            folder += "/" if folder else ""
            above.add(folder)
    found: dict[str, Kind] = {}
    for folder in sorted(above):
        here = names.get(folder, set())
        packing = names.get(f"{folder}packing/", set())
        if STUDY in here:
            found[folder] = "study"
        elif CONFIG_FILE in here:
            found[folder] = "run"
        elif {MANIFEST, BUCKETS} & here or PLAN.rpartition("/")[2] in packing:
            found[folder] = "data set"
        elif MODEL_JSON in here:
            found[folder] = "model"
        elif RECORD in here:
            found[folder] = "samples"
    return found


def _read(store: Store, place: str, kind: Kind, objects: Sequence[StoredObject]) -> Facts | None:
    """None where it turns out to be nothing of ours."""
    one = store.child(place) if place else store
    keys = [o.key.removeprefix(place) for o in objects if o.key.startswith(place)]
    try:
        return READERS[kind](one, keys)
    except ScorerayError as error:
        text = str(error).removeprefix(f"{one.url()}").strip("/: ")
        why = shortened(printable(" ".join(text.split())), 160)
        return Facts(note=why) if _has_companions(kind, keys) else None


def _has_companions(kind: Kind, keys: Sequence[str]) -> bool:
    """Whether what is beside an object that can't be read is ours too."""
    ours = {
        "run": rf"{OWNER}|{CHECKPOINT.pattern}",
        "study": rf"{OWNER}|{TRIALS}/\d{{5,}}\.json",
        "model": r"(ema-[\d.]+|raw|adapter_model)\.safetensors|denoiser/.*",
        "data set": rf"{INDEX}|shards/\d{{6}}\.tar|{PLAN}",
        "samples": r"\d{6}\.png|shards/\d{6}\.tar",
    }[kind]
    return any(re.fullmatch(ours, key) for key in keys)


def _run(run: Store, keys: Sequence[str]) -> Facts:
    config = parse_sections(run.get(CONFIG_FILE), run.url(CONFIG_FILE))
    about, duration = config.get("run"), config.get("duration")
    total = _images_of(duration)
    is_length = total is not None or (isinstance(duration, dict) and _is_number(duration.get("minutes")))
    if not isinstance(about, dict) or not isinstance(about.get("name"), str) or not is_length:
        raise DataError(f"{run.url(CONFIG_FILE)}: not the config of a run")
    if about["name"] != run.root.rpartition("/")[2] and not _has_companions("run", keys):
        raise DataError(f"{run.url(CONFIG_FILE)}: the config of a run that is elsewhere")
    folders = committed_of(key for key in keys if key.startswith(f"{FOLDER}/"))
    seen = max((int(found[0]) for folder in folders if (found := re.search(r"\d{12,18}", folder))), default=0)
    if total is None and folders:  # minutes, of which the first commit made a number of images
        total = _images_of(open_checkpoint(run, folders[-1]).marker.config.get("duration"))
    return Facts(seen, total, _metrics_of_run(run, keys, seen), total is not None and seen >= total)


def _images_of(duration: Any) -> int | None:
    images = duration.get("images") if isinstance(duration, dict) else None
    return images if isinstance(images, int) else None


def _metrics_of_run(run: Store, keys: Sequence[str], seen: int) -> dict[str, float]:
    """The newest committed record's loss, and what evaluations beside the run have found."""
    found: dict[str, float] = {}
    if newest := _newest(keys, rf"{METRICS}/(\d{{12,18}})\.jsonl", seen):
        line = run.get(newest).rstrip().rpartition(b"\n")[2]
        found |= _numbers({"loss": _loaded(line, run.url(newest)).get("loss")})
    if newest := _newest(keys, rf"{EVALUATED}/(\d{{12,18}})\.json", seen):
        found |= _numbers(_loaded(run.get(newest), run.url(newest)))
    return found


def _newest(keys: Sequence[str], pattern: str, seen: int) -> str:
    matches = [match for key in keys if (match := re.fullmatch(pattern, key)) and int(match[1]) <= seen]
    return max(matches, key=lambda match: int(match[1]))[0] if matches else ""


def _study(study: Store, keys: Sequence[str]) -> Facts:
    sweep = _loaded(study.get(STUDY), study.url(STUDY))
    total, metric = sweep.get("trials"), sweep.get("metric")
    if not isinstance(metric, dict) or not isinstance(sweep.get("study"), dict) or not isinstance(total, int):
        raise DataError(f"{study.url(STUDY)}: not a record of a sweep")
    trials = read_trials(study)
    ended = sum(trial.state != "running" for trial in trials)
    finished = [trial for trial in trials if trial.state == "done" and trial.metrics]
    names = list(finished[0].metrics or {}) if finished else []
    best = min(finished, key=lambda trial: cost_of(trial, names[0])).metrics if names else {}
    images = sum(trial.images for trial in trials)
    found = {"trials": float(ended), **_numbers(best or {})}
    return Facts(images, None, found, is_done=ended >= total)


def _model(model: Store, keys: Sequence[str]) -> Facts:
    page = ModelManifest.from_json(model.get(MODEL_JSON), model.url(MODEL_JSON))
    return Facts(page.images_seen, is_done=True)


def _data_set(data: Store, keys: Sequence[str]) -> Facts:
    if BUCKETS in keys:
        return Facts(BucketedSet.load(data).num_samples, is_done=True)
    if MANIFEST in keys:
        return Facts(Manifest.load(data).num_samples, is_done=True)
    words = data.get(PLAN).decode(errors="replace").split()
    if not words or not re.fullmatch(r"[0-9a-f]{64}", words[0]):
        raise DataError(f"{data.url(PLAN)}: not the plan of a pack")
    return Facts(metrics={"shards": float(sum(re.fullmatch(r"packing/\d{6,}", key) is not None for key in keys))})


def _samples(samples: Store, keys: Sequence[str]) -> Facts:
    record = _loaded(samples.get(RECORD), samples.url(RECORD))
    request = record.get("request")
    count = request.get("count") if isinstance(request, dict) else None
    if not isinstance(count, int) or "checkpoint" not in record:
        raise DataError(f"{samples.url(RECORD)}: not a record of samples")
    return Facts(count, is_done="finished" in record)


READERS: dict[Kind, Callable[[Store, Sequence[str]], Facts]] = {
    "run": _run, "study": _study, "model": _model, "data set": _data_set, "samples": _samples,
}  # fmt: skip


def _loaded(data: bytes, url: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{url}: not a JSON object")
    return found


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those that are finite numbers, without what they are made of: errors, counts, versions."""
    found = {name: value.get("value") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _stored(store: Store, place: str, kind: Kind, about: Facts, objects: Sequence[StoredObject], now: float) -> Stored:
    ours = [one for one in objects if one.key.startswith(place)]
    written_s = max(one.written_s for one in ours)
    is_active = now - written_s < ACTIVE_S
    state: State = "unreadable" if about.note else "done" if about.is_done else "under way" if is_active else "stopped"
    url = store.url(place.rstrip("/"))
    size = sum(one.bytes for one in ours)
    return Stored(url, kind, state, about.images, about.total, dict(about.metrics), size, written_s, about.note)


def age(seconds: float) -> str:
    """ "12 s ago", "3 min ago", "5 h ago", "2 d ago"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def table(found: Sequence[Stored], now: float) -> str:
    """A line each under the names of the columns; numbers to the right."""
    rows = [COLUMNS, *(one.row(now) for one in found)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(COLUMNS))]
    right = {"images", "size", "written"}
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, COLUMNS, strict=True)
        ]
        lines.append(printable("  ".join(cells).rstrip()))
    return "\n".join(lines)


def check_there(url: str, found: Sequence[Stored]) -> None:
    """Raises UserError where a folder that was given does not exist, as its listing is like that of an empty one."""
    path = local_path(url)
    if not found and path is not None and not path.is_dir():
        raise UserError(f"{url}: no such folder")
