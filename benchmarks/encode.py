"""What `data encode` costs beside the encoder itself, how far a second actor helps, and reading latents.

    pip install -e .[benchmarks]
    python benchmarks/encode.py [loop] [actors] [read]

Each prints one ratio, of two ways that are timed in turn in one run, after both are warm; of an idle machine's 2 cores:
  loop    samples a second of one actor, shards stored, over those of a bare loop of the encoder's calls on one thread,
          whose pictures are in memory: an AutoencoderKL, pictures of 64x64. Goal 0.9
  actors  samples a second of two actors over twice those of one. Where there are fewer cores than actors and what is
          beside them, the encoder is a stand-in that sleeps as long as the real one would compute. Goal 0.9
  read    CPU seconds of copying members of latents (float16, 4x32x32) from memory into batches over those of batches
          from verified shards, in the first epoch and in later ones, the least of all rounds of each. Goal 0.8
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.verbs.encode import OBJECT_STORE_BYTES, pipeline
from scoreray.data import own_code
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.pack import pack
from scoreray.data.packing.plan import PackedShard
from scoreray.data.reading.samples import SampleReader
from scoreray.data.reading.stream import Stream
from scoreray.sampling.encoding.begin import EncodedField, EncodeOptions, plan_encoding
from scoreray.sampling.encoding.job import carry_out_encoding, in_this_process
from scoreray.sampling.encoding.plan import EncodePlan
from scoreray.trainer.encoders.load import load_encoder

SIZE, BATCH, SHARD = 64, 16, 64
STAND_IN = '''
import time

import torch

from scoreray.data.fields.field import Field
from scoreray.trainer.encoders.base import VALUES, Encoder


class StandIn(Encoder):
    """Latents of noise, after so many seconds as its path says."""

    sha256 = "0" * 64

    def __init__(self, path):
        self.seconds, self.module = float(path), torch.nn.Linear(1, 1)

    def output(self, field):
        return Field(field.name, "array", [4, 32, 32], "float16", "", encoding=self.encoding(field))

    def encode(self, batch):
        time.sleep(self.seconds)
        return {VALUES: torch.randn(len(batch), 4, 32, 32)}
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--shards", type=int, default=40, help="that are timed, of 64 samples (loop, actors)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scoreray-benchmark-") as name:
        folder = Path(name)
        (folder / "standin").mkdir()
        (folder / "standin" / "__init__.py").write_text(STAND_IN)
        own_code.bring([str(folder / "standin")])
        for part in arguments.parts:
            began = time.perf_counter()
            PARTS[part](folder, arguments.shards, arguments.rounds)
            print(f"{time.perf_counter() - began:.0f} s in all.\n", flush=True)


def pictures(folder: Path, count: int, size: int, channels: int = 3) -> str:
    url = folder / f"pictures-{count}-{size}"
    if not url.exists():
        images = np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
        np.savez(folder / "pictures.npz", images=images)
        pack(folder / "pictures.npz", url, name="pictures")
    return str(url)


def planned(url: str, out: Path, encoder: str) -> EncodePlan:
    options = EncodeOptions(batch_size=BATCH, samples_per_shard=SHARD, device="cpu")
    return plan_encoding(url, str(out), [EncodedField(encoder, "image", "latent")], options)


def rate(plan: EncodePlan, actors: int) -> float:
    """Samples a second, by when shards were stored, without the first third: processes start meanwhile."""
    from ray.data import ActorPoolStrategy

    def made(plan: EncodePlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
        for _ in pipeline(plan, numbers, ActorPoolStrategy(size=actors)):
            pass
        return in_this_process(plan, numbers)  # they are there

    manifest = carry_out_encoding(plan, made)
    stored = sorted((Path(plan.url) / shard.name).stat().st_mtime for shard in manifest.shards)
    warm = len(stored) // 3
    return SHARD * (len(stored) - 1 - warm) / (stored[-1] - stored[warm])


def loop(folder: Path, shards: int, rounds: int) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        latent_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=SIZE,
    ).save_pretrained(folder / "vae")  # fmt: skip
    url, encoder = pictures(folder, SHARD * (shards + 4), SIZE), f"diffusers={folder / 'vae'}"
    made = load_encoder(encoder, "cpu")
    batches = SampleReader(url).read(range(SHARD))[0].split(BATCH)
    torch.set_num_threads(1)
    found = []
    with connected(num_cpus=2, object_store_bytes=OBJECT_STORE_BYTES):
        for number in range(rounds):
            for batch in batches:
                made.encode(batch)
            began = time.perf_counter()
            for _ in range(max(1, shards // 2)):
                for batch in batches:
                    made.encode(batch)
            bare = SHARD * max(1, shards // 2) / (time.perf_counter() - began)
            ours = rate(planned(url, folder / f"loop-{number}", encoder), 1)
            found.append(ours / bare)
            print(f"loop: bare {bare:.1f}, data encode with 1 actor {ours:.1f} samples a second: {ours / bare:.3f}")
    print(f"loop: median of {rounds}: {statistics.median(found):.3f} (goal 0.9)")


def actors(folder: Path, shards: int, rounds: int) -> None:
    url, found = pictures(folder, SHARD * (shards + 8), SIZE), []
    with connected(num_cpus=3, object_store_bytes=OBJECT_STORE_BYTES):
        for number in range(rounds):
            one, two = (
                rate(planned(url, folder / f"actors-{number}-{count}", "standin:StandIn=0.25"), count)
                for count in (1, 2)
            )
            found.append(two / one / 2)
            print(f"actors: 1 {one:.1f}, 2 {two:.1f} samples a second: efficiency {found[-1]:.3f}", flush=True)
    print(f"actors: median of {rounds}: {statistics.median(found):.3f} (goal 0.9)")


def read(folder: Path, shards: int, rounds: int) -> None:
    count, batch_size = 16_384, 64
    url = str(folder / "latents")
    options = EncodeOptions(batch_size=64, device="cpu")
    wanted = [EncodedField("standin:StandIn=0", "image", "latent")]
    carry_out_encoding(plan_encoding(pictures(folder, count, 8, 1), url, wanted, options), in_this_process)
    reader = SampleReader(url)
    (members,) = reader.read_members(range(count), [reader.manifest.target.member])
    head, batch = len(members[0]) - 8192, np.empty((batch_size, 4, 32, 32), np.float16)

    def copied(verify: bool) -> None:
        for number, member in enumerate(members):
            if verify:
                hashlib.sha256(member).digest()
            batch[number % batch_size] = np.frombuffer(member, np.float16, 4096, head).reshape(4, 32, 32)

    def streamed() -> None:
        for _ in range(count // batch_size):
            next(batches)

    ways: dict[str, Callable[[], None]] = {
        "copied from memory": lambda: copied(False), "verified and copied from memory": lambda: copied(True),
        "first epoch": streamed, "second epoch": streamed, "third epoch": streamed,
    }  # fmt: skip
    took: dict[str, list[float]] = {name: [] for name in ways}
    stored = [FieldRequest("latent")]
    for _ in range(rounds):
        with Stream(
            url, fields=stored, global_batch_size=batch_size, rank=0, world_size=1, seed=0, cache_bytes=0
        ) as stream:
            batches = stream.batches(0)  # in this thread: what is read ahead is no other way's time
            for name, way in ways.items():
                began = time.process_time()
                way()
                took[name].append(time.process_time() - began)
    us = {name: 1e6 * min(times) / count for name, times in took.items()}
    first, later = us["first epoch"], min(us["second epoch"], us["third epoch"])
    for name in ("copied from memory", "verified and copied from memory"):
        print(
            f"read: {name} {us[name]:.2f} us a latent; first epoch {first:.2f}: {us[name] / first:.3f}; later ones "
            f"{later:.2f}: {us[name] / later:.3f} (goal 0.8)"
        )


PARTS = {"loop": loop, "actors": actors, "read": read}

if __name__ == "__main__":
    main()
