"""Feature extractors: the network whose features are compared, known by the hash of its weights.

    auto          classifier where the reference has classes, identity for samples of few values
    classifier    a small network trained on the reference's classes, kept in the cache by hash
    identity      the values themselves, for points and closed forms
    FILE          Inception-v3's weights (.pth, .safetensors), a classifier from here (.safetensors), or any TorchScript
                  module (.pt, .ts) that maps uint8 [B, C, H, W] to features [B, d] or (features, logits)
    module:Name   a function or a class of somebody else's (`own_code`): samples [B, ...] to features [B, d]

A weights-only .pth is read without running code. TorchScript is a program: it runs, so it is only taken from a path
that the person gave, and only after its hash is found to be the plan's.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoreray.data.errors import DataError, UserError
from scoreray.data.own_code import code_hash, instance, is_own, line_of
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.sampling.measures import classifier, frechet, inception

IDENTITY_VALUES = 64  # samples of no more values have themselves for features, unless another extractor is given
WORDS = ("auto", "classifier", "identity")
SUFFIXES = (".pth", ".safetensors", ".pt", ".ts")

Extract = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class ExtractorChoice:
    """Which extractor: its kind, and where it has weights, their SHA-256 and place in the cache. Of somebody else's the
    kind is its name and the SHA-256 that of its code."""

    kind: str
    sha256: str = ""
    file: str = ""

    @property
    def key(self) -> str:
        return f"extractors/{self.sha256}{Path(self.file).suffix}"


def choose(spec: str, manifest: Manifest, cache: Store | None) -> ExtractorChoice:
    """The extractor that a person means; a file is copied to the cache (if any), where every worker finds it.

    For a classifier that is still to be trained `sha256` is empty. Raises UserError (no such file, word or classes).
    """
    if spec == "identity" or (spec == "auto" and math.prod(manifest.shape) <= IDENTITY_VALUES):
        return ExtractorChoice("identity")
    if is_own(spec):
        instance(spec, "--extractor")
        return ExtractorChoice(spec, code_hash(spec))
    if spec in ("auto", "classifier"):
        _check_labels(spec, manifest)
        return ExtractorChoice("classifier")
    if len(manifest.shape) != 3:
        raise UserError(f"--extractor {spec}: takes images, the reference has samples of shape {list(manifest.shape)}")
    return _choose_file(spec, cache)


def _check_labels(spec: str, manifest: Manifest) -> None:
    """Raises UserError where a classifier would learn nothing: one class has the same features for everything."""
    labelled, classes = sum(manifest.class_counts), manifest.classes_with_images
    if len(manifest.shape) != 3 or classes < 2 or labelled < frechet.FEWEST:
        raise UserError(
            f"--extractor {spec}: the reference '{manifest.name}' ({list(manifest.shape)}) has {labelled:,} labelled "
            f"images, in {classes} of its {len(manifest.classes)} classes; a classifier learns from {frechet.FEWEST} "
            "or more, of two classes or more: give --extractor FILE, or identity"
        )


def _choose_file(spec: str, cache: Store | None) -> ExtractorChoice:
    path = spec.removeprefix("inception:")
    accepted = f"accepted: {', '.join(WORDS)}, or a file that ends in {', '.join(SUFFIXES)}"
    if Path(path).suffix not in SUFFIXES:
        raise UserError(f"--extractor '{spec}': {accepted}")
    folder, _, name = path.rpartition("/")
    try:
        data = open_store(folder or ".").get(name)
    except NotFound:
        more = ""
        if spec.startswith("inception:") or "inception" in name:
            more = (
                "; Inception-v3's weights are not downloaded for you: fetch weights-inception-2015-12-05-6726825d.pth "
                "of torch-fidelity's release v0.2.0 once, and give its path"
            )
        raise UserError(f"--extractor {spec}: there is no such file{more}") from None
    choice = ExtractorChoice(_kind(path, data), hashlib.sha256(data).hexdigest(), name)
    if spec.startswith("inception:") and choice.kind != "inception":
        raise UserError(f"--extractor {spec}: holds no weights of Inception-v3, it is a {choice.kind} file")
    if (
        choice.kind == "inception"
        and inception.SHA256_START in name
        and not choice.sha256.startswith(inception.SHA256_START)
    ):
        raise DataError(
            f"{path}: its SHA-256 begins {choice.sha256[:8]}, its name says {inception.SHA256_START}: fetch it again"
        )
    build(choice, data)  # finds out now, not on every worker
    if cache is not None and not cache.exists(choice.key):
        cache.put(choice.key, data)
    return choice


def _kind(path: str, data: bytes) -> str:
    if path.endswith((".pt", ".ts")):
        return "torchscript"
    names = _state(path, data).keys()
    if "Conv2d_1a_3x3.conv.weight" in names:
        return "inception"
    if "logits.weight" in names and "features.weight" in names:
        return "classifier"
    raise UserError(
        f"--extractor {path}: weights of {', '.join(sorted(names)[:3])}, ...: neither Inception-v3's nor a "
        "classifier's from here; save another network as TorchScript (.pt)"
    )


def _state(path: str, data: bytes) -> dict[str, Any]:
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load

            return load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--extractor {path}: no file of weights that can be read without running code: {reason}"
        ) from None


def build(choice: ExtractorChoice, data: bytes, device: str = "cpu") -> Extract:
    """The extractor of a choice from its weights' bytes: uint8 images (or floats) -> (features [B, d], logits or None).

    Raises DataError when the bytes are not the chosen ones, UserError when they do not make a network.
    """
    if choice.kind == "identity":
        return _identity
    if is_own(choice.kind):
        own = instance(choice.kind, "--extractor")
        own = own.eval().requires_grad_(False).to(device) if isinstance(own, nn.Module) else own
        return _checked(own, choice.kind)
    if hashlib.sha256(data).hexdigest() != choice.sha256:
        raise DataError(f"{choice.file}: its bytes are not those that were chosen (SHA-256)")
    if choice.kind == "torchscript":
        return _torchscript(choice, data, device)
    network: nn.Module
    if choice.kind == "classifier":
        network = classifier.read_classifier(choice.file, data)
    else:
        network = inception.InceptionV3()
        try:
            state = _state(choice.file, data)
            network.load_state_dict(state, strict=False)
            missing = [name for name in network.state_dict() if name not in state and "num_batches" not in name]
            if missing:
                raise RuntimeError(f"{missing[0]} is missing")
        except RuntimeError as error:
            raise UserError(
                f"--extractor {choice.file}: not Inception-v3: {' '.join(str(error).split())[:200]}"
            ) from None
    return network.eval().requires_grad_(False).to(device)


def _torchscript(choice: ExtractorChoice, data: bytes, device: str) -> Extract:
    try:
        module = torch.jit.load(io.BytesIO(data), map_location=device).eval()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--extractor {choice.file}: no TorchScript module: {reason}") from None
    return _checked(module, choice.file)


def _checked(function: Callable[[Tensor], Any], name: str) -> Extract:
    """A program of somebody else's, whose features are looked at before they are used."""

    def extract(images: Tensor) -> tuple[Tensor, Tensor | None]:
        try:
            found = function(images)
        except Exception as error:
            raise UserError(f"--extractor {name}: failed on {list(images.shape)}: {line_of(error)}") from error
        features, logits = found if isinstance(found, tuple) else (found, None)
        if features.ndim != 2 or len(features) != len(images):
            raise UserError(
                f"--extractor {name}: gave {list(features.shape)} for {len(images)} images; [B, d] is needed"
            )
        return features, logits

    return extract


def _identity(images: Tensor) -> tuple[Tensor, Tensor | None]:
    if images.dtype == torch.uint8:
        images = images.float() / 127.5 - 1
    return images.flatten(1).float(), None
