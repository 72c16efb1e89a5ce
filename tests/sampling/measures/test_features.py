"""Extractors: which is chosen, how a wrong file is refused, and how their distances order real pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from scoreray.data import fashion_mnist_path
from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.store import open_store
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.measures import distances, features
from scoreray.sampling.measures.classifier import ClassifierConfig, TrainedClassifier, read_classifier, train_classifier
from scoreray.sampling.measures.frechet import frechet
from scoreray.sampling.measures.inception import InceptionV3
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.trainer.checkpoints.checkpoint import committed
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.run_folder import run_store


@pytest.fixture(scope="module")
def fashion() -> tuple[Tensor, Tensor]:
    with np.load(fashion_mnist_path()) as file:
        return torch.from_numpy(file["images"])[:, None], torch.from_numpy(file["labels"].astype(np.int64))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("features")
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(folder / "x.npz", images=images, labels=np.arange(20) % 2)
    return pack(str(folder / "x.npz"), str(folder / "x"))


class Doubled(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, :5] * 2


def test_files_are_known_by_their_hash(manifest: Manifest, tmp_path: Path) -> None:
    """TorchScript and weights from a path; workers read the copy in the cache, and only if its hash is right."""
    cache = open_store(tmp_path / "cache")
    torch.jit.trace(Doubled(), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).save(str(tmp_path / "module.pt"))
    choice = features.choose(str(tmp_path / "module.pt"), manifest, cache)
    assert choice.kind == "torchscript"
    data = cache.get(choice.key)
    found, logits = features.build(choice, data)(torch.full((3, 1, 8, 8), 7, dtype=torch.uint8))
    assert torch.equal(found, torch.full((3, 5), 14.0))
    assert logits is None
    with pytest.raises(DataError, match="SHA-256"):
        features.build(choice, data + b"x")
    random = InceptionV3()
    weights = str(tmp_path / "inception.safetensors")
    save_file({k: v.clone() for k, v in random.state_dict().items()}, weights)
    assert features.choose(f"inception:{weights}", manifest, cache).kind == "inception"


def test_what_is_wrong_with_a_file_is_said(manifest: Manifest, tmp_path: Path) -> None:
    cache = open_store(tmp_path / "cache")

    def refused(spec: str, match: str, error: type[Exception] = UserError) -> None:
        with pytest.raises(error, match=match):
            features.choose(spec, manifest, cache)

    refused("inception:/nowhere/weights.pth", "no such file.*not downloaded for you.*6726825d")
    refused("inceptoin", "accepted: auto, classifier, identity, or a file")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    refused(str(tmp_path / "garbage.pth"), "without running code")
    torch.save({"evil": Doubled()}, tmp_path / "pickled.pth")
    refused(str(tmp_path / "pickled.pth"), "without running code")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    refused(str(tmp_path / "other.pth"), r"layer\.weight.*TorchScript")
    (tmp_path / "module.pt").write_bytes(b"garbage")
    refused(str(tmp_path / "module.pt"), "no TorchScript module")
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(2)}, tmp_path / "weights-6726825d.pth")
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(2)}, tmp_path / "cut.pth")
    refused(str(tmp_path / "cut.pth"), "not Inception-v3")
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(2)}, tmp_path / "inception-6726825d.pth")
    refused(str(tmp_path / "inception-6726825d.pth"), "its name says 6726825d: fetch it again", DataError)


def test_a_classifier_is_the_same_bytes_again(fashion: tuple[Tensor, Tensor]) -> None:
    torch.set_num_threads(1)
    images, labels = fashion
    config = ClassifierConfig(1, 10, images=640)
    first, second = (train_classifier(config, images[:400], labels[:400]) for _ in range(2))
    assert first == second
    with pytest.raises(DataError, match="x: not a classifier"):
        read_classifier("x", b"\x00" * 20)
    for damaged in (b"", b"{}", b'{"sha256": 7}'):
        with pytest.raises(DataError, match=r"x\.json: not a trained classifier's hash"):
            TrainedClassifier.from_json(damaged, "x.json")
    assert TrainedClassifier.from_json(TrainedClassifier("ab").to_json(), "x.json").sha256 == "ab"


def test_real_pictures_are_near_held_out_ones_and_far_from_noise_and_blur(fashion: tuple[Tensor, Tensor]) -> None:
    """Distances of 2,000 real pictures to 2,000 others, in the features of a classifier trained for three seconds."""
    torch.set_num_threads(1)
    images, labels = fashion
    data = train_classifier(ClassifierConfig(1, 10, images=8000), images[:6000], labels[:6000])
    network = read_classifier("x", data)
    assert network.accuracy is not None
    assert network.accuracy > 0.7

    def extracted(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(part)[0] for part in x.split(500)])

    training, held_out = images[:2000], images[8000:10_000]
    noise = torch.randint(0, 256, training.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(held_out.float(), 5, 1, 2).to(torch.uint8)
    real = extracted(training)
    others = {"held out": held_out, "blurred": blurred, "noise": noise}
    fid = {name: frechet(real, extracted(x)) for name, x in others.items()}
    assert fid["held out"] < 0.1 * fid["blurred"]
    assert fid["held out"] < 0.01 * fid["noise"]
    kid = {name: distances.kernel_distance(real[:1000], extracted(x[:1000])) for name, x in others.items()}
    assert kid["held out"] < 0.1 * kid["blurred"] < kid["noise"]


@pytest.mark.slow
def test_the_distance_falls_along_a_short_training(fashion: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, labels = fashion
    np.savez(tmp_path / "f.npz", images=images[:2000, 0].numpy(), labels=labels[:2000].numpy())
    data = str(tmp_path / "f")
    pack(str(tmp_path / "f.npz"), data, samples_per_shard=500)
    settings: dict[str, Any] = {
        "run": {"name": "short", "storage": str(tmp_path)},
        "data": {"url": data, "global_batch_size": 64},
        "network": {"kind": "unet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "patch_size": 2},
        "denoiser": {"sigma_data": 0.8},
        "optimizer": {"learning_rate": 8e-3, "warmup_images": 640},
        "ema": {"stds": [0.1]},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 3840},
        "checkpoint": {"every_images": 640, "keep": 9},
    }
    config = load_config(settings)
    train(config)
    run = run_store(config)
    values = []
    folders = committed(run)
    for folder in (folders[0], folders[2], folders[-1]):
        made = evaluate(
            EvaluationSettings(
                run.url(folder),
                data,
                ("fid", "loss"),
                out=str(tmp_path / "out"),
                count=128,
                reference_count=1000,
                steps=6,
                loss_count=128,
                classifier_images=6400,
            )
        )
        values.append([made.record.metrics[name].value for name in ("fid", "loss")])
    fids, losses = zip(*values, strict=True)
    assert len(fids) == 3
    assert fids[0] > 1.2 * fids[-1]
    assert losses[0] > losses[1] > losses[2]
