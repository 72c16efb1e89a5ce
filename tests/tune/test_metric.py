"""The metric orders models as their true score error does; the training loss does not."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.data.packing.pack import pack
from scoreray.data.reading.samples import spread
from scoreray.data.sources.field_options import parse_field_options
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.measures import held_out as held_out_measures
from scoreray.sampling.measures.held_out import denoising_errors, edm_weighted, held_out_likelihood
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.model.load import load
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion.targets import ring
from scoreray.trainer.loop import train
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store
from scoreray.tune.load import check_sweep, load_sweep
from scoreray.tune.metric import check_finite, held_out, levels_of, measure, spread_of
from scoreray.tune.schedule import best_of
from scoreray.tune.search import drawn, searcher, values
from scoreray.tune.sweep import MetricSection, StudyPlan
from scoreray.tune.trial import Trial, advance, trial_config

WEIGHTINGS = ("edm", "sigma2", "min_snr", "constant")
QUALITY = ("denoising", "bpd", "fid", "kid", "sw", "nfe")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small networks gain nothing by a second thread; on a busy machine its waiting took 30 times the CPU time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Exact(torch.nn.Module):
    """The ring's own denoiser, with a parameter, as trained models have."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.model = torch.nn.Linear(1, 1), ring()
        self.info: Any = SimpleNamespace(classes=(), conditions={}, target=None, encoding=None)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: Any = None) -> torch.Tensor:
        return self.model(x, sigma, labels)


@pytest.mark.slow
def test_the_metric_ranks_weightings_as_the_true_score_error_does_and_the_training_loss_does_not(
    sweep: dict[str, Any], points: dict[str, str], tmp_path: Path
) -> None:
    """Four lambda(sigma) on a mixture whose score is known; sigma^2 |score error| weighted alike at every level."""
    section = MetricSection(reference=points["held"], count=512, levels=12, sigma_min=0.02, sigma_max=5.0)
    held, sigmas = held_out(section.reference, section.count), levels_of(section)
    weights, exact = edm_weighted(torch.ones(len(sigmas)), sigmas, spread_of(held)), ring()
    fresh = torch.Generator().manual_seed(7)
    x0 = exact.sample(4096, fresh).float()
    noises = [torch.randn(x0.shape, generator=fresh) for _ in sigmas]
    fair, true, trained = {}, {}, {}
    for kind in WEIGHTINGS:
        base = {**sweep["base"], "run": {"name": kind, "storage": str(tmp_path)},
                "objective": {"kind": "edm", "weighting": {"kind": kind}}}  # fmt: skip
        overrides = ["network.hidden_size=32", "network.num_layers=2", "data.global_batch_size=128",
                     "optimizer.learning_rate=3e-3", "duration.images=40000", "log.every_images=10000"]  # fmt: skip
        config = load_config(base, overrides)
        train(config)
        model = load(run_store(config).url(), device="cpu")
        trained[kind] = read_metrics(run_store(config))[-1].loss
        fair[kind] = float(edm_weighted(denoising_errors(model, held, sigmas, 512), sigmas, spread_of(held)).mean())
        true[kind] = 0.0
        for sigma, weight, z in zip(sigmas, weights.tolist(), noises, strict=True):
            level = torch.full((len(x0),), sigma)
            scores = [d.score(x0 + sigma * z, level).double() for d in (model, exact)]
            true[kind] += weight * sigma**4 * float((scores[0] - scores[1]).square().mean()) / len(sigmas)

    def order(values: dict[str, float]) -> list[str]:
        return sorted(values, key=lambda kind: values[kind])

    assert order(fair) == order(true) == ["edm", "sigma2", "min_snr", "constant"]
    assert order(trained)[0] == order(true)[-1]  # the loss takes the worst for the best


def test_noise_and_images_are_the_same_for_every_trial(points: dict[str, str]) -> None:
    held = held_out(points["held"], 64)
    one, other = (denoising_errors(Exact(), held, [0.1, 1.0], batch) for batch in (64, 7))
    assert torch.allclose(one, other, rtol=1e-5)
    assert abs(spread_of(held) - math.sqrt(0.25 + 0.05**2)) < 0.05


