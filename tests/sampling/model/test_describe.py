"""Which model is at a URL, at which EMA length: one answer for every verb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.cluster.cli import main as cli
from scoreray.cluster.verbs.export import export_model
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.normalisation import Normaliser
from scoreray.data.storage.store import open_store
from scoreray.sampling.evaluation.prepare import load_inputs, make_plan
from scoreray.sampling.http.parse import parse
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.model.describe import ModelInfo, describe
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.generate import Request
from scoreray.sampling.samplers.sample import sample
from scoreray.sampling.service.body import make_request
from scoreray.sampling.service.config import Limits, Refused
from scoreray.sampling.service.models import look_up
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, latest
from scoreray.trainer.checkpoints.exported import ModelManifest
from scoreray.trainer.config import load_config
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import ConditionSpec
from scoreray.trainer.networks.ladder import levels_needed

SPELLINGS = ["0.1", ".1", "0.10", "0.100", "1e-1", "10E-2", " 0.1 ", "+0.1"]


@pytest.fixture(scope="module")
def urls(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run, its checkpoint, all of it exported, and one length exported."""
    folder = tmp_path_factory.mktemp("described")
    run = new_run(str(folder / "run"))
    newest = latest(open_store(run))
    assert newest is not None
    export_model(run, str(folder / "all"), ["0.05", ".1", "none"])
    export_model(run, str(folder / "one"), ["1e-1"])
    return {"run": run, "checkpoint": newest.url, "all": str(folder / "all"), "one": str(folder / "one")}


def test_what_each_url_holds(urls: dict[str, str]) -> None:
    found = {name: describe(url) for name, url in urls.items()}
    for name in ("run", "checkpoint", "all"):
        assert found[name].stored.lengths == ("0.050", "0.100", "none")
        assert found[name].info.ema == "0.050"
    assert found["one"].stored.lengths == ("0.100",)
    assert found["one"].info.ema == "0.100"
    assert [found[name].follows_run for name in urls] == [True, False, False, False]
    assert found["run"].info.url == found["checkpoint"].info.url == urls["checkpoint"]
    assert describe(f"{urls['all']}/ema-0.100.safetensors").info.ema == "0.100"


def untrained(**sections: Any) -> ModelInfo:
    """Of a model of points in the plane."""
    run, data = {"name": "r", "storage": "none"}, {"url": "none", "global_batch_size": 16}
    config = load_config({"run": run, "data": data, "duration": {"images": 16}, **sections})
    return ModelInfo("", 0, "none", (2,), (), config)


@pytest.mark.parametrize(("process", "mean"), [({"sigma_max": 80}, 25.5498), ({"sigma_max": 200}, 28.2032)])
def test_sampling_starts_at_the_processs_own_end(process: dict[str, Any], mean: float, make_gaussian: Any) -> None:
    """Data N(30, 12^2) under the exact denoiser: the ODE from N(0, S^2) ends at 30 (1 - 12 / sqrt(12^2 + S^2))."""
    sigmas = untrained(process={"kind": "ve", "sigma_min": 0.01, **process}).sigmas(200)
    assert sigmas[0] == pytest.approx(process["sigma_max"])
    x = float(sigmas[0]) * torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None]
    found = sample(make_gaussian(30.0, 12.0), x, sigmas).mean()
    assert found == pytest.approx(mean, abs=0.02)


def test_annealed_langevin_walks_down_the_rungs_that_a_run_was_trained_on() -> None:
    def levels(**sections: Any) -> int | None:
        return Request(1, "ncsn").fitted(untrained(**sections)).steps

    trained = {"kind": "denoising", "sigma_sampling": {"kind": "ladder", "num_levels": 50}}
    of_ladder = {"kind": "ladder", "num_levels": 40, "network": {"kind": "mlp"}}
    assert levels(process={"kind": "ve"}, objective=trained) == 50
    assert levels(process={"kind": "ve"}, network=of_ladder) == 40
    by_technique_2 = levels_needed(80.0, 0.002, 2)
    assert levels(process={"kind": "edm"}, network=of_ladder) == by_technique_2  # whose rungs it does not walk
    assert levels(process={"kind": "edm"}, objective=trained) == by_technique_2  # whose rungs are not geometric


