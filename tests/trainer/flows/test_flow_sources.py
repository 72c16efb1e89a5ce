"""Flows from one data set to another: the exact velocity transports one to the other, and runs are functions of the
position."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.pack import pack
from scoreray.data.reading.samples import SampleReader
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.generate import Request, generate
from scoreray.sampling.offline.job import begin
from scoreray.sampling.offline.place import place_of
from scoreray.sampling.offline.plan import SamplePlan
from scoreray.sampling.samplers.sample import sample
from scoreray.sampling.samplers.sigmas import karras
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.flows.sources import interpolant
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.prepare import check_run, prepare_run
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.source_data import source_batches

STD0, STD1 = 0.2, 0.3
MEANS0 = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
MEANS1 = torch.tensor([[0.0, 3.0], [1.0, -3.0]], dtype=torch.float64)


def estimate(means0: Tensor, means1: Tensor, gamma: float):
    """D of an independent coupling of two mixtures: in each pair of components all is Gaussian."""

    def denoiser(x: Tensor, sigma: Tensor | float) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))[:, None]
        variance = STD0**2 + (level * STD1) ** 2 + gamma**2 * level
        ends0, ends1 = means0.repeat_interleave(len(means1), 0), means1.repeat(len(means0), 1)
        off = x[:, None] - ends0 - level[..., None] * ends1
        weights = (-off.square().sum(2) / (2 * variance)).softmax(1)[..., None]
        gain = ((STD0**2 + gamma**2 * level / 2) / variance)[..., None]
        return (weights * (ends0 + gain * off)).sum(1)

    return denoiser


@pytest.mark.parametrize(("components", "gamma"), [("one", 0.7), ("several", 0.0), ("several", 0.7)])
def test_the_exact_velocity_takes_samples_of_one_mixture_to_the_other(components, gamma):
    means0, means1 = (MEANS0, MEANS1) if components == "several" else (MEANS0[:1], MEANS1[:1])
    g = torch.Generator().manual_seed(0)
    count, top = 1500, 200.0
    pick = torch.randint(0, len(means1), (count,), generator=g)
    x1 = means1[pick] + STD1 * torch.randn(count, 2, generator=g, dtype=torch.float64)
    z = torch.randn(count, 2, generator=g, dtype=torch.float64)
    start, _ = interpolant(torch.zeros_like(x1), x1, torch.tensor(top), gamma, z)
    drawn = sample(estimate(means0, means1, gamma), start, karras(40, 0.002, top), sampler="heun")
    distance, nearest = torch.cdist(drawn, means0).min(1)
    share = torch.bincount(nearest, minlength=len(means0)) / count
    assert (share - 1 / len(means0)).abs().max() < 0.05
    assert float(distance.square().mean() / 2) == pytest.approx(STD0**2, rel=0.1)
    assert (drawn.mean(0) - means0.mean(0)).abs().max() < 0.12


def test_what_d_estimates_is_the_velocity_of_the_interpolant():
    """x - sigma dx/dsigma at fixed ends: the estimate whose ODE (x - D) / sigma has the path's own velocity."""
    x0, x1, z = torch.randn(3, 5, 2, dtype=torch.float64).unbind()
    sigma = torch.full((5, 1), 1.7, dtype=torch.float64, requires_grad=True)
    x, target = interpolant(x0, x1, sigma, 0.6, z)
    for axis in range(2):
        (slope,) = torch.autograd.grad(x[:, axis].sum(), sigma, retain_graph=True)
        torch.testing.assert_close(x[:, axis] - (sigma * slope)[:, 0], target[:, axis])


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, g = tmp_path_factory.mktemp("flows"), np.random.default_rng(0)
    for name, count in (("a", 100), ("b", 60), ("c", 60)):
        np.savez(folder / f"{name}.npz", images=(g.standard_normal((count, 2)) + count).astype(np.float32))
        pack(str(folder / f"{name}.npz"), str(folder / name))
    return folder


def config(sets: Path, name: str, objective: str, *words: str) -> Config:
    settings = {
        "run": {"name": name, "storage": str(sets / "runs")},
        "data": {"url": str(sets / "a"), "global_batch_size": 16, "num_lanes": 4, "normalisation": "channel"},
        "process": {"kind": "flow_matching"},
        "network": {"kind": "mlp", "hidden_size": 8, "num_layers": 1},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 160},
        "checkpoint": {"every_images": 48},
        "log": {"every_images": 48},
    }
    return load_config(settings, [f"objective={objective}", *words])


