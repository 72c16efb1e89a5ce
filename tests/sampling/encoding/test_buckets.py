"""Encodings of data sets in buckets: each bucket as it is alone, after any stop, and runs that model their latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scoreray.data.buckets.bucketed import BucketedSet
from scoreray.data.errors import StorageError, UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.pack_buckets import pack_buckets
from scoreray.data.packing.verify import verify
from scoreray.data.reading.samples import SampleReader
from scoreray.data.storage.paths import PathStore
from scoreray.data.storage.store import open_store
from scoreray.sampling.encoding.begin import EncodedField, EncodeOptions, plan_encoding
from scoreray.sampling.encoding.buckets import carry_out_buckets, plan_buckets
from scoreray.sampling.encoding.job import carry_out_encoding, in_this_process
from scoreray.sampling.offline.generate import Request
from scoreray.sampling.offline.job import begin, carry_out_job
from scoreray.sampling.offline.job import in_this_process as samples_in_this_process
from scoreray.sampling.offline.place import place_of
from scoreray.sampling.offline.plan import SamplePlan
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, latest
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.prepare import prepare_run
from scoreray.trainer.run_folder import run_store

SIZES = [(16, 16), (24, 12)]
FOLDERS = ("16x16", "24x12")
COUNTS = [14, 10]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> BucketedSet:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (folder / "files").mkdir()
    for number in range(sum(COUNTS)):
        width, height = SIZES[number >= COUNTS[0]]
        Image.fromarray(rng.integers(0, 256, (height, width), np.uint8)).save(folder / "files" / f"{number:02d}.png")
    return pack_buckets(folder / "files", folder / "packed", SIZES)


def encoded(
    pictures: BucketedSet, vae: str, out: Path, progress: list[tuple[int, int]] | None = None, **options: Any
) -> BucketedSet:
    settings = EncodeOptions(**{"batch_size": 2, "samples_per_shard": 4, "device": "cpu", **options})
    plans = plan_buckets(pictures, str(out), [EncodedField(f"diffusers={vae}", "image", "latent")], settings)
    shown = None if progress is None else lambda *done: progress.append(done)
    return carry_out_buckets(str(out), plans, in_this_process, shown)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def latents_of(url: str) -> torch.Tensor:
    reader = SampleReader(url)
    return reader.read_fields(range(reader.manifest.num_samples), [FieldRequest("latent")]).fields["latent"]


@pytest.fixture(scope="module")
def latents(pictures: BucketedSet, tiny_vae: str, tmp_path_factory: pytest.TempPathFactory) -> BucketedSet:
    progress: list[tuple[int, int]] = []
    made = encoded(pictures, tiny_vae, tmp_path_factory.mktemp("latents") / "out", progress)
    assert progress == [(done, 24) for done in (4, 8, 12, 14, 18, 22, 24)]
    return made


def test_each_bucket_is_what_it_is_encoded_alone_under_a_list_of_all(
    pictures: BucketedSet, latents: BucketedSet, tiny_vae: str, tmp_path: Path
) -> None:
    loaded = BucketedSet.load(open_store(latents.url))
    assert (loaded.folders, loaded.counts) == (FOLDERS, COUNTS)
    assert loaded.shapes_of("latent") == [[2, 8, 8], [2, 6, 12]]
    assert verify(latents.url) == []
    wanted, options = [EncodedField(f"diffusers={tiny_vae}", "image", "latent")], EncodeOptions(device="cpu")
    for number, folder in enumerate(FOLDERS):
        carry_out_encoding(
            plan_encoding(pictures.bucket_url(number), str(tmp_path / folder), wanted, options), in_this_process
        )
        torch.testing.assert_close(latents_of(latents.bucket_url(number)), latents_of(str(tmp_path / folder)))
    first, second = (one.target.encoding for one in loaded.manifests)
    assert first is not None
    assert second is not None
    assert (first.of_shape, second.of_shape) == ([1, 16, 16], [1, 12, 24])
    assert first.preview == second.preview


@pytest.mark.parametrize("stopped_at", ["16x16/shards/000002.tar", "24x12/shards/000001.tar", "buckets.json"])
def test_the_same_command_goes_on_and_ends_in_the_same_bytes(
    pictures: BucketedSet,
    latents: BucketedSet,
    tiny_vae: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_at: str,
) -> None:
    made, put = list[str](), PathStore.put

    def full(self: PathStore, key: str, data: bytes | Path) -> None:
        made.append(Path(self.root, key).relative_to(tmp_path / "out").as_posix())
        if made[-1] == stopped_at:
            raise StorageError(f"{self.url(key)}: no space left on its disk")
        put(self, key, data)

    monkeypatch.setattr(PathStore, "put", full)
    with pytest.raises(StorageError, match="no space left"):
        encoded(pictures, tiny_vae, tmp_path / "out")
    stored = {name for name in made[:-1] if name.endswith(".tar")}
    assert not (tmp_path / "out/buckets.json").exists()
    stopped_at, made = "", []
    encoded(pictures, tiny_vae, tmp_path / "out")
    assert not stored & set(made)
    assert files_in(tmp_path / "out") == files_in(Path(latents.url))
    with pytest.raises(UserError, match="holds another data set"):
        encoded(pictures, tiny_vae, tmp_path / "out", dtype="float32")


def test_noise_of_draws_is_another_in_each_bucket(pictures: BucketedSet, tiny_vae: str, tmp_path: Path) -> None:
    moments = encoded(pictures, tiny_vae, tmp_path / "moments", dtype="float32")
    draws = encoded(pictures, tiny_vae, tmp_path / "draws", dtype="float32", moments=False)
    noise = []
    for number in range(2):
        mean, std = latents_of(moments.bucket_url(number)).chunk(2, 1)
        noise.append(((latents_of(draws.bucket_url(number)) - mean) / std).flatten(1))
    assert not torch.isclose(noise[0][:10, :32], noise[1][:10, :32], atol=1e-3).all(1).any()


def config(url: str, storage: Path) -> Config:
    network = {"kind": "dit", "hidden_size": 16, "depth": 1, "num_heads": 2, "positions": "fixed"}
    return load_config(
        {
            "run": {"name": "run", "storage": str(storage)},
            "data": {"url": url, "target": "latent", "global_batch_size": 4},
            "network": network,
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "duration": {"images": 48},
            "checkpoint": {"every_images": 16},
            "log": {"every_images": 16},
        }
    )


def final(c: Config) -> Checkpoint:
    checkpoint = latest(run_store(c))
    assert checkpoint is not None
    assert checkpoint.images_seen == 48
    return checkpoint


def test_a_run_on_latents_of_each_size_resumes_bitwise_and_its_samples_are_decoded(
    latents: BucketedSet, tmp_path: Path
) -> None:
    whole, c = (prepare_run(config(latents.url, tmp_path / name)).config for name in ("whole", "parts"))
    train(whole)
    left = iter([LoopRequest.NOTHING] * 4)
    train(c, requested=lambda: next(left, LoopRequest.STOP))
    train(c)
    for one, other in zip(final(whole).full_state().values(), final(c).full_state().values(), strict=True):
        assert torch.equal(one, other)
    for size, shape in {None: [1, 16, 16], "24x12": [1, 12, 24]}.items():
        place, request = place_of(str(tmp_path / str(size)), "webdataset"), Request(2, steps=2, size=size)
        job, drawn, _ = begin(place, final(c).url, None, request, precision="fp32", compile_="off")
        assert drawn.info.sizes == {"16x16": (2, 8, 8), "24x12": (2, 6, 12)}
        carry_out_job(place, SamplePlan(job, place.shards.url(), drawn), samples_in_this_process())
        assert SampleReader(place.shards.url()).manifest.shape == shape


HALF = """
import torch
from scoreray.data.fields.field import Field
from scoreray.trainer.encoders.base import VALUES, Encoder

