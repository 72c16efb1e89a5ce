"""Text encoders of the transformers library with their tokenizers: CLIP's and T5's, to tokens or to one vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import DataError, UserError, nearest, shortened
from scoreray.data.extras import install
from scoreray.data.fields.field import Field
from scoreray.trainer.encoders.base import MASK, VALUES, Encoder
from scoreray.trainer.encoders.files import absolute, digest, local_folder
from scoreray.trainer.networks.pretrained_folder import load_pretrained, read_json

CLASSES = {
    "clip_text_model": "CLIPTextModel",
    "clip": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""By model_type of config.json, but for those that config.json names itself (ARCHITECTURES)."""
ARCHITECTURES = ("CLIPTextModelWithProjection",)
POOLED = "pooled"
LONGEST = 512  # tokens, of a tokenizer that sets no limit (T5's)
CHARACTERS = 100  # of a token, at most: what is beyond is cut before it is tokenized
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model")


class TransformersEncoder(Encoder):
    """Texts to a sequence of tokens' last hidden states [L, D] with a mask, or, `FOLDER:pooled`, to a vector [D].
    `FOLDER:128`: at most so many tokens; longer texts are cut, as the tokenizer does it."""

    kind = "transformers"

    def __init__(self, path: str) -> None:
        """Raises UserError (no such folder or class, no tokenizer, a pickle, transformers is missing), DataError."""
        try:
            import transformers
        except ImportError:
            raise UserError(f"{self.kind}={path}: needs transformers: {install('diffusers')}") from None
        place, self.is_pooled, length = _options(path)
        self.path = absolute(place) + path.removeprefix(place)
        with local_folder(place, f"{self.kind}=") as root:
            folder, words = _folders(root)
            config = read_json(folder / "config.json")
            name = _class_name(config, self.name)
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
                "transformers", getattr(transformers, name), folder, "model", whole=False, dtype=torch.float32
            )
        self.module = loaded.requires_grad_(False).eval()
        self.length = min(length or LONGEST, self.tokenizer.model_max_length)
        if self.is_pooled and not name.startswith("CLIP"):
            raise UserError(f"{self.name}: {name} has no pooled output; leave out ':{POOLED}'")
        self.width = self._width(name)

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


def _options(path: str) -> tuple[str, bool, int | None]:
    """FOLDER, whether it is pooled, and tokens at most, of FOLDER[:pooled|:N]."""
    place, _, option = path.rpartition(":")
    if place and option == POOLED:
        return place, True, None
    if place and option.isdecimal() and int(option) > 0:
        return place, False, int(option)
    return path, False, None


def _folders(root: Path) -> tuple[Path, Path]:
    """Of the encoder and of its tokenizer: of a pipeline text_encoder/ and tokenizer/; of one of a pipeline's folders,
    text_encoder_2/, the tokenizer_2/ beside it."""
    if (root / "model_index.json").is_file():
        root = root / "text_encoder"
    beside = root.parent / root.name.replace("text_encoder", "tokenizer")
    return root, beside if root.name.startswith("text_encoder") and beside.is_dir() else root


def _class_name(config: dict[str, Any], name: str) -> str:
    named = [one for one in config.get("architectures") or () if one in ARCHITECTURES]
    kind = str(config.get("model_type"))
    if not named and kind not in CLASSES:
        known = f"model_type '{shortened(kind)}': {nearest(kind, CLASSES)}" if config else "has no config.json"
        raise UserError(f"{name}: {known}")
    return named[0] if named else CLASSES[kind]
