"""Autoencoders of diffusers: its own latents and pictures, known by a hash, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.encoding import Encoding, drawn, linear_preview
from scoreray.data.fields.field import Field
from scoreray.trainer.encoders.base import VALUES, Autoencoder, fit_preview, without_moments
from scoreray.trainer.encoders.diffusers import CLASSES
from scoreray.trainer.encoders.load import load_autoencoder, load_encoder

IMAGE = Field("image", "image", [3, 32, 32], "uint8", "png")
KL = {
    "latent_channels": 4, "block_out_channels": (4, 8), "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "AutoencoderKL": KL,
    "AutoencoderKLFlux2": KL,
    "AsymmetricAutoencoderKL": {
        **{key: KL[key] for key in ("latent_channels", "norm_num_groups", "down_block_types", "up_block_types")},
        "down_block_out_channels": (4, 8), "up_block_out_channels": (4, 8),
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (4, 4, 4), "decoder_block_out_channels": (4, 4, 4),
        "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1),
    },
    "AutoencoderDC": {
        "latent_channels": 4, "attention_head_dim": 2, "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8), "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
        "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()),
    },
    "VQModel": {**KL, "num_vq_embeddings": 8, "vq_embed_dim": 3},
}  # fmt: skip


def saved(folder: Path, name: str) -> Any:
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, name)(**TINY[name]).eval()
    model.save_pretrained(folder)
    return model


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, *IMAGE.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CLASSES)
def test_latents_and_pictures_are_the_librarys_own(tmp_path: Path, name: str) -> None:
    theirs = saved(tmp_path / "model", name)
    ours = load_encoder(f"diffusers={tmp_path / 'model'}", "cpu")
    assert isinstance(ours, Autoencoder)
    x = pixels().float() / 127.5 - 1
    with torch.no_grad():
        encoded = theirs.encode(x)
        wanted = getattr(encoded, "latent_dist", None)
        values = torch.cat([wanted.mean, wanted.std], 1) if wanted else getattr(encoded, CLASSES[name].output)
        mean, _ = ours.moments(x)
        decoded = theirs.decode(mean).sample
    field = ours.output(IMAGE)
    torch.testing.assert_close(ours.encode(pixels())[VALUES], values)
    torch.testing.assert_close(ours.decode(mean), decoded)
    assert list(values.shape[1:]) == field.shape
    assert (ours.is_variational, field.holds_moments) == (wanted is not None,) * 2
    assert tuple(mean.shape[1:]) == tuple(without_moments(field).shape)
    assert ours.decoded_shape(mean.shape[1:]) == tuple(decoded.shape[1:]) == (3, 32, 32)
    assert field.encoding == Encoding(
        "diffusers", str(tmp_path / "model"), ours.sha256, "image", "image", [3, 32, 32], bool(wanted)
    )


def test_a_draw_from_moments_is_the_mean_and_std_times_noise(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "model", "AutoencoderKL")
    ours = load_encoder(f"diffusers={tmp_path / 'model'}", "cpu")
    with torch.no_grad():
        latents = theirs.encode(pixels().float() / 127.5 - 1).latent_dist
    z = torch.randn(latents.mean.shape)
    torch.testing.assert_close(drawn(ours.encode(pixels())[VALUES], z), latents.mean + latents.std * z)


def test_a_pipelines_vae_is_taken_and_known_by_its_weights_wherever_it_is(tmp_path: Path) -> None:
    saved(tmp_path / "pipeline" / "vae", "AutoencoderKL")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    shutil.copytree(tmp_path / "pipeline" / "vae", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.1"}))
    of_pipeline, copy = (load_encoder(f"diffusers={tmp_path / name}", "cpu") for name in ("pipeline", "copy"))
    assert of_pipeline.sha256 == copy.sha256
    assert load_encoder(f"diffusers={tmp_path / 'copy'}", "cpu") is copy  # once in a process

    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "scaling_factor": 2.0}))
    shutil.copytree(tmp_path / "copy", tmp_path / "changed")
    with pytest.raises(DataError, match=r"has changed since it encoded the data: SHA-256 [0-9a-f]{12}, not"):
        load_encoder(f"diffusers={tmp_path / 'changed'}", "cpu", of_pipeline.sha256)


def test_a_relative_path_is_recorded_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "here", "AutoencoderTiny")
    monkeypatch.chdir(tmp_path)
    assert load_encoder("diffusers=here", "cpu").path == str(tmp_path / "here")


def test_an_encoder_of_somebody_elses_is_a_class_that_was_brought(own_package: Any) -> None:
    source = """
