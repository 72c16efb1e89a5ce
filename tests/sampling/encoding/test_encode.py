"""Encodings: the libraries' own latents and masks, the same bytes after any kill, and what is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.errors import DataError, StorageError, UserError
from scoreray.data.fields.encoding import drawn
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.inspect import visible
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader
from scoreray.data.storage.lease import TakenOver
from scoreray.data.storage.paths import PathStore
from scoreray.sampling.encoding import plan as plans
from scoreray.sampling.encoding.begin import EncodedField, EncodeOptions, plan_encoding
from scoreray.sampling.encoding.job import carry_out_encoding, in_this_process
from scoreray.sampling.offline.place import OWNER
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.run_folder import run_store

SIZES = {"batch_size": 4, "samples_per_shard": 16}


def encoded(url: str, out: Path, *fields: tuple[str, str, str], **options: Any) -> Manifest:
    wanted = [EncodedField(*one) for one in fields]
    plan = plan_encoding(url, str(out), wanted, EncodeOptions(device="cpu", **{**SIZES, **options}))
    return carry_out_encoding(plan, in_this_process)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def field_of(url: Path | str, name: str) -> torch.Tensor:
    reader = SampleReader(str(url))
    return reader.read_fields(range(reader.manifest.num_samples), [FieldRequest(name)]).fields[name]


@pytest.fixture(scope="module")
def latents(captioned: str, tiny_vae: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of float32 moments."""
    out = tmp_path_factory.mktemp("latents") / "out"
    encoded(captioned, out, (f"diffusers={tiny_vae}", "image", "latent"), dtype="float32")
    return out


def test_moments_are_the_librarys_own_and_other_fields_are_carried(
    captioned: str, tiny_vae: str, latents: Path
) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(tiny_vae).eval()
    pictures = field_of(captioned, "image").float() / 127.5 - 1
    with torch.no_grad():
        wanted = theirs.encode(pictures).latent_dist
    found = field_of(latents, "latent")
    torch.testing.assert_close(found, torch.cat([wanted.mean, wanted.std], 1), atol=1e-5, rtol=1e-5)
    manifest = Manifest.at(str(latents))
    assert [one.name for one in manifest.fields] == ["caption", "temperature", "label", "latent"]
    for name in ("caption", "temperature", "label"):
        assert torch.equal(field_of(latents, name), field_of(captioned, name)), name
    assert manifest.label is not None
    assert manifest.label.class_counts == [17, 17, 16]
    assert [shard.num_samples for shard in manifest.shards] == [16, 16, 16, 2]
    assert verify(str(latents)) == []


def test_draws_from_moments_have_unit_variance_by_the_fields_statistics(latents: Path) -> None:
    moments, target = field_of(latents, "latent"), Manifest.at(str(latents)).target
    assert target.normalisation == "channel"
    noise = torch.randn((400, len(moments), *target.drawn_shape), generator=torch.Generator().manual_seed(0))
    draws = torch.stack([drawn(moments, one) for one in noise])
    mean, std = (torch.tensor(values)[:, None, None] for values in (target.mean, target.std))
    normalised = (draws - mean) / std
    torch.testing.assert_close(normalised.mean((0, 1, 3, 4)), torch.zeros(2), atol=5e-3, rtol=0)
    torch.testing.assert_close(normalised.std((0, 1, 3, 4)), torch.ones(2), atol=5e-3, rtol=0)


def test_latents_are_shown_by_the_map_that_was_fitted_to_pictures(captioned: str, latents: Path) -> None:
    manifest = Manifest.at(str(latents))
    shown = visible(SampleReader(str(latents)).read(range(50))[0], manifest)
    assert shown.shape == (50, 1, 8, 8)
    small = torch.nn.functional.avg_pool2d(field_of(captioned, "image").float() / 127.5 - 1, 2)
    left, all_of_it = (shown - small).square().mean(), (small - small.mean()).square().mean()
    assert left < all_of_it


def test_a_draw_is_keyed_by_seed_and_sample(captioned: str, tiny_vae: str, latents: Path, tmp_path: Path) -> None:
    wanted = (f"diffusers={tiny_vae}", "image", "latent")
    for name, options in {"a": {}, "b": {"samples_per_shard": 12}, "other": {"seed": 1}}.items():
        encoded(captioned, tmp_path / name, wanted, moments=False, dtype="float32", **options)
    a, b, other = (field_of(tmp_path / name, "latent") for name in ("a", "b", "other"))
    assert torch.equal(a, b)
    mean, std = field_of(latents, "latent").chunk(2, 1)
    noise = (a - mean) / std
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert not torch.equal(a, other)
    assert not Manifest.at(str(tmp_path / "a")).target.holds_moments


