"""Ensembles for the records of a packed data set: keyed by record and member, restartable, with the records' fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scoreray.cluster.cli import main as cli
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field, FieldRequest
from scoreray.data.fields.normalisation import Normaliser
from scoreray.data.packing.commit import carry_out
from scoreray.data.packing.pack import SourcePlan
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader
from scoreray.data.reading.stream import Stream
from scoreray.data.storage.store import open_store
from scoreray.sampling.guidance.steering import Guidance
from scoreray.sampling.measures.held_out import read_held_out
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.load import LoadedDenoiser
from scoreray.sampling.offline import job as job_module
from scoreray.sampling.offline.ensembles import ConditionsFrom
from scoreray.sampling.offline.generate import Request, SampleConditions
from scoreray.sampling.offline.job import begin, carry_out_job, in_this_process
from scoreray.sampling.offline.place import intact, place_of
from scoreray.sampling.offline.plan import Mapper, SamplePlan
from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import Condition, Conditions, ConditionSpec

STD, SIGMA_DATA, NUM_RECORDS, SHARD = 0.1, 0.5, 20, 16
FIELDS = (
    Field("height", "array", [2, 3], "float32", "npy"),
    Field("caption", "text", [1], "uint8", "txt"),
    Field("place", "vector", [2], "float64", "npy"),
    Field("tokens", "sequence", [1, 2], "float16", "npy"),
    Field("kind", "class", [], "int64", "cls", classes=["sea", "land"], class_counts=[0, 0]),
    Field("hour", "scalar", [], "int32", "json", normalisation="channel"),
)
SPECS: Conditions = {
    "place": ConditionSpec("vector", (2,), normaliser=Normaliser("channel", (10.0, 0.0), (2.0, 1.0))),
    "caption": ConditionSpec("text", (8,)),
    "tokens": ConditionSpec("sequence", (4, 2)),
    "kind": ConditionSpec("class", classes=("land", "ice", "sea")),
}


@dataclass(frozen=True)
class Records:
    """Samples of FIELDS, each a function of its number, as a FieldSource."""

    num_samples: int = NUM_RECORDS
    fields: Sequence[Field] = FIELDS
    fingerprint: str = "records"
    runs: None = None
    path: str = "records"
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def inputs(self, numbers: Sequence[int]) -> str:
        return self.fingerprint

    def check_visible(self) -> None: ...

    def check_readable(self, skip_bad: int) -> None: ...

    def read_all(self, numbers: Iterable[int]) -> Iterator[Mapping[str, Any] | DataError]:
        return iter([
            {
                "height": np.full((2, 3), 100.0 + i, np.float32), "caption": "x" * (i % 8), "kind": i % 2, "hour": i,
                "place": np.array([10.0 + i, 1.0]), "tokens": np.full((i % 4, 2), i, np.float16),
            }
            for i in numbers
        ])  # fmt: skip


class OfRecord(nn.Module):
    """The exact denoiser of data N(m, STD^2), m the normalised place's first number plus the caption's length, in
    normalised units; m is 0 of what is null."""

    conditions = SPECS

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        assert set(condition.values) == set(SPECS)
        mean = condition.values["place"][:, 0] * condition.mask("place") + condition.mask("caption").sum(1)
        sigma = (4 * c_noise).exp()[:, None, None]
        x, mean = x * (sigma**2 + SIGMA_DATA**2).sqrt(), mean[:, None, None]
        return mean + (x - mean) * (STD**2 / (STD**2 + sigma**2))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("data") / "set")
    carry_out(SourcePlan(url, "set", Records(), 8, "png", 0), workers=1, map_shards=None, progress=None)
    return url


@pytest.fixture
def model(mlp_config: Config, monkeypatch: pytest.MonkeyPatch) -> LoadedDenoiser:
    """Normalised heights have m and STD; the data's own are 100 + 10 times as much."""
    found = LoadedDenoiser(OfRecord(), "denoised", SIGMA_DATA).eval()
    target = TargetField("height", "array", "float32", Normaliser("channel", (100.0, 100.0), (10.0, 10.0)))
    found.info = ModelInfo("none", 0, "none", (2, 3), SPECS["kind"].classes, mlp_config, SPECS, target)
    monkeypatch.setattr(job_module, "load_to_sample", lambda url, ema, check: found)
    return found