OBJECTIVES = {
    "optimal pairs": "{kind: flow_matching, coupling: {kind: optimal_transport, group_size: 8}}",
    "from b": "{kind: flow_matching, source: {kind: data, url: SETS/b, gamma: 0.3}, "
    "coupling: {kind: optimal_transport, group_size: 4}}",
    "likelihood": "{kind: maximum_likelihood, solver: euler, steps: 2, adjoint: true, trace: exact}",
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_interrupted_flow_ends_bitwise_like_an_uninterrupted_one_in_any_micro_batch(sets, kind):
    objective, calls = OBJECTIVES[kind].replace("SETS", str(sets)), 0

    def stop() -> LoopRequest:
        nonlocal calls
        calls += 1
        return LoopRequest.STOP if calls == 4 else LoopRequest.NOTHING

    whole, broken = (prepare_run(config(sets, f"{kind[-1]}-{name}", objective)).config for name in ("whole", "broken"))
    assert train(whole) == 160
    assert train(broken, requested=stop) == 64
    assert train(broken) == 160
    states = [latest(run_store(c)).full_state() for c in (whole, broken)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    micro = prepare_run(config(sets, f"{kind[-1]}-micro", objective, "engine.micro_batch_size=4")).config
    train(micro)
    losses = [[record.loss for record in read_metrics(run_store(c))] for c in (whole, micro)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_source_is_read_once_an_epoch_of_its_own_and_samples_begin_from_it(sets):
    c = config(sets, "b-whole", OBJECTIVES["from b"].replace("SETS", str(sets)))
    fields = check_run(c).fields
    assert fields.source is not None
    read = [source_batches(c, fields, 0, rank, 2, torch.device("cpu")) for rank in (0, 1)]
    numbers = torch.cat([next(stream).index for _ in range(8) for stream in read if stream])  # 128 of 60 and 60 more
    for stream in read:
        stream.close()
    assert set(numbers.bincount().tolist()) <= {2, 3}
    model = load(run_store(c).url())
    records = SampleReader(str(sets / "b")).read(np.arange(60))[0]
    x1 = fields.source.fields.target.normaliser.apply(records)
    batches = list(generate(model, Request(60, steps=1, sampler="euler", source=str(sets / "b"), batch_size=32)))
    shuffled = torch.cat([batch for batch, _ in generate(model, Request(60, steps=1, sampler="euler"))])
    drawn = torch.cat([batch for batch, _ in batches])
    assert drawn.shape == x1.shape
    top = float(model.info.sigmas(1)[0])
    assert torch.corrcoef(torch.stack([model(top * x1, top)[:, 0], drawn[:, 0]]))[0, 1] > 0.99
    assert not torch.allclose(shuffled, drawn)
    with pytest.raises(UserError, match="needs the score"):
        next(iter(generate(model, Request(4, sampler="edm_sde"))))


def test_a_sample_job_does_not_go_on_from_a_source_that_was_changed(sets, tmp_path):
    c = prepare_run(config(sets, "b-job", OBJECTIVES["from b"].replace("SETS", str(sets)), "duration.images=48")).config
    train(c)
    shutil.copytree(sets / "b", tmp_path / "source")
    place, request = place_of(str(tmp_path / "out"), "webdataset"), Request(8, steps=2, source=str(tmp_path / "source"))
    job, model, _ = begin(place, run_store(c).url(), None, request)
    assert begin(place, run_store(c).url(), None, request)[0] == job
    plan = SamplePlan(job, str(tmp_path / "out"), model)
    shutil.rmtree(tmp_path / "source")
    shutil.copytree(sets / "c", tmp_path / "source")
    with pytest.raises(UserError, match="source_sha256 '"):
        begin(place, run_store(c).url(), None, request)
    with pytest.raises(DataError, match="--source: the data set was changed"):
        plan.make(0, tmp_path)


def test_another_data_set_shape_or_source_is_refused(sets, tmp_path):
    objective = OBJECTIVES["from b"].replace("SETS", str(sets))
    with pytest.raises(UserError, match="not the data set that"):
        check_run(config(sets, "b-whole", objective.replace("/b,", "/c,")))
    np.savez(tmp_path / "d.npz", images=np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32))
    pack(str(tmp_path / "d.npz"), str(tmp_path / "d"))
    with pytest.raises(UserError, match=r"objective.source: .*of shape \[3\]"):
        check_run(config(sets, "other", objective.replace(f"{sets}/b", str(tmp_path / "d"))))