def test_one_pass_of_several_encoders_with_their_masks(
    captioned: str, tiny_vae: str, tiny_t5: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    fields = [(f"diffusers={tiny_vae}", "image", "latent"), (f"transformers={tiny_t5}", "caption", "t5")]
    manifest = encoded(captioned, tmp_path / "out", *fields, dtype="bfloat16", keep=["image"], drop=["temperature"])
    assert [one.name for one in manifest.fields] == ["image", "caption", "label", "latent", "t5"]
    assert torch.equal(field_of(tmp_path / "out", "image"), field_of(captioned, "image"))
    reader = SampleReader(str(tmp_path / "out"))
    found = reader.read_fields(range(50), [FieldRequest("t5"), FieldRequest("caption")])
    rows = zip(found.fields["caption"], found.masks["caption"], strict=True)
    texts = [bytes(row[mask].tolist()).decode() for row, mask in rows]
    tokens = AutoTokenizer.from_pretrained(tiny_t5)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = T5EncoderModel.from_pretrained(tiny_t5)(**tokens).last_hidden_state
    mask = found.masks["t5"]
    assert torch.equal(mask, tokens.attention_mask.bool())
    torch.testing.assert_close(found.fields["t5"][mask].float(), wanted[mask], atol=1e-2, rtol=1e-2)
    assert verify(str(tmp_path / "out")) == []


def test_other_batches_change_no_more_than_rounding(
    captioned: str, tiny_vae: str, latents: Path, tmp_path: Path
) -> None:
    encoded(captioned, tmp_path / "out", (f"diffusers={tiny_vae}", "image", "latent"), dtype="float32", batch_size=7)
    torch.testing.assert_close(field_of(tmp_path / "out", "latent"), field_of(latents, "latent"), atol=1e-6, rtol=1e-6)


def killed_at(put: int, url: str, out: Path, *fields: tuple[str, str, str]) -> None:
    """A process that encodes, and is killed as it stores its `put`-th object, half of which is written."""
    child = os.fork()
    if not child:
        store, count = PathStore.put, 0

        def dying(self: PathStore, key: str, data: bytes | Path) -> None:
            nonlocal count
            count += 1
            if count == put:
                place = Path(self.root, key).parent
                place.mkdir(parents=True, exist_ok=True)
                (place / f".part-{Path(key).name}-dead").write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            store(self, key, data)

        PathStore.put = dying  # type: ignore[method-assign]
        try:
            encoded(url, out, *fields)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("put", [4, 7])
def test_after_a_kill_the_same_command_ends_in_the_same_bytes(
    captioned: str, tiny_vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: int
) -> None:
    fields = (f"diffusers={tiny_vae}", "image", "latent")
    encoded(captioned, tmp_path / "whole", fields)
    killed_at(put, captioned, tmp_path / "killed", fields)
    assert "manifest.json" not in files_in(tmp_path / "killed")
    monkeypatch.setattr(plans, "CHUNK_BYTES", 1)  # chunks of one batch, and not of four
    encoded(captioned, tmp_path / "killed", fields)
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")


def test_a_finished_encoding_is_left_alone_and_a_lost_shard_made_again(
    captioned: str, tiny_vae: str, tmp_path: Path
) -> None:
    fields = (f"diffusers={tiny_vae}", "image", "latent")
    encoded(captioned, tmp_path / "out", fields)
    whole = files_in(tmp_path / "out")
    (tmp_path / "out/shards/000001.tar").unlink()
    encoded(captioned, tmp_path / "out", fields)
    assert files_in(tmp_path / "out") == whole
    with pytest.raises(UserError, match="holds another data set"):
        encoded(captioned, tmp_path / "out", fields, dtype="float32")


def test_an_older_start_ends_where_a_newer_one_has_taken_over(captioned: str, tiny_vae: str, tmp_path: Path) -> None:
    wanted = [EncodedField(f"diffusers={tiny_vae}", "image", "latent")]
    older = plan_encoding(captioned, str(tmp_path / "out"), wanted, EncodeOptions(device="cpu", **SIZES))

    def taken_over_after_one(plan: plans.EncodePlan, numbers: Any) -> Iterator[Any]:
        for packed in in_this_process(plan, numbers):
            yield packed
            (tmp_path / "out" / OWNER).write_text("another")

    with pytest.raises(TakenOver, match="another start of this job"):
        carry_out_encoding(older, taken_over_after_one)
    assert "shards/000001.tar" not in files_in(tmp_path / "out")
    encoded(captioned, tmp_path / "out", ("diffusers=" + tiny_vae, "image", "latent"))
    assert verify(str(tmp_path / "out")) == []


def test_a_machine_that_does_not_see_the_source_or_another_one_is_one_line(
    captioned: str, small_set: str, tiny_vae: str, tmp_path: Path
) -> None:
    shutil.copytree(captioned, tmp_path / "source")
    wanted = [EncodedField(f"diffusers={tiny_vae}", "image", "latent")]
    plan = plan_encoding(str(tmp_path / "source"), str(tmp_path / "out"), wanted, EncodeOptions(device="cpu", **SIZES))
    plan.check_visible()
    shutil.copy(Path(small_set, "manifest.json"), tmp_path / "source")
    with pytest.raises(UserError, match="source: is another data set on this machine"):
        plan.check_visible()
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(UserError, match="no data set here") as refused:
        plan.check_visible()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "to", "options", "line"),
    [
        ("image", "label", {}, r"--to label: a field of this name is there already"),
        ("image", "Latent", {}, r"--to Latent: a field's name"),
        ("picture", "latent", {}, r"--field: the data set .* has no field 'picture'"),
        ("caption", "latent", {}, r"encodes images"),
        ("image", "latent", {"dtype": "int8"}, r"--dtype int8: .*float16"),
        ("image", "latent", {"drop": ["no"]}, r"--drop: the data set .* has no field 'no'"),
        ("image", "latent", {"keep": ["label"], "drop": ["label"]}, r"--keep label, --drop label"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    captioned: str, tiny_vae: str, tmp_path: Path, field: str, to: str, options: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line) as refused:
        encoded(captioned, tmp_path / "out", (f"diffusers={tiny_vae}", field, to), **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_latents_are_not_encoded_again(latents: Path, tiny_vae: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--field latent: was made by diffusers=.* from 'image' already"):
        encoded(str(latents), tmp_path / "out", (f"diffusers={tiny_vae}", "latent", "again"))


def test_no_room_for_the_output_is_one_line_and_the_same_command_goes_on(
    captioned: str, tiny_vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, put = (f"diffusers={tiny_vae}", "image", "latent"), PathStore.put

    def full(self: PathStore, key: str, data: bytes | Path) -> None:
        if key == "shards/000002.tar":
            raise StorageError(f"{self.url(key)}: no space left on its disk")
        put(self, key, data)

    monkeypatch.setattr(PathStore, "put", full)
    with pytest.raises(StorageError, match=r"000002.tar: no space left"):
        encoded(captioned, tmp_path / "out", fields)
    monkeypatch.undo()
    encoded(captioned, tmp_path / "out", fields)
    assert verify(str(tmp_path / "out")) == []


def test_values_that_float16_does_not_hold_are_named(captioned: str, tmp_path: Path, own_package: Any) -> None:
    own_package("large", enc=LARGE)
    with pytest.raises(DataError, match=r"sample 0: field 'big': inf at \[0\].*--dtype bfloat16"):
        encoded(captioned, tmp_path / "out", ("large.enc:Large=x", "image", "big"), keep=["image"])
    out = tmp_path / "wider"
    encoded(captioned, out, ("large.enc:Large=x", "image", "big"), keep=["image"], dtype="bfloat16")
    assert np.isclose(field_of(out, "big").float()[0, 0], 1e6, rtol=1e-2)


LARGE = """
import torch
from scoreray.data.fields.field import Field
from scoreray.trainer.encoders.base import VALUES, Encoder

class Large(Encoder):
    sha256 = "0" * 64

    def __init__(self, path):
        self.module = torch.nn.Linear(1, 1)

    def output(self, field):
        return Field(field.name, "vector", [3], "float16", "", encoding=self.encoding(field))

    def encode(self, batch):
        return {VALUES: 1e6 + torch.arange(3.0).expand(len(batch), 3) + batch.float().mean((1, 2, 3))[:, None]}
"""


def test_latents_and_features_of_one_pass_train_a_run_that_aligns_to_them(
    captioned: str, tiny_vae: str, tmp_path: Path
) -> None:
    from transformers import Dinov2Config, Dinov2Model

    folder, wanted = tmp_path / "dinov2", {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(image_size=16, patch_size=4, **wanted)).save_pretrained(folder)
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))
    features = (f"transformers={folder}", "image", "features")
    encoded(captioned, tmp_path / "out", (f"diffusers={tiny_vae}", "image", "latent"), features)
    pictures = (field_of(captioned, "image").float() / 255).expand(-1, 3, -1, -1)
    with torch.no_grad():
        theirs = Dinov2Model.from_pretrained(folder)(pixel_values=(pictures - 0.5) / 0.25).last_hidden_state[:, 1:]
    torch.testing.assert_close(field_of(tmp_path / "out", "features").float(), theirs, atol=2e-3, rtol=2e-3)
    aligned = load_config(
        {
            "run": {"name": "aligned", "storage": str(tmp_path)},
            "data": {"url": str(tmp_path / "out"), "target": "latent", "global_batch_size": 16},
            "network": {"kind": "dit", "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2},
            "objective": {"kind": "edm", "alignment": {"field": "features", "layer": 1, "hidden_size": 8}},
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "duration": {"images": 48},
        }
    )
    assert train(aligned) == 48
    checkpoint = latest(run_store(aligned))
    assert checkpoint is not None
    assert checkpoint.full_state("master")["alignment.project.4.weight"].shape == (8, 8)