import torch
from scoreray.data.fields.field import Field
from scoreray.trainer.encoders.base import Encoder

class Half(Encoder):
    sha256 = "0" * 64

    def __init__(self, path):
        self.module, self.size = torch.nn.Identity(), int(path)

    def output(self, field):
        return Field(field.name, "vector", [self.size], "float32", "", encoding=self.encoding(field))

    def encode(self, batch):
        return {"values": batch.float().flatten(1)[:, : self.size]}
"""
    with pytest.raises(UserError, match=r"theirs\.enc:Half"):
        load_encoder("theirs.enc:Half=3", "cpu")
    own_package("theirs", enc=source)
    encoder = load_encoder("theirs.enc:Half=3", "cpu")
    field = encoder.output(IMAGE)
    assert field.encoding is not None
    assert field.encoding.name == "theirs.enc:Half=3"
    assert encoder.encode(pixels())[VALUES].shape == (2, 3)


def test_what_can_not_be_loaded_or_encoded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "vae", "AutoencoderKL")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    shutil.copy(tmp_path / "vae" / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "diffusion_pytorch_model.bin").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    shutil.copytree(tmp_path / "vae", tmp_path / "torn")
    weights = tmp_path / "torn" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name, message in {
        "missing": f"diffusers={tmp_path / 'missing'}: no such folder",
        "empty": "has no config.json",
        "pickled": "is a pickle",
        "other": "_class_name 'UNet2DModel'.*AutoencoderKL",
        "torn": "can't be read as safetensors",
    }.items():
        with pytest.raises((UserError, DataError), match=message) as caught:
            load_encoder(f"diffusers={tmp_path / name}", "cpu")
        assert "\n" not in str(caught.value)
    for words, message in {"diffusers": "write KIND=PATH", "difusers=a": "diffusers.*package.module:Name"}.items():
        with pytest.raises(UserError, match=message):
            load_encoder(words, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device cuda: no GPU.*auto or cpu"):
        load_encoder(f"diffusers={tmp_path / 'vae'}", "cuda")
    encoder = load_encoder(f"diffusers={tmp_path / 'vae'}", "cpu")
    assert isinstance(encoder, Autoencoder)
    latent = encoder.output(IMAGE)
    for field, message in [
        (Field("image", "image", [1, 32, 32], "uint8", "png"), "encodes 3 channels, and the field has 1"),
        (Field("image", "image", [3, 32, 33], "uint8", "png"), "multiples of 2, and the field's samples are 32x33"),
        (Field("a", "array", [3, 8, 8], "float32", "npy", low=[0.0] * 3, high=[9.0] * 3), r"values in \[-1, 1\]"),
        (Field("caption", "text", [9], "uint8", "txt"), "the field is text"),
        (latent, "was made by diffusers=.* from 'image' already"),
    ]:
        with pytest.raises(UserError, match=message):
            encoder.output(field)
    with pytest.raises(UserError, match=r"decodes latents of 4 channels, .* these are \[3, 8, 8\]"):
        encoder.decoded_shape([3, 8, 8])


def test_a_missing_library_is_one_line_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, kind, None)
        with pytest.raises(UserError, match=f"{kind}=.*: needs {kind}, which is not installed: pip install 'diffusers"):
            load_encoder(f"{kind}={tmp_path}", "cpu")


def test_a_text_encoder_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoreray.trainer.encoders import load

    class OfText:
        sha256 = "0" * 64

    monkeypatch.setattr(load, "load_encoder", lambda *_: OfText())
    with pytest.raises(UserError, match="transformers=a: can't be decoded: it is an encoder of text alone"):
        load_autoencoder(Encoding("transformers", "a", "0" * 64, "caption", "text", [9]))


def test_a_preview_is_the_linear_map_that_made_the_pictures() -> None:
    z = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    preview = [[0.5, -0.25, 0.1, 0.2], [0.1, 0.3, -0.2, -0.5]]
    pictures = linear_preview(preview, z).repeat_interleave(2, 2).repeat_interleave(2, 3)
    fitted = torch.tensor(fit_preview(z, pictures))
    assert torch.allclose(fitted, torch.tensor(preview), atol=1e-4)
