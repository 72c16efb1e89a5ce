"""What encodings are tried on: pictures with captions and classes, and a text encoder with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scoreray.data.packing.pack import pack
from scoreray.data.sources.field_options import parse_field_options

CAPTIONS = ["a red square", "blue", "", "a square a square"]


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of 50 grey pictures of 16x16 with a caption, a class and a number each, in two shards."""
    import webdataset
    from PIL import Image

    folder, out = tmp_path_factory.mktemp("captions"), tmp_path_factory.mktemp("captioned")
    pictures = np.random.default_rng(0).integers(0, 256, (50, 16, 16), dtype=np.uint8)
    pictures[::2] //= 2
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for i in range(25 * shard, 25 * shard + 25):
                about = json.dumps({"temperature": i / 7}).encode()
                sample = {"png": Image.fromarray(pictures[i]), "txt": CAPTIONS[i % 4], "cls": i % 3, "json": about}
                tar.write({"__key__": f"{i:04d}", **sample})
    fields = parse_field_options(["caption=txt", "temperature=json:temperature"], [], [], [])
    pack(folder, out / "packed", fields=fields, channels=1)
    return str(out / "packed")


def _save_tokenizer(folder: Path) -> int:
    """Of words, which ends each text with its own token; returns how many words it knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "square"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=8, **special).save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a T5 encoder of random weights, 8 wide, and its tokenizer."""
    import torch
    from transformers import T5Config, T5EncoderModel

    folder: Path = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=_save_tokenizer(folder), **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a CLIP text encoder of random weights, 8 wide, and its tokenizer."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    folder: Path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=_save_tokenizer(folder), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, eos_token_id=1, bos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    return str(folder)
