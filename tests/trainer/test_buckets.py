"""Training on a data set in buckets: resumes bitwise, at another world size, and samples of each size come out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from scoreray.data.errors import UserError
from scoreray.data.packing.pack_buckets import pack_buckets
from scoreray.data.reading.samples import SampleReader
from scoreray.sampling.evaluation.follow import check_evaluation
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.generate import Request, RequestError
from scoreray.sampling.offline.job import begin, carry_out_job, in_this_process
from scoreray.sampling.offline.place import place_of
from scoreray.sampling.offline.plan import SamplePlan
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, latest
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.prepare import check_run, prepare_run
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_data import open_run_data
from scoreray.trainer.run_folder import run_store

SHAPES = ((3, 8, 8), (3, 12, 6), (3, 6, 12))
DIT: dict[str, Any] = {
    "kind": "dit",
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "positions": "fixed",
    "dropout": 0.1,
}
UNET: dict[str, Any] = {"kind": "unet", "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1}
RANKS = Path(__file__).parent / "checkpoints" / "persistent_ranks.py"  # trains every config of a folder at a world size


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(40):
        _, height, width = SHAPES[(number % 7 > 2) + (number % 7 > 4)]
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    made = pack_buckets(folder / "pictures", folder / "packed", [(8, 8), (6, 12), (12, 6)])
    assert made.counts == [18, 12, 10]
    return made.url


def config(data_url: str, storage: Path, network: dict[str, Any] = DIT, **sections: Any) -> Config:
    settings: dict[str, Any] = {
        "run": {"name": "run", "storage": str(storage)},
        "data": {"url": data_url, "global_batch_size": 8},
        "network": network,
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 112},
        "checkpoint": {"every_images": 56},
        "log": {"every_images": 16},
    }
    return load_config({**settings, **sections})


def final(c: Config) -> Checkpoint:
    checkpoint = latest(run_store(c))
    assert checkpoint is not None
    assert checkpoint.images_seen == 112
    return checkpoint


@pytest.fixture(scope="module")
def whole(data_url: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    c = prepare_run(config(data_url, tmp_path_factory.mktemp("whole"))).config
    assert train(c) == 112
    return c


def part(c: Config, steps: int) -> None:
    """Trains so many steps, or to the end."""
    left = iter([LoopRequest.NOTHING] * (steps - 1))
    train(c, requested=lambda: next(left, LoopRequest.STOP))


def test_an_interrupted_run_ends_bitwise_like_an_uninterrupted_one(
    data_url: str, whole: Config, tmp_path: Path
) -> None:
    c = prepare_run(config(data_url, tmp_path)).config
    for steps in (1, 8, 99):
        part(c, steps)
    for one, other in zip(final(whole).full_state().values(), final(c).full_state().values(), strict=True):
        assert torch.equal(one, other)


def test_it_goes_on_at_two_ranks(data_url: str, whole: Config, tmp_path: Path, run_ranks: Callable[..., str]) -> None:
    """The same samples at the same noise: losses agree to the rounding of sums over ranks."""
    c = prepare_run(config(data_url, tmp_path / "runs")).config
    part(c, 7)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(c.model_dump(mode="json")))
    run_ranks(RANKS, str(tmp_path))
    assert final(c).marker.world_size == 2
    losses = [{record.images: record.loss for record in read_metrics(run_store(one))} for one in (whole, c)]
    common = sorted(losses[0].keys() & losses[1].keys())
    assert common[-1] == 112
    assert [losses[0][at] for at in common[-2:]] == pytest.approx([losses[1][at] for at in common[-2:]], rel=1e-4)


def test_the_checkpoint_knows_its_sizes_and_draws_each(whole: Config, tmp_path: Path) -> None:
    assert final(whole).marker.image_shapes == [list(shape) for shape in SHAPES]
    url = final(whole).url
    model = load(url)
    assert model.info.sizes == {"8x8": (3, 8, 8), "6x12": (3, 12, 6), "12x6": (3, 6, 12)}
    for size, shape in {None: SHAPES[0], "6x12": SHAPES[1], "12x6": SHAPES[2]}.items():
        place = place_of(str(tmp_path / str(size)), "webdataset")
        job, drawn, _ = begin(place, url, None, Request(2, steps=2, size=size), precision="fp32", compile_="off")
        carry_out_job(place, SamplePlan(job, place.shards.url(), drawn), in_this_process())
        assert SampleReader(place.shards.url()).manifest.shape == list(shape)
    with pytest.raises(RequestError, match="--size 9x9: accepted: 12x6, 6x12, 8x8"):
        Request(2, size="9x9").fitted(model.info)


def test_mfu_is_of_the_sizes_that_were_trained_on(whole: Config) -> None:
    from scoreray.trainer.config.run_fields import run_fields
    from scoreray.trainer.meta import training_work

    fields = run_fields(whole.data, open_run_data(whole))
    assert fields.shares == (18 / 40, 12 / 40, 10 / 40)
    work, _ = training_work(whole, fields, 1, torch.device("cpu"))
    assert list(work) == [(8, 8), (12, 6), (6, 12)]
    assert work[12, 6] == work[6, 12] > work[8, 8]  # 18 tokens and 16
    assert all(record.mfu is None or record.mfu > 0 for record in read_metrics(run_store(whole)))


@pytest.mark.parametrize("network", [UNET, {**DIT, "kind": "mmdit"}], ids=lambda network: network["kind"])
def test_other_networks_take_all_sizes(data_url: str, tmp_path: Path, network: dict[str, Any]) -> None:
    c = prepare_run(config(data_url, tmp_path, network, duration={"images": 48})).config
    assert train(c) == 48


@pytest.mark.parametrize(
    ("network", "objective", "message"),
    [
        ({**DIT, "positions": "learned"}, None, r"can't take samples of \[3, 12, 6\].*network.positions=fixed takes"),
        ({"kind": "mlp", "hidden_size": 8, "num_layers": 1}, None, r"network.kind: 'mlp' can't take samples"),
        ({"kind": "rbm", "num_hidden": 8}, {"kind": "contrastive", "chain": "gibbs"}, "has a unit for each pixel"),
    ],
)
def test_what_takes_one_size_is_refused_before_the_run(
    data_url: str, tmp_path: Path, network: dict[str, Any], objective: dict[str, Any] | None, message: str
) -> None:
    more = {} if objective is None else {"objective": objective}
    with pytest.raises(UserError, match=message):
        check_run(config(data_url, tmp_path, network, **more))


def test_evaluation_is_of_one_bucket(data_url: str, tmp_path: Path) -> None:
    c = config(data_url, tmp_path, evaluation={"metrics": ["frechet"], "every_images": 56})
    with pytest.raises(UserError, match=r"evaluation.reference: missing, and data.url is in buckets; give one of them"):
        check_evaluation(c, open_run_data(c))