def test_an_export_knows_what_the_model_draws_and_takes_as_its_checkpoint_does(
    new_run: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = TargetField("height", "array", "float32", Normaliser("log1p", (0.5,), (2.0,)))
    conditions = {"label": ConditionSpec("class", classes=("sea", "land"))}
    run = new_run(str(tmp_path / "run"), shape=(4,), classes=["sea", "land"], target=target, conditions=conditions)
    cli.app(["export", run, str(tmp_path / "out")], standalone_mode=False)
    assert "takes label: one of 2 classes\n" in capsys.readouterr().out
    checkpoint, exported = (describe(str(tmp_path / name)).info for name in ("run", "out"))
    assert exported.conditions == checkpoint.conditions == conditions
    assert exported.target == checkpoint.target == target
    assert exported.classes == ("sea", "land")
    x = torch.tensor([[0.0, 1.0, -2.0, 0.25]])
    torch.testing.assert_close(target.normaliser.apply(load(str(tmp_path / "out")).info.in_data_units(x)), x)  # type: ignore[union-attr]
    unconditional = new_run(str(tmp_path / "no"), shape=(4,), classes=["sea", "land"], target=target, conditions={})
    assert describe(unconditional).info.classes == ()  # the data's, which this network does not know
    assert describe(unconditional).info.takes == "no conditions"


def test_a_manifest_of_every_kind_of_condition_comes_back_equal(urls: dict[str, str]) -> None:
    page = describe(urls["all"]).stored.page  # type: ignore[union-attr]
    specs = {
        "label": ConditionSpec("class", classes=("a",)),
        "caption": ConditionSpec("text", (77,)),
        "place": ConditionSpec("vector", (2,), normaliser=Normaliser("channel", (0.1, -3.0), (1e-3, 2.0))),
        "coarse": ConditionSpec("concat", (4, 8, 8, 8), normaliser=Normaliser("none")),
        "tokens": ConditionSpec("sequence", (5, 3)),
    }
    whole = replace(page, conditions=specs, target=TargetField("x", "vector", "float64", Normaliser("none")))
    assert ModelManifest.from_json(whole.to_json(), "model.json") == whole


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["run", "checkpoint", "all", "one"])
def test_every_verb_takes_every_spelling(urls: dict[str, str], small_set: str, name: str, spelling: str) -> None:
    """sample, evaluate and serve know the length by one name: the same weights, the same record."""
    url = urls[name]
    assert describe(url, spelling).info.ema == load(url, spelling, "cpu").info.ema == "0.100"
    assert look_up("m", url, spelling).info.ema == look_up("m", url).ema(spelling) == "0.100"
    plans = [
        make_plan(load_inputs(EvaluationSettings(url, small_set, ("sw",), ema=ema))) for ema in (spelling, "0.100")
    ]
    assert plans[0].store.url() == plans[1].store.url()


@pytest.mark.parametrize("length", ["0.2", "0.0504", "half-life", "nope", "inf", "", "0" * 5000, "none"])
def test_a_length_that_is_not_there_is_refused_alike(urls: dict[str, str], small_set: str, length: str) -> None:
    """In one line that names what is there: by sample, serve and evaluate (before anything is drawn), and as 422."""
    url = urls["one"]
    calls: list[Callable[[], Any]] = [
        lambda: load(url, length),
        lambda: look_up("m", url, length),
        lambda: load_inputs(EvaluationSettings(url, small_set, ema=length)),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"EMA length") as error:
            call()
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)
    served = look_up("m", url)
    if len(length) <= 32:
        with pytest.raises(Refused) as refused:
            make_request(parse(b'{"ema": "%s"}' % length.encode()), served, Limits(), "image/png", 0)
        assert (refused.value.status, refused.value.field) == (422, "ema")


def test_a_checkpoint_of_no_model_is_refused(urls: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = describe(urls["run"]).stored.source
    assert isinstance(source, Checkpoint)
    for changes in ({"image_shape": []}, {"config": {"run": {}}}):
        damaged = replace(source, marker=replace(source.marker, **changes))
        monkeypatch.setattr("scoreray.trainer.checkpoints.stored_model.find", lambda url, found=damaged: found)
        with pytest.raises(DataError, match="does not describe a model"):
            describe(urls["run"])


def test_an_exported_model_is_exported_elsewhere_and_not_over_itself(urls: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the model itself"):
        export_model(urls["all"], urls["all"])
    page = export_model(urls["all"], str(tmp_path), ["0.1"]).page
    assert page.files == {"0.100": describe(urls["all"]).stored.page.files["0.100"]}
    assert describe(str(tmp_path)).info == replace(describe(urls["all"], "0.1").info, url=str(tmp_path))


def test_the_weights_are_those_of_the_length(urls: dict[str, str]) -> None:
    """Raw weights and the first average are equal in this run, the second is 0.9 of them."""
    raw, other = (describe(urls["all"], ema).weights() for ema in ("none", "0.1"))
    assert all(torch.equal(0.9 * raw[name], other[name]) for name in raw)