@pytest.mark.slow
def test_every_metric_separates_a_trained_model_from_an_untrained_one_at_the_same_budget(tmp_path: Path) -> None:
    """Images of three kinds, two learning rates of which one does nothing; all metrics at once, and again the same."""
    rng, bright = np.random.default_rng(0), np.arange(600) % 3
    images = rng.integers(0, 100, (600, 4, 4), dtype=np.uint8)
    for image, kind in zip(images, bright, strict=True):
        image[kind : kind + 2] += 120
    urls = {}
    for name, part in (("train", images[:450]), ("held", images[450:])):
        np.savez(tmp_path / f"{name}.npz", images=part)
        urls[name] = str(tmp_path / name)
        pack(str(tmp_path / f"{name}.npz"), urls[name], name=name)
    plan = load_sweep({
        "study": {"name": "s", "storage": str(tmp_path / "studies")},
        "base": {"data": {"url": urls["train"], "global_batch_size": 32}, "ema": {"stds": [0.1]},
                 "network": {"kind": "mlp", "hidden_size": 64, "num_layers": 2}, "duration": {"images": 1600},
                 "engine": {"zero_stage": 0, "precision": "fp32"}, "log": {"tensorboard": False}},
        "space": {"optimizer.learning_rate": {"log": [1e-9, 5e-3]}},
        "metric": {"names": list(QUALITY), "reference": urls["held"], "count": 32, "likelihood_count": 32, "levels": 6,
                   "sigma_min": 0.05, "sigma_max": 20.0, "samples": 128, "steps": 6, "sampler": "heun"},
    })  # fmt: skip
    check_sweep(plan)

    def trial(number: int, rate: float) -> Trial:
        values = {"optimizer.learning_rate": rate}
        return Trial(
            number, values, state="done", reports=[advance(trial_config(plan, values), 1600, plan.sweep, values)]
        )

    idle, good = (trial(i, rate) for i, rate in enumerate((1e-9, 5e-3)))
    assert idle.metrics is not None
    assert good.metrics is not None
    assert list(good.metrics) == list(QUALITY)
    for name in QUALITY[:-1]:
        assert good.metrics[name] < idle.metrics[name], name
    assert good.metrics["nfe"] == idle.metrics["nfe"] == 11
    assert trial(2, 5e-3).metrics == good.metrics  # a stretch that is measured twice
    assert best_of(plan, [idle, good]) == [good]
    cheap = Trial(3, {}, state="done", reports=[{**idle.reports[0], "metrics": {**idle.metrics, "nfe": 5.0}}])
    assert best_of(plan, [idle, good, cheap]) == [good, cheap]  # worse in quality, cheaper
    records = [json.loads(file.read_text()) for file in (tmp_path / "studies/s/evaluations").glob("*/record.json")]
    assert len(records) == 2
    drawn = [record["subject"]["sampling"] for record in records]
    assert drawn[0] == drawn[1]
    assert (drawn[0]["sampler"], drawn[0]["steps"], drawn[0]["seed"]) == ("heun", 6, 0)
    assert sorted(r["metrics"]["fid"]["value"] for r in records) == [good.metrics["fid"], idle.metrics["fid"]]


def test_likelihood_of_real_valued_data_is_that_of_the_known_density(points: dict[str, str]) -> None:
    """The exact denoiser's nats on the ring's own points against the mixture's log density, noised as little."""
    section = MetricSection(names=("nats",), reference=points["held"], count=64, sigma_min=0.002, sigma_max=20.0)
    held = held_out(section.reference, section.count)
    nats = held_out_likelihood(Exact(), held, sigma_range=(0.002, 20.0), rtol=section.rtol).nats
    assert abs(float(nats.mean()) - float(ring().log_density(held.x0.double(), section.sigma_min).mean())) < 0.05


