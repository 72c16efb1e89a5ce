"""Every kind of network can be checked, planned, searched, trained, loaded and sampled."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from own_code import own_code_forgotten
from typer.testing import CliRunner

from scoreray.cluster.cli.main import app
from scoreray.cluster.doctor.examine import examine
from scoreray.data.own_code import bring
from scoreray.sampling.model.describe import describe
from scoreray.sampling.model.export import export
from scoreray.sampling.model.load import LoadedAutoencoder, LoadedMachine, LoadedModel, load_model
from scoreray.sampling.offline.generate import Request, generate
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.networks.network import NetworkConfig
from scoreray.trainer.run_folder import run_store
from scoreray.tune.load import load_sweep

UNET = {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
MLP = {"kind": "mlp", "hidden_size": 16, "num_layers": 1}
GIBBS = {"kind": "contrastive", "chain": "gibbs", "start": "persistent", "num_steps": 1, "label_dropout": 0.0}
DIFFUSERS = {
    "kind": "diffusers",
    "class_name": "UNet2DModel",
    "schedule": {"kind": "ddpm"},
    "config": {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "num_class_embeds": 11,
    },
    "null_class": 10,
}
PRECONDITIONED = {
    "kind": "preconditioned",
    "module": "scoreray_tiny_network:make",
    "arguments": {},
    "num_classes": 10,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "unet": {"network": UNET},
    "dit": {"network": {"kind": "dit", "patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}},
    "mmdit": {"network": {"kind": "mmdit", "patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}},
    "mlp": {"network": MLP},
    "ladder": {"network": {"kind": "ladder", "num_levels": 7, "network": UNET}},
    "ladder without codes": {"network": {"kind": "ladder", "num_levels": 7, "conditioning": "none", "network": MLP}},
    "diffusers": {"network": DIFFUSERS, "denoiser": {"parameterization": "noise", "sigma_data": 1.0}},
    "preconditioned": {"network": PRECONDITIONED},
    "rbm": {"network": {"kind": "rbm", "num_hidden": 8}, "objective": GIBBS},
    "gaussian_rbm": {"network": {"kind": "gaussian_rbm", "num_hidden": 8}, "objective": GIBBS},
    "autoencoder": {
        "network": {"kind": "autoencoder", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1},
        "objective": {"kind": "autoencoding"},
    },
}


OWN_NETWORK = """
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, c_noise, class_labels):
        return self.layer(x)

make = Network
"""


@pytest.fixture(scope="module", autouse=True)
def _own_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code of somebody else's, for the kinds that need some."""
    file = tmp_path_factory.mktemp("code") / "scoreray_tiny_network.py"
    file.write_text(OWN_NETWORK)
    with own_code_forgotten():
        bring([str(file)])
        yield


def test_every_kind_of_network_is_tested() -> None:
    kinds = {config.kind for config in typing.get_args(NetworkConfig)}
    assert {section["network"]["kind"] for section in SECTIONS.values()} == kinds


@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS)
def test_a_network_is_checked_planned_searched_trained_and_sampled(
    sections: dict[str, Any], small_run: Any, small_set: str, tmp_path: Path
) -> None:
    settings = small_run("run", tmp_path / "runs", 64, **sections)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    checked = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--check"])
    assert checked.exit_code == 0, checked.output + str(checked.exception)
    config = load_config(settings)
    found = {one.topic: one for one in examine(config)}
    assert all(one.state == "good" for one in found.values()), found
    sweep = {
        "study": {"name": "study", "storage": str(tmp_path / "studies")},
        "base": {key: value for key, value in settings.items() if key != "run"},
        "space": {"optimizer.learning_rate": {"log": [1e-4, 1e-2]}},
        "metric": {"reference": small_set, "count": 16, "names": ["sw"]},
        "trials": 1,
    }
    assert load_sweep(sweep).total == 64

    assert train(config, requested=lambda: LoopRequest.STOP) == 16
    assert train(config) == 64  # goes on, so that what is restored is checked too
    run = run_store(config).url()
    model = load_model(run)
    assert describe(run).info == model.info
    assert describe(run).info.is_machine == isinstance(model, LoadedMachine)
    samples = of_model(model)
    assert samples.shape == (2, 1, 8, 8)
    assert bool(torch.isfinite(samples).all())
    export(run, str(tmp_path / "model"))
    assert torch.equal(of_model(load_model(str(tmp_path / "model"))), samples)


def of_model(model: LoadedModel) -> torch.Tensor:
    """Two samples, or what an autoencoder makes of two latents."""
    if isinstance(model, LoadedAutoencoder):
        return model.decode(torch.linspace(-1, 1, 2 * 4 * 4 * 4).view(2, 4, 4, 4))
    (samples, _), *_ = generate(model, Request(count=2, steps=3, batch_size=2))
    return samples
