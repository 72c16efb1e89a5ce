"""Batch generation: exactly N samples, by any number of processes, however often they are killed, in the same bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from waiting import PATIENCE_S

from scoreray.cluster.cli import main as cli
from scoreray.cluster.verbs.sample import sample_to
from scoreray.cluster.verbs.sample_actors import on_actors
from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import Normaliser
from scoreray.data.packing.commit import pack_shard
from scoreray.data.packing.plan import PackedShard
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import read_samples
from scoreray.data.reading.stream import Stream
from scoreray.data.reading.tars import Tape, members
from scoreray.data.storage.store import open_store
from scoreray.sampling.guidance.steering import Guidance
from scoreray.sampling.model.describe import describe
from scoreray.sampling.model.load import LoadedDenoiser, load
from scoreray.sampling.offline.driver import Form, InRows, choose_form, in_form, network_calls, steady_rows
from scoreray.sampling.offline.generate import Request, prepare
from scoreray.sampling.offline.job import begin, carry_out_job, in_this_process
from scoreray.sampling.offline.place import TakenOver, intact, place_of
from scoreray.sampling.offline.plan import Mapper, SamplePlan
from scoreray.sampling.offline.record import SampleRecord
from scoreray.sampling.samplers.sample import sample
from scoreray.trainer.config.run_fields import TargetField

REQUEST = Request(count=150, steps=3, seed=7, batch_size=32)
SHARD = 32

NewRun = Callable[..., str]


@pytest.fixture(scope="module")
def run_url(new_run: NewRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "toy"))


def draw(url: str, run: str, request: Request = REQUEST, mapper: Mapper | None = None, **words: object) -> str:
    place = place_of(url, str(words.pop("format", "auto")))
    job, model, recorded = begin(place, run, None, request, samples_per_shard=SHARD, **words)  # type: ignore[arg-type]
    kept = None if recorded is None else intact(place, job, recorded)
    return carry_out_job(place, SamplePlan(job, place.shards.url(), model), mapper or in_this_process(), kept)


def contents(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {key: store.get(key) for key, _ in store.list()}


@pytest.fixture(scope="module")
def expected(run_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the job leaves when nothing happens to it."""
    url = str(tmp_path_factory.mktemp("expected") / "samples")
    draw(url, run_url, format="webdataset")
    return contents(url)