def test_likelihood_is_of_images_all_over_the_reference(
    points: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed data may be ordered by class: the first ones are no sample of them."""
    section = MetricSection(names=("nats",), reference=points["held"], count=512, sigma_min=0.1, sigma_max=2.0)
    seen, real = list[torch.Tensor](), held_out_measures.log_likelihood

    def look(model: Any, x: torch.Tensor, **given: Any) -> Any:
        seen.append(x)
        return real(model, x, **given)

    monkeypatch.setattr(held_out_measures, "log_likelihood", look)
    measure(Exact(), "", section, {}, "")  # type: ignore[arg-type]
    everything = held_out(section.reference, 10**9).x0
    assert torch.equal(torch.cat(seen), everything[spread(section.likelihood_count, len(everything))])


def test_a_study_and_an_evaluation_have_the_same_number_under_the_same_name(tmp_path: Path) -> None:
    """bpd, and the denoising error that evaluations call loss, of one model by both ways: equal floats."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "held.npz", images=rng.integers(0, 256, (90, 4, 4), dtype=np.uint8), labels=np.arange(90) % 3)
    pack(str(tmp_path / "held.npz"), str(tmp_path / "held"), name="held")
    config = load_config({
        "run": {"name": "a", "storage": str(tmp_path)},
        "data": {"url": str(tmp_path / "held"), "global_batch_size": 30},
        "network": {"kind": "mlp", "hidden_size": 16, "num_layers": 1}, "duration": {"images": 300},
        "engine": {"zero_stage": 0, "precision": "fp32"}, "log": {"tensorboard": False},
    })  # fmt: skip
    train(config)
    run, data = str(tmp_path / "a"), str(tmp_path / "held")
    settings = EvaluationSettings(run, data, ("bpd", "loss"), likelihood_count=40, loss_count=60, rtol=1e-3)
    record = evaluate(settings).record
    low, high = record.subject.sampling.sigma_range
    section = MetricSection(names=("bpd", "denoising"), reference=data, count=60, likelihood_count=40, rtol=1e-3,
                            sigma_min=low, sigma_max=high, levels=12, batch_size=64)  # fmt: skip
    model = load(run, device="cpu")
    measured = measure(model, run, section, {}, "")["metrics"]
    assert measured["bpd"] == record.metrics["bpd"].value
    held, sigmas = held_out(data, 60, model.info), levels_of(section)
    assert sigmas == record.metrics["loss"].get("sigmas")
    errors = denoising_errors(model, held, sigmas, 64)
    assert errors.mean(0).tolist() == record.metrics["loss"].get("errors")
    ours = edm_weighted(errors, sigmas, model.sigma_data)  # the study's own number has the data's spread for sigma_data
    assert float(ours.mean(1).mean()) == record.metrics["loss"].value
    assert measured["denoising"] == float(edm_weighted(errors, sigmas, spread_of(held)).mean())


def test_a_sweep_compares_dropouts_of_a_condition_and_which_conditions_there_are(tmp_path: Path) -> None:
    """x = place + noise: a trial that always drops the place, and one without it, know less of x."""
    g = np.random.default_rng(0)
    for name, count in (("train", 512), ("held", 64)):
        place = g.standard_normal((count, 2)).astype(np.float32)
        x = 0.5 * place + 0.1 * g.standard_normal((count, 2)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", images=x, place=place)
        pack(tmp_path / f"{name}.npz", tmp_path / name, name=name, fields=parse_field_options(("place=place",)))

    def planned(key: str, *choices: Any) -> StudyPlan:
        return load_sweep({
            "study": {"name": "s", "storage": str(tmp_path / "studies")},
            "base": {"data": {"url": str(tmp_path / "train"), "global_batch_size": 32, "conditions": {"place": {}}},
                     "network": {"kind": "mlp", "hidden_size": 32, "num_layers": 1}, "duration": {"images": 2400},
                     "optimizer": {"learning_rate": 1e-2}, "ema": {"stds": [0.1]}, "log": {"tensorboard": False},
                     "engine": {"zero_stage": 0, "precision": "fp32"}},
            "space": {key: {"choice": list(choices)}}, "search": {"kind": "grid"},
            "metric": {"reference": str(tmp_path / "held"), "count": 64, "levels": 4, "sigma_min": 0.1, "sigma_max": 5},
        })  # fmt: skip

    choices = [{"place": {}}, {"place": {"dropout": 1.0}}, {}]
    plan, found = planned("data.conditions", *choices), []
    check_sweep(plan)
    for choice in choices:
        chosen = {"data.conditions": choice}
        found.append(advance(trial_config(plan, chosen), 2400, plan.sweep, chosen)["metrics"]["denoising"])
    kept, dropped, without = found
    assert kept < 0.8 * without
    assert kept < 0.8 * dropped
    by_key = planned("data.conditions.place.dropout", 0.0, 1.0)
    dropping = trial_config(by_key, {"data.conditions.place.dropout": 1.0})
    assert dropping.data == trial_config(plan, {"data.conditions": choices[1]}).data


def test_tpe_finds_a_planted_optimum_that_random_search_misses(sweep: dict[str, Any]) -> None:
    """Three dimensions, one of them a choice that moves the best of another: mean distance after 40 trials, 4 seeds."""
    space = {
        "objective.sigma_sampling.P_mean": {"uniform": [-3.0, 1.0]},
        "objective.sigma_sampling.P_std": {"uniform": [0.2, 2.2]},
        "objective.weighting.kind": {"choice": ["edm", "sigma2", "constant"]},
    }

    def cost(values: dict[str, Any]) -> float:
        kind = values["objective.weighting.kind"]
        mean, std = values["objective.sigma_sampling.P_mean"], values["objective.sigma_sampling.P_std"]
        return (mean + 1.1) ** 2 + (std - 0.9) ** 2 + {"edm": 0.0, "sigma2": 0.3, "constant": 1.0}[kind]

    found: dict[str, list[float]] = {"tpe": [], "random": []}
    for seed in range(4):
        plan = load_sweep({**sweep, "space": space, "search": {"kind": "tpe", "default_first": False}},
                          [f"study.seed={seed}"])  # fmt: skip
        search: Any = searcher(plan, ())
        costs = []
        for number in range(40):
            costs.append(cost(values(plan, search.suggest(str(number)))))
            search.on_trial_complete(str(number), {"images": 2048, "denoising": costs[-1]})
        found["tpe"].append(min(costs))
        found["random"].append(min(cost(drawn(plan, number)) for number in range(40)))
    assert sum(found["tpe"]) < 0.5 * sum(found["random"]), found


def test_a_proposal_is_a_function_of_seed_number_and_history(sweep: dict[str, Any]) -> None:
    history = [
        Trial(i, {"objective.sigma_sampling.P_mean": -2.0 + i}, state="done",
              reports=[{"images": 2048, "metrics": {"denoising": random.Random(i).random()}, "seq": i}])
        for i in range(2)
    ]  # fmt: skip

    def proposed(plan: StudyPlan, trials: list[Trial]) -> dict[str, Any]:
        search: Any = searcher(plan, trials)
        return values(plan, search.suggest("a"))

    plan = load_sweep({**sweep, "search": {"kind": "tpe", "startup": 2, "default_first": False}})
    assert proposed(plan, history) == proposed(plan, history)
    assert proposed(plan, history) != proposed(plan, history[:1])
    for kind in ("random", "grid"):
        plan = load_sweep({**sweep, "search": {"kind": kind}})
        assert drawn(plan, 2) == drawn(plan, 2)
        assert drawn(plan, 2) != drawn(plan, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_whose_error_is_not_finite_is_measured_as_a_failure(points: dict[str, str], value: float) -> None:
    class Broken(Exact):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: Any = None) -> torch.Tensor:
            return torch.where(sigma.view(-1, 1) > 4.0, value, super().forward(x, sigma, labels))

    section = MetricSection(reference=points["held"], count=64, levels=4, sigma_min=0.02, sigma_max=5.0)
    drawn: dict[str, Any] = {"sampler": "heun", "steps": 4, "grid": None, "options": {}, "ema": None, "guidance": 1.0}
    with pytest.raises(UserError, match=r"metric denoising (nan|inf): not a finite number"):
        measure(Broken(), "", section, drawn, "")  # type: ignore[arg-type]
    check_finite({"denoising": 1.0, "fid": -0.5})
    with pytest.raises(UserError, match="metric fid nan: "):
        check_finite({"denoising": 1.0, "fid": math.nan})
