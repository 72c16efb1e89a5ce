"""Graphs of the denoiser for inference elsewhere: what they give is what the denoiser gives, at any number of rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.cluster.verbs.export import ExportOptions, export_model
from scoreray.data.errors import UserError
from scoreray.sampling.formats import graphs
from scoreray.sampling.formats.graphs import graph_inputs
from scoreray.sampling.model.load import load
from scoreray.trainer.checkpoints.exported import ModelManifest
from scoreray.trainer.diffusion.condition import Condition, ConditionSpec

NewRun = Callable[..., str]
CONDITIONS = {
    "label": ConditionSpec("class", classes=("circle", "square")),
    "place": ConditionSpec("vector", (2,)),
}
MLP = {"kind": "mlp", "hidden_size": 8, "num_layers": 1}


def exported(run: str, out: Path, format: str) -> Any:
    return export_model(run, str(out), ["0.05"], ExportOptions(format))


def test_onnx_runs_elsewhere_at_any_number_of_rows(new_run: NewRun, tmp_path: Path) -> None:
    import onnxruntime

    run = new_run(str(tmp_path / "run"), shape=(2,), classes=0, conditions=CONDITIONS, network=MLP)
    answer = exported(run, tmp_path / "out", "onnx")
    (graph,) = answer.graphs
    assert graph.difference < 1e-5
    assert f"{graph.file}: within {graph.difference:.1e} of what the model gives, by onnxruntime" in answer.text()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "ema-0.050.onnx")
    wanted = ["x", "sigma", "condition_label", "condition_place", "mask_place"]
    assert [one.name for one in session.get_inputs()] == wanted
    denoiser = load(run)
    inputs = graph_inputs(denoiser, 5)
    inputs["mask_place"][2:] = False  # the null in its place
    inputs["condition_label"][3:] = -1
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    values = {name: inputs[f"condition_{name}"] for name in CONDITIONS}
    ours = denoiser(inputs["x"], inputs["sigma"], Condition(values, {"place": inputs["mask_place"]}))
    assert (torch.from_numpy(found) - ours).abs().max() < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f'"{name}": {name}' in card for name in wanted)
    page = ModelManifest.from_json((tmp_path / "out" / "denoiser.json").read_bytes(), "denoiser.json")
    assert page.files["0.050"].file == "ema-0.050.onnx"


def test_torch_export_gives_the_same_bits(new_run: NewRun, tmp_path: Path) -> None:
    for kind, classes in (("none", 0), ("classes", 3)):
        run = new_run(str(tmp_path / kind), shape=(2,), classes=classes, network=MLP)
        assert exported(run, tmp_path / f"{kind}-out", "torch-export").graphs[0].difference == 0
        module = torch.export.load(tmp_path / f"{kind}-out" / "ema-0.050.pt2").module()
        x, sigma, labels = torch.randn(4, 2), torch.full((4,), 0.5), torch.tensor([0, 1, 2, -1])
        given = ({"condition_label": labels},) if classes else ()
        assert torch.equal(module(x, sigma, *given), load(run)(x, sigma, labels if classes else None))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"denoiser": {"parameterization": "energy_dot"}},
            "'energy_dot' differentiates an energy in every call, which",
        ),
        ({"network": {"kind": "rbm", "num_hidden": 4}}, "nothing to export as torch-export: network.kind 'rbm' knows"),
    ],
)
def test_what_can_be_no_graph_is_one_line(
    new_run: NewRun, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    objective = {"objective": {"kind": "contrastive", "chain": "gibbs"}} if "network" in sections else {}
    run = new_run(str(tmp_path / "run"), shape=(1, 2, 2), classes=0, sections=sections | objective)
    with pytest.raises(UserError, match=message):
        exported(run, tmp_path / "out", "torch-export")
    assert not list((tmp_path / "out").rglob("*"))


def test_a_graph_that_gives_something_else_is_not_stored(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(str(tmp_path / "run"), shape=(2,), classes=0, network=MLP)
    monkeypatch.setattr(graphs, "_saved", lambda *given: (lambda inputs: inputs["x"], "nothing"))
    with pytest.raises(UserError, match="away from what the model gives"):
        exported(run, tmp_path / "out", "onnx")
    monkeypatch.setattr(graphs, "_saved", lambda *given: (lambda inputs: inputs["x"] * torch.nan, ""))
    with pytest.raises(UserError, match="nan away"):
        exported(run, tmp_path / "out", "onnx")


def test_a_missing_package_is_one_line_that_names_what_to_install(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(str(tmp_path / "run"), shape=(2,), classes=0, network=MLP)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"^--format onnx: needs onnx\w*, which is not installed: pip install 'onnx>="):
        exported(run, tmp_path / "out", "onnx")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match=r"^hf://me/digits: needs huggingface_hub, which is not installed: pip install 'hugg"
    ):
        export_model(run, "hf://me/digits")


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, width: int = 4):
        super().__init__()
        self.first, self.last = nn.Linear(shape[0] + 1, width), nn.Linear(width, shape[0])

    def forward(self, x, c_noise, condition=None):
        label = condition.values["label"][:, None].to(x.dtype)
        return self.last(self.first(torch.cat([x, c_noise[:, None]], 1)).tanh() * label)

class Counts(Net):
    def forward(self, x, c_noise, condition=None):
        return super().forward(x.view(len(x), -1), c_noise, condition)

class Looks(Net):
    def forward(self, x, c_noise, condition=None):
        return super().forward(x if x.sum().item() > 0 else -x, c_noise, condition)
"""


def test_somebody_elses_network_is_a_graph_of_any_number_of_rows_or_of_one(
    new_run: NewRun, own_package: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own_package("theirs", net=OWN)
    run = {
        name: new_run(str(tmp_path / name), shape=(2,), classes=3, network={"kind": f"theirs.net:{name}"})
        for name in ("Net", "Counts", "Looks")
    }
    assert exported(run["Net"], tmp_path / "any", "torch-export").graphs[0].difference == 0
    reason = r"its code makes a number of the batch, .* specialized it .*: use x.shape\[0\] .*: --rows 16$"
    with pytest.raises(UserError, match=f"'theirs.net:Counts' can't be exported as torch-export: {reason}"):
        exported(run["Counts"], tmp_path / "counts", "torch-export")
    with pytest.raises(UserError, match=r"theirs.net:Looks' can't be .* data-dependent expression"):
        exported(run["Looks"], tmp_path / "looks", "torch-export")
    fixed = export_model(run["Counts"], str(tmp_path / "4"), ["0.05"], ExportOptions("torch-export", rows=4))
    assert fixed.graphs[0].difference == 0
    assert "def forward" not in "".join(capfd.readouterr())
    with pytest.raises(UserError, match="--rows 4: is of graphs"):
        ExportOptions("diffusers", rows=4)
