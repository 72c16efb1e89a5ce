"""Encoders of the transformers library: of texts CLIP's and T5's, with their tokenizers; of pictures `vision.py`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import DataError, UserError, nearest, shortened
from scoreray.data.extras import check_installed
from scoreray.data.fields.field import Field
from scoreray.data.units import whole_number
from scoreray.trainer.encoders.base import MASK, VALUES, Encoder
from scoreray.trainer.encoders.files import absolute, digest, local_folder
from scoreray.trainer.encoders.vision import CLASSES as VISION_CLASSES
from scoreray.trainer.encoders.vision import VisionEncoder
from scoreray.trainer.networks.pretrained_folder import load_pretrained, read_json

CLASSES = {
    "clip_text_model": "CLIPTextModel",
    "clip": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""By model_type of config.json, but for those that config.json names itself (ARCHITECTURES)."""
ARCHITECTURES = ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection")
POOLED = "pooled"
LONGEST = 512  # tokens, of a tokenizer that sets no limit (T5's)
CHARACTERS = 100  # of a token, at most: what is beyond is cut before it is tokenized
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model")


def transformers_encoder(path: str) -> Encoder:
    """A text encoder, or a feature extractor of pictures, of FOLDER, FOLDER:pooled or FOLDER:N: by its config.json.
    Raises UserError (no such folder, class or part, a pickle, transformers is missing), DataError."""
    check_installed("diffusers", f"transformers={path}", "transformers")
    place, part = _parts(path)
    named, number = absolute(place) + path.removeprefix(place), whole_number(part)
    with local_folder(place, "transformers=") as root:
        folder, words = _folders(root)
        class_name = _class_name(read_json(folder / "config.json"), f"transformers={named}")
        if "Text" in class_name or class_name in CLASSES.values():
            return TextEncoder(named, folder, words, class_name, pooled=part == POOLED, length=number)
        return VisionEncoder(named, folder, class_name, pooled=part == POOLED, side=number)


class TextEncoder(Encoder):
    """Texts to a sequence of tokens' last hidden states [L, D] with a mask, or to the pooled vector [D].

    length: tokens of a text at most; longer texts are cut, as the tokenizer does it. None: what the tokenizer says.
    """

    kind = "transformers"

    def __init__(self, path: str, folder: Path, words: Path, class_name: str, *, pooled: bool, length: int | None):
        """words: the folder of the tokenizer. Raises UserError (no tokenizer, no pooled output), DataError."""
        import transformers

        self.path, self.is_pooled, self._given_length = path, pooled, length
        if pooled and not class_name.startswith("CLIP"):
            raise UserError(f"{self.name}: {class_name} has no pooled output; leave out ':{POOLED}'")
        files = [words / file for file in TOKENIZER_FILES if (words / file).is_file()]
        if not files:
            raise UserError(f"{self.name}: has no tokenizer ({TOKENIZER_FILES[0]}) in or beside the encoder's "
                            "folder; save the tokenizer there with its save_pretrained")  # fmt: skip
        self.sha256 = digest(folder, files)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(words), local_files_only=True)
        except Exception as error:  # of the library's readers: OSError, ValueError, KeyError, ...
            raise DataError(f"{words}: no tokenizer that transformers can load: "
                            f"{shortened(' '.join(str(error).split()), 300)}") from None  # fmt: skip
        loaded = load_pretrained(
            "transformers", getattr(transformers, class_name), folder, "model", whole=False, dtype=torch.float32
        )
        self.module = loaded.requires_grad_(False).eval()
        self.length = min(length or LONGEST, self.tokenizer.model_max_length)
        self.width = self._width(class_name)

    def _width(self, name: str) -> int:
        config: Any = self.module.config
        config = getattr(config, "text_config", config)
        if self.is_pooled and name == "CLIPTextModelWithProjection":
            return config.projection_dim
        return config.d_model if hasattr(config, "d_model") else config.hidden_size

    def output(self, field: Field) -> Field:
        self.refuse_encoded(field)
        if field.kind != "text":
            raise UserError(f"--field {field.name}: {self.name} encodes text; the field is {field.kind} {field.shape}")
        if (self._given_length or 0) > self.tokenizer.model_max_length:
            raise UserError(f"{self.name}: the encoder takes {self.tokenizer.model_max_length} tokens at most")
        kind, shape = ("vector", [self.width]) if self.is_pooled else ("sequence", [self.length, self.width])
        return Field(field.name, kind, shape, "float16", "", encoding=self.encoding(field))  # type: ignore[arg-type]

    @torch.no_grad()
    def encode(self, batch: Sequence[str]) -> dict[str, Tensor]:
        """Padded to the longest of these texts; a text's states do not depend on the others."""
        texts = [text[: self.length * CHARACTERS] for text in batch]
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)  # fmt: skip
        found = self.module(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        if self.is_pooled:
            pooled = found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output
            return {VALUES: pooled.float()}
        return {VALUES: found.last_hidden_state.float(), MASK: tokens.attention_mask.bool()}


def _parts(path: str) -> tuple[str, str]:
    """FOLDER and "pooled", a number above 0, or "", of FOLDER[:pooled|:N]. Raises UserError for another part."""
    place, _, part = path.rpartition(":")
    if not place or "/" in part or os.path.isdir(path):  # a URL's own colon, or that of a folder's name
        return path, ""
    if part != POOLED and not whole_number(part):
        raise UserError(
            f"transformers={path}: ':{part}' is no part of an encoder; write FOLDER, FOLDER:{POOLED}, or FOLDER:N with "
            "N from 1 (tokens of a text at most, or pixels of a picture's shorter side)"
        )
    return place, part


def _folders(root: Path) -> tuple[Path, Path]:
    """Of the encoder and of its tokenizer: of a pipeline text_encoder/ and tokenizer/; of one of a pipeline's folders,
    text_encoder_2/, the tokenizer_2/ beside it."""
    if (root / "model_index.json").is_file():
        root = root / "text_encoder"
    beside = root.parent / root.name.replace("text_encoder", "tokenizer")
    return root, beside if root.name.startswith("text_encoder") and beside.is_dir() else root


def _class_name(config: dict[str, Any], name: str) -> str:
    named = [one for one in config.get("architectures") or () if one in ARCHITECTURES]
    kind, classes = str(config.get("model_type")), CLASSES | VISION_CLASSES
    if not named and kind not in classes:
        known = f"model_type '{shortened(kind)}': {nearest(kind, classes)}" if config else "has no config.json"
        raise UserError(f"{name}: {known}")
    return named[0] if named else classes[kind]
