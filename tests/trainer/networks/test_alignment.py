"""REPA: hidden tokens drawn to features of the clean sample, beside the denoising error and nothing of it changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scoreray.data.errors import UserError
from scoreray.data.fields.field import Field
from scoreray.data.reading.manifest import Manifest
from scoreray.sampling.model.export import export
from scoreray.sampling.model.load import load
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import load_config
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.diffusion.augmentation import AugmentationConfig
from scoreray.trainer.diffusion.condition import Conditions, ConditionSpec
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.process import FlowMatching
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.networks.alignment import Alignment
from scoreray.trainer.networks.dit import DiT, DiTConfig
from scoreray.trainer.networks.mmdit import MMDiTConfig
from scoreray.trainer.objectives.base import AlignmentConfig
from scoreray.trainer.objectives.denoising import FlowMatchingObjective
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.step import TrainingModule

DIT = {"kind": "dit", "patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
ALIGNMENT = AlignmentConfig("features", layer=1, hidden_size=8)
FEATURES = Field("features", "array", [3, 2, 2], "float32", "features.npy")
SHAPE = (1, 8, 8)
SMALL = DiTConfig(4, 16, 2, 2)


def network(config: DiTConfig | MMDiTConfig = SMALL, conditions: Conditions | int = 0) -> DiT:
    torch.manual_seed(0)
    made = config.build(SHAPE, conditions)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def step(features: Field | None = FEATURES, **settings: Any) -> TrainingModule:
    denoiser = Denoiser(network(), "velocity")
    alignment = None if features is None else Alignment(ALIGNMENT, denoiser.network, SHAPE, features)
    return TrainingModule(
        denoiser, FlowMatchingObjective(), FlowMatching(), seed=1, global_batch_size=4, alignment=alignment, **settings
    )


def batch() -> tuple[torch.Tensor, None, torch.Tensor]:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)), None, torch.arange(4)


@pytest.mark.parametrize("config", [SMALL, MMDiTConfig(4, 16, 2, 2)], ids=lambda config: config.kind)
def test_the_loss_is_one_less_the_mean_cosine_of_the_kept_block_s_tokens(config: DiTConfig | MMDiTConfig) -> None:
    made = network(config, {"t5": ConditionSpec("sequence", (2, 6))})
    alignment = Alignment(replace(ALIGNMENT, weight=0.25), made, SHAPE, FEATURES)
    seen: list[torch.Tensor] = []
    made.blocks[0].register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    made(batch()[0], torch.zeros(4))
    features = torch.randn(4, 3, 2, 2)
    loss = alignment(made, features)
    a, b = alignment.project(seen[0]), features.flatten(2).transpose(1, 2)
    cosine = (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2))
    torch.testing.assert_close(loss, 0.25 * (1 - cosine.mean(1)))
    assert made.kept is None


def test_it_is_added_to_the_denoising_loss_and_changes_nothing_of_it() -> None:
    """Also where activations are computed again in the backward pass."""
    features = torch.randn(4, 3, 2, 2)
    (plain, _), aligned = step(None)(*batch()), step()
    loss, _ = aligned(*batch(), features)
    alone = loss - plain
    assert (alone > 0).all()
    loss.mean().backward()
    before = [parameter.grad for parameter in aligned.parameters()]
    assert all(grad is not None for grad in before)
    aligned.zero_grad()
    aligned.denoiser.network.config = replace(aligned.denoiser.network.config, activation_checkpointing=True)
    aligned(*batch(), features)[0].mean().backward()
    torch.testing.assert_close([parameter.grad for parameter in aligned.parameters()], before)


def test_features_on_a_grid_and_as_a_sequence_are_alike_and_are_flipped_with_the_image() -> None:
    grid = torch.randn(4, 3, 2, 2)
    torch.manual_seed(5)
    on_grid = step()
    as_tokens = step(Field("features", "sequence", [4, 3], "float32", "features.npy"))
    as_tokens.load_state_dict(on_grid.state_dict())
    expected, _ = on_grid(*batch(), grid)
    assert torch.equal(as_tokens(*batch(), grid.flatten(2).mT)[0], expected)

    always = step(augmentation=AugmentationConfig(horizontal_flip=1.0))
    always.load_state_dict(on_grid.state_dict())
    images, condition, positions = batch()
    assert torch.equal(always(images.flip(-1), condition, positions, grid.flip(-1))[0], expected)


def test_it_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    made, features = step(), torch.randn(4, 3, 2, 2)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch(), features)[0], made(*batch(), features)[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"network": {"kind": "unet"}}, "objective.alignment: network.kind 'unet' has no tokens to align; choose dit"),
        ({"objective": {"alignment": {"field": "f", "layer": 3}}}, "alignment.layer: 3; the network has 2 blocks"),
        ({"objective": {"alignment": {"field": "f", "weight": 0}}}, "objective.alignment.weight is 0.0: give"),
        ({"objective": {"alignment": {}}}, "objective.alignment.field: missing"),
    ],
)  # fmt: skip
def test_a_config_that_can_not_be_aligned_is_named(overrides: dict[str, Any], message: str) -> None:
    config = {
        "run": {"name": "a", "storage": "runs"}, "data": {"url": "x"}, "duration": {"images": 1}, "network": DIT,
        "objective": {"alignment": {"field": "f", "layer": 1}}, **overrides,
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        load_config(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def data_set(write_fields: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> str:
    g, url = np.random.default_rng(0), tmp_path_factory.mktemp("features") / "set"
    shapes = {"latent": [1, 8, 8], "features": [3, 2, 2]}
    samples = [
        {name: ("raw", g.standard_normal(shape).astype(np.float32).tobytes()) for name, shape in shapes.items()}
        for _ in range(32)
    ]
    statistics: dict[str, Any] = {"normalisation": "channel"}
    fields = [
        Field(n, "array", s, "float32", f"{n}.raw", mean=[0.0] * s[0], std=[1.0] * s[0], **statistics)
        for n, s in shapes.items()
    ]
    write_fields(url, fields, samples, samples_per_shard=16)
    return str(url)


def settings(small_run: Any, url: str, tmp_path: Path, **alignment: Any) -> dict[str, Any]:
    aligned = {"kind": "edm", "alignment": {"field": "features", "layer": 1, "hidden_size": 8, **alignment}}
    data = {"url": url, "target": "latent", "global_batch_size": 16}
    return small_run("run", tmp_path, 32, data=data, network=DIT, objective=aligned)


@pytest.mark.parametrize(
    ("alignment", "network", "message"),
    [
        ({"field": "feature"}, DIT, "objective.alignment.field: the data set has no field 'feature'; did you mean"),
        ({"field": "latent"}, DIT, "field 'latent' is modelled or conditions the network already"),
        ({}, {**DIT, "patch_size": 2}, "has 2x2 tokens, the network 4x4 = 16; encode it at another size"),
    ],
)
def test_a_field_that_can_not_be_aligned_to_is_named(
    alignment: dict[str, Any], network: dict[str, Any], message: str, small_run: Any, data_set: str, tmp_path: Path
) -> None:
    from scoreray.trainer.prepare import check_run

    with pytest.raises(UserError) as error:
        check_run(load_config({**settings(small_run, data_set, tmp_path, **alignment), "network": network}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_goes_on_with_its_projection_which_no_export_has(small_run: Any, data_set: str, tmp_path: Path) -> None:
    tensors = []
    for place, stops in (("whole", []), ("parted", [LoopRequest.STOP])):
        config = load_config(settings(small_run, data_set, tmp_path / place))
        for request in stops:
            assert train(config, requested=lambda request=request: request) == 16
        assert train(config) == 32
        checkpoint = latest(run_store(config))
        assert checkpoint is not None
        tensors.append(checkpoint.full_state("master"))
    assert any(name.startswith("alignment.project") for name in tensors[0])
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])

    export(run_store(config).url(), str(tmp_path / "model"))
    exported: nn.Module = load(str(tmp_path / "model"))
    assert not any("alignment" in name for name in exported.state_dict())


def test_a_run_without_it_reads_no_features(small_run: Any, data_set: str, tmp_path: Path) -> None:
    config = load_config({**settings(small_run, data_set, tmp_path), "objective": {"kind": "edm"}})
    fields = run_fields(config.data, Manifest.at(data_set), config.alignment)
    assert [request.field for request in fields.requests] == ["latent"]