def test_shards_are_a_data_set_with_every_seed_once(run_url: str, tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    draw(url, run_url, format="webdataset")
    assert verify(url) == []
    store = open_store(url)
    manifest = Manifest.load(store)
    assert manifest.num_samples == 150
    assert manifest.class_counts == [50, 50, 50]
    notes = []
    for shard in manifest.shards:
        tape = Tape(lambda a, b, name=shard.name: store.get(name, a, b), shard.bytes)
        notes += [json.loads(member.data) for member in members(tape) if member.name.endswith(".json")]
    assert [note["seed"] for note in notes] == [(7 << 32) + i for i in range(150)]
    assert [note["class_label"] for note in notes] == [i % 3 for i in range(150)]
    stream = Stream(url, global_batch_size=30, rank=0, world_size=1, seed=0)
    seen = torch.cat([next(iter_).index for iter_ in [iter(stream)] for _ in range(5)])
    assert sorted(seen.tolist()) == list(range(150))


def test_the_acceptance_of_a_metropolis_sampler_is_recorded_also_of_shards_that_were_there(
    run_url: str, tmp_path: Path
) -> None:
    request = replace(REQUEST, count=70, sampler="mala", options={"anneal": True, "num_steps": 2})
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    draw(whole, run_url, request, format="webdataset")

    def killed(plan: SamplePlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
        yield pack_shard(plan, numbers[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(cut, run_url, request, killed, format="webdataset")
    draw(cut, run_url, replace(request, batch_size=9), format="webdataset")
    record = json.loads(open_store(whole).get("sampling.json"))
    assert round(record["acceptance"] * 70 * 3 * 2, 2) in range(421)  # of 70 samples, 3 levels and 2 steps
    info = describe(run_url).info
    assert record["calls"] == request.fitted(info).calls(info)
    assert contents(cut) == contents(whole)
    store = open_store(cut)
    store.delete(["shards/000000.tar"])
    draw(cut, run_url, request, format="webdataset")
    assert contents(cut) == contents(whole)


def test_batch_size_and_actors_do_not_change_a_byte(
    ray_cluster: None, run_url: str, s3_url: str, expected: dict[str, bytes], tmp_path: Path,
    new_listeners: Any,
) -> None:  # fmt: skip
    draw(str(tmp_path / "by5"), run_url, replace(REQUEST, batch_size=5), format="webdataset")
    assert contents(str(tmp_path / "by5")) == expected
    reported: list[tuple[int, int]] = []
    with new_listeners() as listeners:
        draw(f"{s3_url}/samples", run_url, mapper=on_actors(2, lambda done, total: reported.append((done, total))))
    listeners.check()
    assert contents(f"{s3_url}/samples") == expected
    assert reported[-1] == (150, 150)
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)


@pytest.mark.slow
def test_an_actor_that_is_killed_changes_nothing(ray_cluster: None, run_url: str, tmp_path: Path) -> None:
    import psutil

    long = replace(REQUEST, count=320, steps=25)  # seconds, so that it is still drawn after the kill
    draw(str(tmp_path / "alone"), run_url, long, format="webdataset")
    url = str(tmp_path / "samples")
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        """The drawing processes, once a shard is there (also those of an earlier test, if they are still ending)."""
        if killed or done < SHARD:
            return
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::DrawingActor"):
                killed.append(process.pid)
                process.kill()

    said: list[str] = []
    draw(url, run_url, long, mapper=on_actors(2, kill, said.append), format="webdataset")
    assert killed
    assert set(said) == {"an actor died and was started again (1 of 10)"}
    assert contents(url) == contents(str(tmp_path / "alone"))


def test_a_driver_that_is_killed_goes_on(run_url: str, expected: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL after some shards: the same command keeps them and ends in the same bytes."""
    url = tmp_path / "samples"
    command = [
        *(sys.executable, "-m", "scoreray.cluster.cli", "sample", run_url, "--out", str(url), "--count", "150"),
        *("--steps", "3", "--seed", "7", "--format", "webdataset", "--samples-per-shard", str(SHARD)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + PATIENCE_S
    while not (url / "packing" / "000000").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (url / "manifest.json").exists()
    first = (url / "shards" / "000000.tar").stat()
    made: list[PackedShard] = []

    def spied(samples: SamplePlan, numbers: object) -> object:
        for packed in in_this_process()(samples, numbers):  # type: ignore[arg-type]
            made.append(packed)
            yield packed

    draw(str(url), run_url, mapper=spied, format="webdataset")  # type: ignore[arg-type]
    assert made[0].kept
    assert not all(packed.kept for packed in made)
    assert (url / "shards" / "000000.tar").stat().st_mtime_ns == first.st_mtime_ns
    assert contents(str(url)) == expected


def test_a_damaged_shard_is_drawn_again(run_url: str, expected: dict[str, bytes], tmp_path: Path) -> None:
    url = tmp_path / "samples"

    def stop_after_two(samples: SamplePlan, numbers: object) -> object:
        for number, packed in enumerate(in_this_process()(samples, numbers)):  # type: ignore[arg-type]
            yield packed
            if number == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(str(url), run_url, mapper=stop_after_two, format="webdataset")  # type: ignore[arg-type]
    shard = url / "shards" / "000001.tar"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    draw(str(url), run_url, format="webdataset")
    assert contents(str(url)) == expected


def damage(place: Path, name: str, how: str) -> None:
    if how == "removed":
        (place / name).unlink()
    elif how == "cut":
        os.truncate(place / name, (place / name).stat().st_size // 2)
    else:  # a byte of it, at the same size
        data = bytearray((place / name).read_bytes())
        data[len(data) // 2] ^= 1
        (place / name).write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damages", "drawn"),
    [
        ("webdataset", {"shards/000000.tar": "cut", "shards/000003.tar": "removed"}, [0, 3]),
        ("webdataset", {"shards/000001.tar": "changed", "index.bin": "changed", "manifest.json": "cut"}, [1]),
        ("png", {"000033.png": "removed", "000149.png": "changed"}, [1, 4]),
        ("png", {"samples.png": "cut"}, []),
        ("x.npz", {"x.npz": "cut"}, [0, 1, 2, 3, 4]),
    ],
)
def test_what_is_missing_or_damaged_of_a_finished_job_is_drawn_again(
    run_url: str,
    name: str,
    damages: dict[str, str],
    drawn: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    npz = name.endswith(".npz")
    url, format = str(tmp_path / name) if npz else str(tmp_path), "npz" if npz else name
    draw(url, run_url, format=format)
    undisturbed = contents(str(tmp_path))
    numbers: list[int] = []
    make = SamplePlan.make
    monkeypatch.setattr(SamplePlan, "make", lambda self, i, scratch: numbers.append(i) or make(self, i, scratch))
    for lost in (damages, {}):
        for key, how in lost.items():
            damage(tmp_path, key, how)
        numbers.clear()
        sample_to(url, run_url, None, REQUEST, format=format, samples_per_shard=SHARD)
        assert contents(str(tmp_path)) == undisturbed
        assert numbers == (drawn if lost else [])
        printed = capsys.readouterr().err
        assert ("missing or damaged, and made again" in printed) == bool(lost)
        assert ("drawn before" in printed) == (not lost)


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("name", ["webdataset", "png", "x.npz"])
def test_of_two_starts_of_a_job_the_newer_goes_on(run_url: str, name: str, interrupted: bool, tmp_path: Path) -> None:
    """The older one ends in one line and leaves nothing of its own, whether the newer one is done or under way."""
    npz = name.endswith(".npz")
    expected_at, at = tmp_path / "expected", tmp_path / "samples"
    words = {"format": "npz" if npz else name}
    draw(str(expected_at / name if npz else expected_at), run_url, **words)
    url = str(at / name if npz else at)

    def stop_after_one(samples: SamplePlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
        yield next(iter(in_this_process()(samples, numbers)))
        raise KeyboardInterrupt

    def overtaken(samples: SamplePlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
        shards = iter(in_this_process()(samples, numbers))
        yield next(shards)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                draw(url, run_url, mapper=stop_after_one, **words)
        else:
            draw(url, run_url, **words)
        yield from shards

    with pytest.raises(TakenOver, match="another start of this job has taken over"):
        draw(url, run_url, mapper=overtaken, **words)
    if interrupted:
        assert contents(str(at)).keys() != contents(str(expected_at)).keys()
        draw(url, run_url, **words)
    assert contents(str(at)) == contents(str(expected_at))


@pytest.mark.parametrize(
    ("format", "left"),
    [
        ("webdataset", "shards/.part-000000.tar-x"),
        ("png", "samples.unfinished/shards/.part-000000.tar-x"),
        ("png", "samples.unfinished/packing/.part-000000-x"),
        ("png", ".part-000002.png-x"),
    ],
)
def test_what_a_killed_write_left_is_removed(run_url: str, format: str, left: str, tmp_path: Path) -> None:
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_bytes(b"half")
    draw(str(tmp_path), run_url, replace(REQUEST, count=4), format=format)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    pictures = {*(f"{i:06d}.png" for i in range(4)), "samples.png"}
    data_set = {"shards", "shards/000000.tar", "index.bin", "manifest.json"}
    assert names == {"sampling.json"} | (pictures if format == "png" else data_set)


@pytest.mark.parametrize("name", ["webdataset", "png"])
@pytest.mark.parametrize(
    "stranger",
    ["000002.png", "123456.png", "samples.png", "manifest.json", "index.bin", "shards/x.tar", "packing/plan"],
)
def test_a_place_of_another_origin_is_refused(run_url: str, name: str, stranger: str, tmp_path: Path) -> None:
    """Before anything is written there, so that no kill can leave a claim on it."""
    store = open_store(str(tmp_path))
    store.put(stranger, b"mine")
    store.put("notes/000001.png", b"no matter")
    with pytest.raises(UserError, match=f"{stranger}: is there already, of another origin"):
        begin(place_of(str(tmp_path), name), run_url, None, replace(REQUEST, count=5))
    assert contents(str(tmp_path)) == {stranger: b"mine", "notes/000001.png": b"no matter"}
    store.delete([stranger])
    begin(place_of(str(tmp_path), name), run_url, None, replace(REQUEST, count=5))


def test_samples_that_are_not_finite_are_the_callers_mistake(run_url: str, tmp_path: Path) -> None:
    for weight in (1e30, -101.0, float("nan")):
        with pytest.raises(UserError, match=r"guidance weight .*: must be in \[-100, 100\]"):
            Guidance(weight)
    with pytest.raises(UserError, match="ended in values that are not finite"):
        sample(lambda x, sigma: x * float("inf"), torch.ones(2, 3), torch.tensor([1.0, 0.5, 0.0]), sampler="heun")


def test_levels_in_the_place_of_a_grid_are_recorded_and_draw_the_same_again(run_url: str, tmp_path: Path) -> None:
    url, request = str(tmp_path / "samples"), replace(REQUEST, count=2, steps=None, grid="5,0.5")
    draw(url, run_url, request)
    stored = SampleRecord.from_json(open_store(url).get("sampling.json"), request.batch_size).job.request
    assert (stored.grid, stored.steps) == ((5.0, 0.5), 2)
    place = place_of(url, "auto")
    *_, recorded = begin(place, run_url, None, replace(request, steps=2, grid=(5, 0.5)), samples_per_shard=SHARD)
    assert recorded is not None
    draw(str(tmp_path / "again"), run_url, stored)
    first, again = contents(url), contents(str(tmp_path / "again"))
    assert {key: data for key, data in first.items() if key.startswith("shards/")} == {
        key: data for key, data in again.items() if key.startswith("shards/")
    }
    with pytest.raises(UserError, match="grid"):
        begin(place, run_url, None, replace(request, grid="5,0.4"), samples_per_shard=SHARD)


def test_another_request_at_the_same_place_is_refused(run_url: str, tmp_path: Path) -> None:
    url = str(tmp_path / "samples")
    request = replace(REQUEST, count=4)
    draw(url, run_url, request, format="png")
    for other, words in (
        (replace(request, seed=8), "seed 7, not 8"),
        (replace(request, count=5), "count 4, not 5"),
        (replace(request, sampler="euler"), "sampler 'heun', not 'euler'"),
        (replace(request, guidance=2.0), "guidance"),
    ):
        with pytest.raises(UserError, match=words):
            begin(place_of(url, "png"), run_url, None, other, samples_per_shard=SHARD)
    with pytest.raises(
        UserError, match="sampler 'heun' has no option 's_churm'"
    ):  # a mistake comes before what differs
        begin(place_of(url, "png"), run_url, None, replace(request, options={"s_churm": 1.0}))
    with pytest.raises(UserError, match="eta = 7"):
        replace(request, sampler="ddim", options={"eta": 7})
    *_, recorded = begin(place_of(url, "png"), run_url, None, request, samples_per_shard=SHARD)
    assert recorded is not None
    assert list(recorded) == ["000000.png to 000003.png", "samples.png"]
    store = open_store(url)
    store.put("sampling.json", json.dumps(json.loads(store.get("sampling.json")) | {"version": 1}).encode())
    with pytest.raises(UserError, match=r"another request are there \(version 1, not 2\)"):  # of another keyed noise
        begin(place_of(url, "png"), run_url, None, request, samples_per_shard=SHARD)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "000000.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="of another origin"):
        begin(place_of(str(tmp_path / "pictures")), run_url, None, request)
    assert not (tmp_path / "pictures" / "sampling.json").exists()


def test_a_newer_checkpoint_does_not_mix_into_a_job_that_began(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run(str(tmp_path / "run"))
    place = place_of(str(tmp_path / "samples"))
    job, _, _ = begin(place, run, None, replace(REQUEST, count=4))
    new_run(run, 128, seed=1)
    again, model, _ = begin(place, run, None, replace(REQUEST, count=4))
    assert again.to_json() == job.to_json()
    assert model.info.images_seen == 64


@pytest.mark.parametrize("shape", [(1, 8, 8), (5,)])
def test_npz_holds_what_the_shards_hold(new_run: NewRun, shape: tuple[int, ...], tmp_path: Path) -> None:
    run = new_run(str(tmp_path / "run"), shape=shape)
    request = replace(REQUEST, count=70)
    place = draw(str(tmp_path / "a.npz"), run, request)
    draw(str(tmp_path / "b.npz"), run, replace(request, batch_size=3))
    assert place == str(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(place) as arrays:
        model = load(run)
        labels = request.labels(0, 70, model.info)
        x = prepare(in_form(model, Form()), request.fitted(model.info))(request.sample_seeds(0, len(labels)), labels)
        images = ((x + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1) if len(shape) == 3 else x
        assert np.array_equal(arrays["images"], images.numpy().astype(arrays["images"].dtype))
        assert arrays["images"].dtype == (np.uint8 if len(shape) == 3 else np.float32)
        assert arrays["labels"].tolist() == labels.tolist()
        assert arrays["seeds"].tolist() == [(7 << 32) + i for i in range(70)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.json", "b.npz", "b.npz.json", "run"]


def test_samples_of_a_field_leave_in_its_own_units(new_run: NewRun, tmp_path: Path) -> None:
    """Whatever the format: of an array the run's normalisation is undone, and nothing is rounded to 256 levels."""
    field = TargetField("height", "array", "float32", Normaliser("channel", (250.0,), (40.0,)))
    plain, scaled = (new_run(str(tmp_path / name), shape=(1, 4, 4), target=target)
                     for name, target in (("plain", None), ("scaled", field)))  # fmt: skip
    found = dict[str, np.ndarray]()
    for name, run in (("plain", plain), ("scaled", scaled)):
        draw(str(tmp_path / f"{name}.npz"), run, replace(REQUEST, count=5))
        with np.load(tmp_path / f"{name}.npz") as arrays:
            found[name] = arrays["images"]
    assert found["plain"].dtype == np.uint8
    assert found["scaled"].shape == (5, 1, 4, 4)
    exact = ((found["scaled"] - 250) / 40 + 1) * 127.5
    assert np.abs(exact.transpose(0, 2, 3, 1).clip(0, 255) - found["plain"]).max() <= 0.51
    draw(str(tmp_path / "shards"), scaled, replace(REQUEST, count=5), format="webdataset")
    assert np.array_equal(read_samples(str(tmp_path / "shards"), range(5)).numpy(), found["scaled"])
    with pytest.raises(UserError, match=r"samples of shape \[1, 4, 4\] are no pictures; give --format webdataset"):
        draw(str(tmp_path / "pictures"), scaled, replace(REQUEST, count=5), format="png")


def test_rows_of_a_call_are_fixed_and_do_not_change_with_the_batch(run_url: str) -> None:
    """Whatever the batch: a sample's bits depend on its seed alone."""
    model = load(run_url)
    sizes: list[int] = []
    model.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    driven = in_form(model, Form(rows=16))
    assert isinstance(driven, InRows)
    for guidance in (Guidance(), Guidance(2.0)):
        request = replace(REQUEST, guidance=guidance, sampler="edm_sde").fitted(model.info)
        labels, seeds = torch.arange(37) % 3, request.sample_seeds(0, 37)
        whole = prepare(driven, request)(seeds, labels)
        parts = zip(seeds.split(5), labels.split(5), strict=True)
        alone = torch.cat([prepare(driven, request)(few, given) for few, given in parts])
        assert torch.equal(whole, alone)
    assert set(sizes) == {16}


def test_where_the_place_in_a_call_matters_calls_have_one_row(
    run_url: str, new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    even = load(run_url)
    assert steady_rows(even, 16) == 16
    monkeypatch.setattr(
        type(even), "forward", lambda self, x, sigma, labels: x + torch.arange(len(x)).view(-1, 1, 1, 1)
    )
    assert steady_rows(even, 16) == 1


def test_compiling_is_chosen_where_it_pays(run_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(run_url)
    assert isinstance(model, LoadedDenoiser)
    small = Request(64).fitted(model.info)
    assert network_calls(small, model.info, 16) == 35 * 4
    assert network_calls(replace(small, guidance=2.0), model.info, 16) == 35 * 8
    monkeypatch.setattr("scoreray.sampling.offline.driver.call_s", lambda model, rows: 0.05)
    precisions: list[str] = []

    def make_fast(model: LoadedDenoiser, rows: int, *, precision: str, compile_: str) -> object:
        precisions.append(precision)
        return type("Fast", (), {"name": "bf16, compiled", "denoiser": model})

    monkeypatch.setattr("scoreray.sampling.offline.driver.make_fast", make_fast)
    assert choose_form(model, small, precision="auto", compile_="auto") == Form("fp32", False)
    large = replace(small, count=50_000)
    assert choose_form(model, large, precision="auto", compile_="auto") == Form("bf16", True)
    assert choose_form(model, large, precision="fp32", compile_="off") == Form("fp32", False)
    assert precisions == ["auto"]


def test_rays_messages_are_kept_off_stdout_and_actors_that_we_end_are_not_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private import worker

    from scoreray.cluster.connect.local_ray import _off_stdout

    monkeypatch.setattr(worker, "print_to_stdstream", printed_by_ray)
    dead = "Task DrawingActor.make failed. Error: The actor is dead because it was "
    for verbose in (True, False):
        with _off_stdout(verbose):
            for message in (dead + "killed by `ray.kill`.", dead + "out of memory."):
                worker.print_to_stdstream({"lines": [message], "pid": "raylet", "is_err": False}, ignore_prefix=False)
            worker.print_to_stdstream({"lines": [f"{verbose}"], "pid": 7, "is_err": False}, ignore_prefix=False)
    out, err = capsys.readouterr()
    assert (out, err) == ("", dead + "out of memory.\nTrue\nFalse\n")


def printed_by_ray(data: dict[str, Any], ignore_prefix: bool) -> None:
    for line in data["lines"]:
        print(line, file=sys.stderr if data["is_err"] else sys.stdout)


@pytest.mark.parametrize("format", ["auto", "png", "webdataset"])
def test_a_folder_has_no_files_name(format: str, tmp_path: Path) -> None:
    for name in ("grid.png", "GRID.PNG", "a.jpg", "a.jpeg", "a.webp", "a.tiff", "a.npy", "a.tar", "a.zip", "a.json"):
        for where in (str(tmp_path), "s3://bucket/prefix"):
            words = "--picture" if name[-3:].lower() in ("png", "jpg", "peg", "ebp") else "only .npz is one file"
            with pytest.raises(UserError, match=rf"--out .*{name}: is the name of a .* file.*{words}"):
                place_of(f"{where}/{name}", format)
    for name in ("samples", "ema-0.050", "v1.2", "grid.png/", "a.b"):
        assert place_of(f"{tmp_path}/{name}", format).format != "npz"
    assert place_of(f"{tmp_path}/S.NPZ").format == "npz"
    assert not list(tmp_path.iterdir())


PICTURES = {"a.png": "PNG", "A.PNG": "PNG", "a.jpg": "JPEG", "a.jpeg": "JPEG", "a.webp": "WEBP"}


def test_a_picture_has_the_format_of_its_name(run_url: str, tmp_path: Path) -> None:
    request = replace(REQUEST, count=2)
    for name, format in PICTURES.items():
        sample_to(str(tmp_path / "s.npz"), run_url, None, request, picture=tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.format == format
            assert image.width > 16
    words = ["--count=2", "--steps=2", "--out", str(tmp_path / "d"), "--picture", str(tmp_path / "d.jpg")]
    cli.app(["sample", run_url, *words], standalone_mode=False)
    assert (tmp_path / "d.jpg").read_bytes()[:3] == b"\xff\xd8\xff"
    with pytest.raises(UserError, match=r"is the name of a \.png file"):
        cli.app(["export", run_url, str(tmp_path / "model.png")], standalone_mode=False)


@pytest.mark.parametrize(("out", "picture", "words"), [
    ("s.npz", "s.npz", "must end in .png"),
    ("s.npz", "grid", "must end in .png"),
    ("s.npz", "grid.pdf", "must end in .png"),
    ("s.npz", "nowhere/grid.png", "its folder is not there"),
    ("s.npz", "folder.png", "is a folder"),
    ("d", "d/000001.png", "is one of the files that --out makes"),
    ("d", "d/../d/samples.png", "is one of the files that --out makes"),
    ("d", "link/000000.png", "is one of the files that --out makes"),
], ids=str)  # fmt: skip
def test_two_outputs_are_two_files(out: str, picture: str, words: str, run_url: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "d")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=re.escape(words)):
        sample_to(str(tmp_path / out), run_url, None, replace(REQUEST, count=2), picture=tmp_path / picture)
    assert sorted(tmp_path.rglob("*")) == before
    beside = tmp_path / "d" / "mine.png"
    sample_to(str(tmp_path / "d"), run_url, None, replace(REQUEST, count=2), picture=beside)
    assert Image.open(beside).format == "PNG"
