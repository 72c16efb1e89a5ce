"""A small classifier trained on a reference set's own classes: features for evaluations without any file from outside.

Its distances mean something among evaluations with the same weights only, whose hash is in every record.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scoreray.data.errors import DataError
from scoreray.trainer.diffusion import noise

SEED = 0xC1A55
WIDTHS = (32, 64, 96)
NUM_FEATURES = 64


@dataclass(frozen=True)
class ClassifierConfig:
    """What is trained: part of the hash under which its weights are kept."""

    channels: int
    num_classes: int
    images: int = 40_000
    batch_size: int = 64
    learning_rate: float = 2e-3
    version: int = 1


@dataclass(frozen=True)
class TrainedClassifier:
    """extractors/classifier-<what it was trained on>.json of a cache: the hash under which the weights are kept."""

    __pydantic_config__ = ConfigDict(strict=True)

    sha256: str

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes, url: str) -> TrainedClassifier:
        """Raises DataError that names `url`."""
        try:
            return _TRAINED.validate_json(data)
        except ValidationError:
            raise DataError(f"{url}: not a trained classifier's hash; remove it, and one is trained again") from None


_TRAINED = TypeAdapter(TrainedClassifier)


class Classifier(nn.Module):
    """images uint8 [B, C, H, W] -> (features [B, 64], logits [B, num_classes]): three strided convolutions, a mean."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        widths = (config.channels, *WIDTHS)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS)
        self.features = nn.Linear(WIDTHS[-1], NUM_FEATURES)
        self.logits = nn.Linear(NUM_FEATURES, config.num_classes)
        self.accuracy: float | None = None  # on held-out images, of one that was trained

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float() / 127.5 - 1
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x)).relu()
        features = self.features(x.mean((2, 3)))
        return features, self.logits(features.relu())


def train_classifier(config: ClassifierConfig, images: Tensor, labels: Tensor) -> bytes:
    """Weights (safetensors with the config and the held-out accuracy in it) from images uint8 [N, ...] and labels [N].

    A tenth is held out. The same images and number of threads give the same bytes.
    """
    held = max(1, len(images) // 10)
    num = len(images) - held
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Classifier(config)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=1e-2)
    steps = max(1, config.images // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps + 1)
    for step in range(steps):
        positions = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
        rows = (noise.uniform(SEED, positions, dtype=torch.float64) * num).long()
        loss = cross_entropy(model(images[rows])[1], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        parts = zip(images[num:].split(256), labels[num:].split(256), strict=True)
        right = sum(int((model(x)[1].argmax(1) == y).sum()) for x, y in parts)
    about = {"classifier": json.dumps({**asdict(config), "accuracy": right / held})}
    return save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, about)


def read_classifier(name: str, data: bytes) -> Classifier:
    """The classifier in a safetensors file's bytes, with its held-out accuracy. Raises DataError when it is none."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        fields = json.loads(header["__metadata__"]["classifier"])
        accuracy = float(fields.pop("accuracy"))
        model = Classifier(ClassifierConfig(**fields))
        model.load_state_dict(load(data))
        model.accuracy = accuracy
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise DataError(f"{name}: not a classifier that was trained here: {' '.join(str(error).split())}") from None
    return model
