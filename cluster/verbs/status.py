"""`scoreray status`: what is at the URL of a run or a model, from what is committed, without any weights."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from scoreray.cluster.verbs.inventory import Stored, age, of_place
from scoreray.data.storage.store import open_store
from scoreray.data.units import counted_noun, readable_bytes
from scoreray.sampling.model.describe import describe
from scoreray.trainer.checkpoints.checkpoint import FOLDER, Checkpoint
from scoreray.trainer.checkpoints.marker import Ancestor
from scoreray.trainer.networks.lora import LoRAConfig
from scoreray.trainer.records import read_metrics


@dataclass(frozen=True)
class Status:
    """images_total: after which its run ends. committed_s: Unix time of the commit, None of an exported model. loss: of
    the last record up to that commit. stored: what the whole run, or model, is in storage."""

    url: str
    images_seen: int
    images_total: int
    ema: tuple[str, ...]
    shape: tuple[int, ...]
    takes: str
    committed_s: float | None = None
    loss: float | None = None
    world_size: int | None = None
    lora: LoRAConfig | None = None
    frozen: list[str] = field(default_factory=list)
    lineage: list[Ancestor] = field(default_factory=list)
    teacher: Ancestor | None = None
    stored: Stored | None = None

    def answer(self) -> dict[str, Any]:
        found = asdict(self)
        about = found.pop("stored") or {}
        found |= {key: about[key] for key in ("state", "metrics", "bytes", "written_s") if key in about}
        return found if self.teacher is not None else {key: found[key] for key in found if key != "teacher"}

    def text(self) -> str:
        total = f" of {self.images_total:,}" if self.committed_s is not None else ""
        lines = [self.url]
        if self.stored is not None:
            ago = age(time.time() - self.stored.written_s)
            lines.append(f"  state       {self.stored.state}, {readable_bytes(self.stored.bytes)}, last written {ago}")
        lines += [f"  images      {self.images_seen:,}{total}"]
        if self.committed_s is not None:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self.committed_s))
            lines.append(f"  committed   {at} UTC, by {counted_noun(self.world_size or 0, 'worker')}")
        if self.loss is not None:
            lines.append(f"  loss        {self.loss:.4f}")
        if self.stored is not None and (others := {k: v for k, v in self.stored.metrics.items() if k != "loss"}):
            lines.append(f"  metrics     {'  '.join(f'{name} {value:.4g}' for name, value in others.items())}")
        lines.append(f"  averages    {', '.join(self.ema)}")
        lines.append(f"  samples     {'x'.join(map(str, self.shape))}, given {self.takes}")
        if self.lora is not None:
            lines.append(f"  LoRA        rank {self.lora.rank}, beside the model that it began from")
        if self.frozen:
            lines.append(f"  frozen      {len(self.frozen):,} tensors")
        lines += [f"  began from  {origin.text()}" for origin in self.lineage[:1]]
        lines += [f"  and that    {origin.text()}" for origin in self.lineage[1:]]
        lines += [f"  taught by   {origin.text()}" for origin in [self.teacher] if origin is not None]
        return "\n".join(lines)


def status_of(url: str) -> Status:
    """Errors as of `describe`."""
    found = describe(url)
    info, stored = found.info, found.stored
    page = stored.page
    about: dict[str, Any] = {"lora": stored.config.lora}
    if isinstance(stored.source, Checkpoint):
        marker = stored.source.marker
        about |= {
            "committed_s": marker.time,
            "world_size": marker.world_size,
            "frozen": marker.frozen,
            "teacher": marker.teacher,
        }
        run, of_run, _ = stored.url.rpartition(f"/{FOLDER}/")
        records = read_metrics(open_store(run), stored.source) if of_run else []
        about["loss"] = records[-1].loss if records else None
    about["stored"] = of_place(stored.url.rpartition(f"/{FOLDER}/")[0] or stored.url)
    total = stored.config.duration.images or info.images_seen  # minutes have been made images by the first commit
    return Status(
        stored.url, info.images_seen, total, stored.lengths, info.image_shape, info.takes, lineage=page.lineage, **about
    )