def draw(url: str, request: Request, mapper: Mapper | None = None, format: str = "webdataset") -> str:
    place = place_of(url, format)
    job, model, recorded = begin(place, "none", None, request, samples_per_shard=SHARD)
    kept = None if recorded is None else intact(place, job, recorded)
    return carry_out_job(place, SamplePlan(job, place.shards.url(), model), mapper or in_this_process(), kept)


def contents(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {key: store.get(key) for key, _ in store.list()}


def request_of(data: str, per_condition: int, steps: int = 5, **fields: Any) -> Request:
    source = ConditionsFrom.of(data, per_condition)
    return Request(source.num_samples, "heun", steps, conditions_from=source, **fields)


def everything(url: str) -> Any:
    reader = SampleReader(url)
    requests = [FieldRequest(field.name) for field in reader.manifest.fields]
    return reader.read_fields(range(reader.manifest.num_samples), requests).fields


@pytest.mark.usefixtures("model")
def test_each_record_has_an_ensemble_with_its_fields_in_the_datas_units(data: str, tmp_path: Path) -> None:
    url = str(tmp_path / "drawn")
    draw(url, request_of(data, 4, 24, seed=3))
    assert verify(url) == []
    manifest = Manifest.load(open_store(url))
    assert [field.name for field in manifest.fields] == [
        "height", "caption", "place", "tokens", "kind", "hour", "record", "member",
    ]  # fmt: skip
    drawn, records = everything(url), everything(data)
    assert drawn["record"][:, 0].tolist() == [i // 4 for i in range(80)]
    assert drawn["member"][:, 0].tolist() == [i % 4 for i in range(80)]
    rows = drawn["record"][:, 0]
    for name in ("caption", "place", "tokens", "kind", "hour"):
        assert torch.equal(drawn[name], records[name][rows])
    length = (records["caption"] > 0).sum(1)
    mean = 100 + 10 * ((records["place"][:, 0] - 10) / 2 + length)
    ensembles = drawn["height"].view(NUM_RECORDS, -1).double()
    assert (ensembles.mean(1) - mean).abs().max() < 5 * 10 * STD / 24**0.5 + 0.02 * mean.max()
    assert float(ensembles.std(1).mean()) == pytest.approx(10 * STD, rel=0.1)
    stream = Stream(url, global_batch_size=20, rank=0, world_size=1, seed=0)
    assert sorted(torch.cat([next(iter_).index for iter_ in [iter(stream)] for _ in range(4)]).tolist()) == list(
        range(80)
    )


@pytest.mark.usefixtures("model")
def test_an_ensemble_of_one_record_needs_no_spread_of_its_fields(data: str, tmp_path: Path) -> None:
    """`hour` is normalised by its spread in the data, and in samples for one record it has none."""
    draw(url := str(tmp_path / "drawn"), replace(request_of(data, 3), count=3))
    assert verify(url) == []
    assert torch.equal(everything(url)["hour"], everything(data)["hour"][:1].expand(3, 1))


@pytest.mark.usefixtures("model")
def test_a_member_is_of_its_seed_record_and_number_alone(data: str, tmp_path: Path) -> None:
    """Whatever the batch, other members, kills, and damage that is repaired."""
    request = request_of(data, 4)
    draw(str(tmp_path / "a"), request)
    draw(str(tmp_path / "b"), replace(request, batch_size=5))
    assert contents(str(tmp_path / "a")) == contents(str(tmp_path / "b"))
    draw(str(tmp_path / "two"), request_of(data, 2))
    four = everything(str(tmp_path / "a"))["height"].view(NUM_RECORDS, 4, 2, 3)
    assert torch.equal(everything(str(tmp_path / "two"))["height"].view(NUM_RECORDS, 2, 2, 3), four[:, :2])

    def killed(plan: SamplePlan, numbers: Sequence[int]) -> Iterator[Any]:
        yield from in_this_process()(plan, numbers[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(str(tmp_path / "killed"), request, killed)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    draw(str(tmp_path / "killed"), request)
    assert contents(str(tmp_path / "killed")) == contents(str(tmp_path / "a"))
    (tmp_path / "killed" / "shards" / "000003.tar").unlink()
    (tmp_path / "killed" / "index.bin").unlink()
    made: list[int] = []

    def counted(plan: SamplePlan, numbers: Sequence[int]) -> Iterator[Any]:
        for packed in in_this_process()(plan, numbers):
            made.append(not packed.kept)
            yield packed

    draw(str(tmp_path / "killed"), request, counted)
    assert sum(made) == 1
    assert contents(str(tmp_path / "killed")) == contents(str(tmp_path / "a"))


@pytest.mark.usefixtures("model")
def test_an_npz_has_the_records_fields_too(data: str, tmp_path: Path) -> None:
    file = str(tmp_path / "drawn.npz")
    draw(file, request_of(data, 2), format="auto")
    draw(str(tmp_path / "drawn"), request_of(data, 2))
    shards = everything(str(tmp_path / "drawn"))
    with np.load(file) as arrays:
        assert set(arrays) == {
            "images", "labels", "seeds", "record", "member", "caption", "caption_mask", "place", "tokens",
            "tokens_mask", "kind", "hour",
        }  # fmt: skip
        assert np.array_equal(arrays["images"], shards["height"].numpy())
        for name in ("caption", "place", "tokens", "hour"):
            assert np.array_equal(arrays[name], shards[name].numpy())
        assert arrays["caption_mask"].sum(1).tolist() == [len(bytes(row).rstrip(b"\0")) for row in arrays["caption"]]
        assert arrays["record"].tolist() == [i // 2 for i in range(40)]


def test_what_is_given_stands_before_the_records_and_classes_go_by_name(data: str, model: LoadedDenoiser) -> None:
    found = SampleConditions(request_of(data, 2), model.info).of(0, 40)
    assert found is not None
    kinds = everything(data)["kind"].repeat_interleave(2)
    assert found.values["kind"].tolist() == [{0: 2, 1: 0}[kind] for kind in kinds.tolist()]
    given = request_of(data, 2, conditions={"caption": "ab"}, class_label="ice")
    found = SampleConditions(given, model.info).of(3, 7)
    assert found is not None
    assert found.values["kind"].tolist() == [1] * 4
    assert [bytes(row[:2].tolist()) for row in found.values["caption"]] == [b"ab"] * 4
    assert found.values["place"].dtype == torch.float32


def test_held_out_measures_read_the_models_target_and_conditions(data: str, model: LoadedDenoiser) -> None:
    held = read_held_out(SampleReader(data), np.arange(5), model.info)
    heights = everything(data)["height"][:5]
    assert torch.equal(held.images, heights)
    torch.testing.assert_close(held.x0, (heights - 100) / 10)
    assert isinstance(held.condition, Condition)
    assert set(held.condition.values) == set(SPECS)


def test_records_that_do_not_fit_are_one_line(data: str, model: LoadedDenoiser, tmp_path: Path) -> None:
    request = request_of(data, 2)
    more = {**SPECS, "depth": ConditionSpec("vector", (1,))}
    with pytest.raises(UserError, match="has no field for the model's condition 'depth'") as error:
        SampleConditions(request, replace(model.info, conditions=more))
    assert str(error.value).endswith("it has height, caption, place, tokens, kind, hour; give --condition depth=VALUE")
    other = {"place": ConditionSpec("vector", (3,))}
    with pytest.raises(UserError, match=r"'place' is of kind vector \[2\], .* condition 'place' is a vector \[3\]"):
        SampleConditions(request, replace(model.info, conditions=other))
    assert request.conditions_from is not None
    changed = replace(request, conditions_from=replace(request.conditions_from, sha256="0" * 64))
    with pytest.raises(DataError, match="was changed since this job began"):
        SampleConditions(changed, model.info)
    with pytest.raises(
        UserError, match="--count 3: of 20 records with --per-condition 2 it must be a multiple of 2, 40"
    ):
        replace(request, count=3)
    with pytest.raises(UserError, match="guidance depth=2: no condition 'depth' is given"):
        SampleConditions(replace(request, guidance=Guidance(weights={"depth": 2.0})), model.info)
    with pytest.raises(UserError, match="--per-condition goes with --conditions-from"):
        cli.app(["sample", "none", "--out", str(tmp_path / "x"), "--per-condition", "3"], standalone_mode=False)
