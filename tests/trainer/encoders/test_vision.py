"""Feature extractors of transformers: its own states of patches and pooled vectors, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.data.errors import DataError, ScorerayError, UserError
from scoreray.data.fields.field import Field
from scoreray.trainer.encoders.base import MASK, VALUES
from scoreray.trainer.encoders.load import load_encoder

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
PROCESSOR = {"image_mean": MEAN.tolist(), "image_std": STD.tolist(), "resample": 3, "size": {"shortest_edge": 40},
             "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}  # fmt: skip
# With what comes before the patches' states.
EXTRACTORS = {"Dinov2Model": 1, "Dinov2WithRegistersModel": 3, "ViTModel": 1, "CLIPVisionModelWithProjection": 1,
              "SiglipVisionModel": 0}  # fmt: skip


def image(*shape: int) -> Field:
    return Field("image", "image", list(shape), "uint8", "png")


def saved(name: str, folder: Path, **processor: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    of_class = getattr(transformers, name)
    own = {"num_register_tokens": 2} if "Registers" in name else {"projection_dim": 6} if "CLIP" in name else {}
    model = of_class(of_class.config_class(image_size=32, patch_size=8, **SMALL, **own)).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    return model


@pytest.mark.parametrize("name", EXTRACTORS)
def test_states_of_patches_in_order_and_pooled_vectors_are_the_librarys_own(tmp_path: Path, name: str) -> None:
    theirs, before = saved(name, tmp_path), EXTRACTORS[name]
    pictures = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(pixel_values=(pictures / 255 - MEAN[:, None, None]) / STD[:, None, None])
    encoder, pooled = (load_encoder(f"transformers={tmp_path}{part}", "cpu") for part in ("", ":pooled"))
    found = encoder.encode(pictures)
    torch.testing.assert_close(found[VALUES], wanted.last_hidden_state[:, before:])
    assert found[MASK].shape == (3, 16)
    assert found[MASK].all()
    vectors = wanted.image_embeds if "image_embeds" in wanted else wanted.pooler_output
    torch.testing.assert_close(pooled.encode(pictures)[VALUES], vectors)
    of_patches, of_pictures = (one.output(image(3, 32, 32)) for one in (encoder, pooled))
    assert (of_patches.kind, of_patches.shape) == ("sequence", [16, 8])
    assert (of_pictures.kind, of_pictures.shape) == ("vector", [vectors.shape[1]])
    assert of_patches.encoding is not None
    assert (of_patches.encoding.of_kind, of_patches.encoding.of_shape) == ("image", [3, 32, 32])


def test_whole_pictures_are_resized_to_the_processors_side_or_the_given_one(tmp_path: Path) -> None:
    """As Pillow resizes them, of which the library's processors are made; grey ones are grey in every channel."""
    import numpy as np
    from PIL import Image

    theirs = saved("Dinov2Model", tmp_path)
    rows = torch.linspace(0, 6, 48)
    smooth = (127 + 100 * torch.sin(rows[:, None] + 2 * rows)).to(torch.uint8)[None]
    for part, side in (("", 32), (":16", 16)):
        resized = Image.fromarray(smooth[0].numpy()).resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).float().expand(1, 3, side, side) / 255
        with torch.no_grad():
            wanted = theirs(pixel_values=(pixels - MEAN[:, None, None]) / STD[:, None, None]).last_hidden_state[:, 1:]
        encoder = load_encoder(f"transformers={tmp_path}{part}", "cpu")
        found = encoder.encode(smooth[None])[VALUES]
        assert list(found.shape[1:]) == encoder.output(image(1, 48, 48)).shape
        torch.testing.assert_close(found, wanted, atol=0.1, rtol=0)
        assert float((found - wanted).norm() / wanted.norm()) < 0.03  # Pillow rounds to 8 bits
    wide = load_encoder(f"transformers={tmp_path}", "cpu")
    assert wide.output(image(3, 48, 72)).shape == [24, 8]
    assert wide.encode(torch.zeros(1, 3, 48, 72))[VALUES].shape == (1, 24, 8)


@pytest.mark.parametrize(
    ("part", "field", "processor", "message"),
    [
        ("", Field("caption", "text", [9], "uint8", "txt"), {}, "--field caption: .* encodes images"),
        (
            "",
            Field("image", "array", [2, 32, 32], "float32", "npy"),
            {},
            "encodes 3 or 1 channels, and the field has 2",
        ),
        ("", image(3, 32, 50), {}, "do not come to whole patches of 8 at the longer one; name another side"),
        (":30", image(3, 32, 32), {}, "pictures of 30 pixels a side are not cut into patches of 8; .* FOLDER:24"),
        ("", image(3, 32, 32), {"crop_size": 20}, "pictures of 20 pixels a side .* FOLDER:16"),
        ("", image(3, 32, 32), {"image_std": [1, 1]}, "preprocessor_config.json: can't be read as an image processor"),
        (":0", image(3, 32, 32), {}, "':0' is no part of an encoder; write FOLDER, FOLDER:pooled, or FOLDER:N"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, part: str, field: Field, processor: dict[str, Any], message: str
) -> None:
    saved("Dinov2Model", tmp_path, **processor)
    with pytest.raises(ScorerayError, match=message) as refused:
        load_encoder(f"transformers={tmp_path}{part}", "cpu").output(field)
    assert "\n" not in str(refused.value)


def test_without_its_processor_or_pooling_layer(tmp_path: Path) -> None:
    """Weights of a classifier have no pooling layer, whose vectors nobody reads."""
    import transformers

    config = transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"has no preprocessor_config.json, which says the mean, std and size"
    ) as refused:
        load_encoder(f"transformers={tmp_path}", "cpu")
    assert "\n" not in str(refused.value)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    assert load_encoder(f"transformers={tmp_path}", "cpu").output(image(3, 32, 32)).shape == [16, 8]
    with pytest.raises(DataError, match=r"weights and config.json do not fit: missing: pooler"):
        load_encoder(f"transformers={tmp_path}:pooled", "cpu")
