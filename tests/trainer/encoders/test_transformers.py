"""Text encoders of transformers: its own states, masks and pooled vectors, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.data.fields.field import Field
from scoreray.trainer.encoders.base import MASK, VALUES
from scoreray.trainer.encoders.load import load_encoder

CAPTION = Field("caption", "text", [100], "uint8", "txt")
TEXTS = ["a red square", "blue", ""]


def tokenizer() -> Any:
    """Of words, which ends each text with its own token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "square"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


def model(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if name == "T5EncoderModel":
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 7}
        return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    config = transformers.CLIPTextConfig(
        vocab_size=7, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=6, eos_token_id=1, bos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize("name", ["T5EncoderModel", "CLIPTextModel", "CLIPTextModelWithProjection"])
@pytest.mark.parametrize("in_pipeline", [False, True])
def test_states_masks_and_pooled_vectors_are_the_librarys_own(tmp_path: Path, name: str, in_pipeline: bool) -> None:
    theirs, words = model(name), tokenizer()
    theirs.save_pretrained(tmp_path / "text_encoder")
    words.save_pretrained(tmp_path / ("tokenizer" if in_pipeline else "text_encoder"))
    if in_pipeline:
        (tmp_path / "model_index.json").write_text("{}")
    path = f"transformers={tmp_path if in_pipeline else tmp_path / 'text_encoder'}"
    tokens = words(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = theirs(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    encoder = load_encoder(path, "cpu")
    found = encoder.encode(TEXTS)
    torch.testing.assert_close(found[VALUES], wanted.last_hidden_state)
    assert found[MASK].tolist() == [[True] * 4, [True] * 2 + [False] * 2, [True] + [False] * 3]
    field = encoder.output(CAPTION)
    assert (field.kind, field.shape) == ("sequence", [8, 8])
    assert field.encoding is not None
    assert (field.encoding.of, field.encoding.of_kind, field.encoding.of_shape) == ("caption", "text", [100])
    if name == "T5EncoderModel":
        with pytest.raises(UserError, match="T5EncoderModel has no pooled output"):
            load_encoder(f"{path}:pooled", "cpu")
        return
    pooled = load_encoder(f"{path}:pooled", "cpu")
    vectors = wanted.text_embeds if name.endswith("Projection") else wanted.pooler_output
    torch.testing.assert_close(pooled.encode(TEXTS)[VALUES], vectors)
    assert (pooled.output(CAPTION).kind, pooled.output(CAPTION).shape) == ("vector", [vectors.shape[1]])
    assert pooled.sha256 == encoder.sha256


def test_long_texts_are_cut_to_the_longest_and_the_states_of_a_text_are_its_own(tmp_path: Path) -> None:
    theirs, words = model("T5EncoderModel"), tokenizer()
    theirs.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    encoder = load_encoder(f"transformers={tmp_path}", "cpu")
    long = "red " * 250_000
    assert encoder.encode([long])[VALUES].shape == (1, 8, 8)
    shorter = load_encoder(f"transformers={tmp_path}:3", "cpu")
    assert shorter.encode([long])[VALUES].shape == (1, 3, 8)
    assert shorter.output(CAPTION).shape == [3, 8]
    alone, beside = encoder.encode(["blue"])[VALUES], encoder.encode(["blue", long])[VALUES][:1, :2]
    assert torch.allclose(alone, beside, atol=1e-6)


def test_what_can_not_be_loaded_or_encoded_is_one_line(tmp_path: Path) -> None:
    model("T5EncoderModel").save_pretrained(tmp_path / "alone")
    with pytest.raises(UserError, match="has no tokenizer"):
        load_encoder(f"transformers={tmp_path / 'alone'}", "cpu")
    tokenizer().save_pretrained(tmp_path / "alone")
    encoder = load_encoder(f"transformers={tmp_path / 'alone'}", "cpu")
    with pytest.raises(UserError, match="encodes text; the field is image"):
        encoder.output(Field("image", "image", [3, 8, 8], "uint8", "png"))
    with pytest.raises(UserError, match="the encoder takes 8 tokens at most"):
        load_encoder(f"transformers={tmp_path / 'alone'}:500", "cpu").output(CAPTION)
    for part in ("0", "-1", "pool", ""):
        with pytest.raises(UserError, match=f"':{part}' is no part of an encoder; write FOLDER, FOLDER:pooled, or"):
            load_encoder(f"transformers={tmp_path / 'alone'}:{part}", "cpu")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bertt"}))
    with pytest.raises(UserError, match="model_type 'bertt'"):
        load_encoder(f"transformers={tmp_path / 'other'}", "cpu")
