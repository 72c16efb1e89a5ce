"""Networks of EDM's preconditioning by code that the caller brings: the same estimates as by the formula of the paper.

The code is a stand-in with the signatures of NVlabs' edm and of k-diffusion.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from own_code import own_code_forgotten
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from scoreray.cluster.cli.main import app
from scoreray.data.errors import DataError, UserError
from scoreray.data.own_code import bring
from scoreray.sampling.imports.import_preconditioned import import_edm, import_k_diffusion
from scoreray.sampling.model.load import LoadedDenoiser, load
from scoreray.trainer.diffusion.process import EDM

NETWORKS = """
import torch

class TinyUNet(torch.nn.Module):
    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, width=4):
        super().__init__()
        self.first = torch.nn.Conv2d(in_channels, width, 3, padding=1)
        self.noise = torch.nn.Linear(1, width)
        self.map_label = torch.nn.Linear(label_dim, width) if label_dim else None
        self.last = torch.nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        emb = self.noise(noise_labels[:, None])
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels)
        return self.last(torch.tanh(self.first(x) + emb[:, :, None, None]))
"""
CONFIG = """
import torch
from k_diffusion.networks import TinyUNet

class TinyTransformer(torch.nn.Module):
    def __init__(self, channels, num_classes):
        super().__init__()
        self.inner, self.class_emb = TinyUNet(8, channels, channels, 4), torch.nn.Embedding(num_classes + 1, 4)

    def forward(self, x, sigma, class_cond=None):
        return self.inner(x, sigma.log() / 4, self.class_emb(class_cond))

def load_config(raw):
    return {**raw, "model": {"sigma_data": 1.0, **raw["model"]}, "dataset": {"num_classes": 0, **raw["dataset"]}}

def make_model(config):
    return TinyTransformer(config["model"]["input_channels"], config["dataset"]["num_classes"])
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the packages `tiny_edm` and `k_diffusion`, both brought."""
    folder = tmp_path_factory.mktemp("code")
    for package in ("tiny_edm", "k_diffusion"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
        (folder / package / "networks.py").write_text(NETWORKS)
    (folder / "k_diffusion" / "config.py").write_text(CONFIG)
    with own_code_forgotten():
        bring([str(folder / "tiny_edm"), str(folder / "k_diffusion")])
        yield folder


def preconditioned(x: Tensor, sigma: Tensor, f: Tensor, sigma_data: float) -> Tensor:
    """Karras 2022, eq. 7, from the network's output."""
    s = sigma.view(-1, 1, 1, 1)
    total = s**2 + sigma_data**2
    return sigma_data**2 / total * x + s * sigma_data / total.sqrt() * f


def example(sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, sigma and c_in x."""
    x, sigma = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 1.0, 20.0])
    return x, sigma, x / (sigma.view(-1, 1, 1, 1) ** 2 + sigma_data**2).sqrt()


def edm_files(tmp_path: Path) -> tuple[str, str, torch.nn.Module]:
    network = sys.modules["tiny_edm.networks"].TinyUNet(8, 3, 3, 5, width=6)
    weights, config = tmp_path / "edm.safetensors", tmp_path / "edm.json"
    save_file({f"model.{name}": tensor for name, tensor in network.state_dict().items()}, weights)
    arguments = {"img_resolution": 8, "img_channels": 3, "label_dim": 5, "model_type": "TinyUNet", "width": 6}
    config.write_text(json.dumps({**arguments, "use_fp16": False, "sigma_data": 0.5}))
    return str(weights), str(config), network


@pytest.fixture
def edm(tmp_path: Path, code: Path) -> tuple[str, str, torch.nn.Module]:
    __import__("tiny_edm.networks")
    return edm_files(tmp_path)


def test_edms_estimate_with_and_without_a_class(tmp_path: Path, edm: tuple[str, str, torch.nn.Module]) -> None:
    weights, config, network = edm
    import_edm(weights, str(tmp_path / "model"), config, "tiny_edm.networks")
    denoiser: LoadedDenoiser = load(str(tmp_path / "model"), device="cpu")
    assert denoiser.info.classes == ("0", "1", "2", "3", "4")
    x, sigma, scaled = example(0.5)
    one_hot = torch.zeros(3, 5)
    one_hot[0, 2] = one_hot[2, 0] = 1  # the second row has no class
    with torch.no_grad():
        expected = preconditioned(x, sigma, network(scaled, sigma.log() / 4, one_hot), 0.5)
    torch.testing.assert_close(denoiser(x, sigma, torch.tensor([2, -1, 0])), expected)


def test_k_diffusions_estimate_with_and_without_a_class(tmp_path: Path, code: Path) -> None:
    __import__("k_diffusion.config")
    model = {"type": "image_transformer_v2", "input_channels": 3, "input_size": [8, 8], "sigma_min": 0.01,
             "sigma_max": 80.0}  # fmt: skip
    raw = {"model": model, "dataset": {"num_classes": 5}}
    network = sys.modules["k_diffusion.config"].make_model(raw)
    save_file(network.state_dict(), tmp_path / "kd.safetensors", {"config": json.dumps(raw)})
    import_k_diffusion(str(tmp_path / "kd.safetensors"), str(tmp_path / "model"))
    denoiser = load(str(tmp_path / "model"), device="cpu")
    assert denoiser.info.config.process == EDM(0.01, 80.0)
    x, sigma, scaled = example(1.0)
    with torch.no_grad():
        expected = preconditioned(x, sigma, network(scaled, sigma, torch.tensor([2, 5, 0])), 1.0)
    torch.testing.assert_close(denoiser(x, sigma, torch.tensor([2, -1, 0])), expected)
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="has no config in its metadata; give its JSON by --config"):
        import_k_diffusion(str(tmp_path / "bare.safetensors"), str(tmp_path / "model"))


def test_the_command_names_what_sampling_needs(
    tmp_path: Path, code: Path, edm: tuple[str, str, torch.nn.Module]
) -> None:
    weights, config, _ = edm
    options = ["--config", config, "--package", "tiny_edm.networks"]
    done = CliRunner().invoke(app, ["import", "edm", weights, str(tmp_path / "model"), *options])
    assert done.exit_code == 0, done.output
    assert re.search(rf"next: scoreray sample {tmp_path / 'model'} .*--with {code}/tiny_edm .*--count 64", done.output)


@pytest.mark.parametrize(
    ("file", "arguments", "package", "message"),
    [
        ("edm.pkl", {}, "tiny_edm.networks", "edm.pkl: is a pickle, which can run code"),
        ("edm.safetensors", {"width": 5}, "tiny_edm.networks", r"of other shapes: model.first.bias \["),
        ("edm.safetensors", {"label_dim": 0}, "tiny_edm.networks", "not of this network: model.map_label.bias"),
        ("edm.safetensors", {"depth": 5}, "tiny_edm.networks", "TinyUNet refuses them: TypeError"),
        ("edm.safetensors", {"img_channels": None}, "tiny_edm.networks", "has no number img_channels"),
        ("edm.safetensors", {}, "nobodys.networks", "--with nobodys"),
        ("nowhere.safetensors", {}, "tiny_edm.networks", "no such file"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path,
    edm: tuple[str, str, torch.nn.Module],
    file: str,
    arguments: dict[str, int],
    package: str,
    message: str,
) -> None:
    config = Path(edm[1])
    config.write_text(json.dumps({**json.loads(config.read_text()), **arguments}))
    (tmp_path / "edm.pkl").touch()
    with pytest.raises((UserError, DataError), match=message) as caught:
        import_edm(str(tmp_path / file), str(tmp_path / "model"), str(config), package)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()