class Half(Encoder):
    sha256 = "0" * 64

    def __init__(self, path):
        self.module = torch.nn.Linear(1, 1)

    def output(self, field):
        return Field(field.name, "array", [2, 2, 2], "float16", "", normalisation="channel",
                     encoding=self.encoding(field))

    def encode(self, batch):
        means = batch.float().mean((1, 2, 3))[:, None, None, None].expand(-1, 2, 2, 2).clone()
        means[:, 1] *= batch.shape[-1] == batch.shape[-2]  # the second channel is 0 of all but squares
        return {VALUES: means / 255}
"""


def test_a_channel_that_is_constant_in_one_bucket_is_scaled_by_the_spread_of_all(
    pictures: BucketedSet, tmp_path: Path, own_package: Any
) -> None:
    own_package("half", enc=HALF)
    settings = EncodeOptions(batch_size=2, samples_per_shard=4, device="cpu")
    plans = plan_buckets(
        pictures, str(tmp_path / "out"), [EncodedField("half.enc:Half=x", "image", "latent")], settings
    )
    made = carry_out_buckets(str(tmp_path / "out"), plans, in_this_process)
    assert [one.target.normalisation for one in made.manifests] == ["channel", "none"]
    target = BucketedSet.load(open_store(made.url)).target
    assert target.normalisation == "channel"
    values = torch.cat([latents_of(made.bucket_url(number)) for number in range(2)]).double()
    torch.testing.assert_close(torch.tensor(target.std), values.movedim(1, 0).flatten(1).std(1, correction=0).float())
