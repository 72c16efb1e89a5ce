"""Training straight from tars without a manifest: what their samples show, who reads which tar, resumes, bad input."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from typer.testing import CliRunner

from scoreray.cluster.cli.main import app
from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.shards import encode
from scoreray.data.reading.quarantine import Quarantine
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.data.storage.patterns import expand, find_tars
from scoreray.data.storage.store import open_store
from scoreray.data.unpacked.tar_stream import STRIDE, FinishedTar, TarStream, deal
from scoreray.data.unpacked.tars import TarSettings, UnpackedTars, open_data

NUM_TARS, COUNT = 6, 21  # samples of a tar: no multiple of the batch
BATCH = 8
CLASSES = TarSettings(num_classes=3)


def image(number: int, size: int = 8, channels: int = 1) -> np.ndarray:
    """uint8 [H, W, C]: pixel (0, 0) is the sample's number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, channels), np.uint8)
    pixels[0, 0] = number
    return pixels


def write_tar(path: Path, samples: list[dict[str, object]]) -> None:
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)


def sample_of(number: int, **members: bytes) -> dict[str, object]:
    return {"__key__": f"{number:05d}", "png": encode(image(number), "png"), "cls": b"%d" % (number % 3), **members}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six tars of 21 grey pictures of 8 x 8 in three classes, in brace notation. Not to be written to."""
    folder = tmp_path_factory.mktemp("tars")
    for tar in range(NUM_TARS):
        numbers = range(tar * COUNT, (tar + 1) * COUNT)
        write_tar(folder / f"x-{tar:02d}.tar", [sample_of(number) for number in numbers])
    return f"{folder}/x-{{00..05}}.tar"


@pytest.fixture
def changed(tars: str, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the tars that a test may damage: changed() is its folder."""

    def copy() -> Path:
        for path in expand(tars):
            (tmp_path / Path(path).name).write_bytes(Path(path).read_bytes())
        return tmp_path

    return copy


def opened(data: UnpackedTars | object, rank: int = 0, world_size: int = 1, **options) -> TarStream:
    assert isinstance(data, UnpackedTars)
    options = {"global_batch_size": BATCH, "seed": 3, "shuffle_block": 4} | options
    return TarStream(data, rank=rank, world_size=world_size, **options)


def numbers_in(stream: TarStream, num_batches: int) -> list[int]:
    """Pixel (0, 0) of the images of the next batches: the numbers of the samples."""
    batches = itertools.islice(stream, num_batches)
    return [int(pixel) for batch in batches for pixel in batch.images[:, 0, 0, 0]]


def test_the_first_samples_show_shape_type_classes_and_scale(tars: str) -> None:
    data = open_data(tars, CLASSES)
    assert isinstance(data, UnpackedTars)
    assert (data.shape, data.dtype, data.classes, data.num_samples) == ([1, 8, 8], "uint8", ["0", "1", "2"], None)
    pixels = np.stack([image(number) for number in range(NUM_TARS * COUNT)]) / 127.5 - 1
    assert data.sigma_data == pytest.approx(pixels.std())
    assert data.channel_means() == pytest.approx([pixels.mean()])
    assert data.std == pytest.approx([pixels.std()])


def test_inspect_shows_what_the_first_samples_show(tars: str) -> None:
    said = CliRunner().invoke(app, ["data", "inspect", tars, "--json"])
    found = json.loads(said.stdout)
    assert (found["num_tars"], found["num_looked_at"], found["shape"], found["labels"]) == (6, 126, [1, 8, 8], [0, 2])
    assert found["sigma_data"] == pytest.approx(open_data(tars, CLASSES).sigma_data)


def test_an_epoch_hands_out_every_sample_with_its_label_and_number(tars: str) -> None:
    with opened(open_data(tars, CLASSES)) as stream:
        seen: Counter[int] = Counter()
        while len({one.tar for one in stream.finished if one.epoch == 0}) < NUM_TARS:
            batch = next(stream)
            numbers = batch.images[:, 0, 0, 0].long()
            seen.update(numbers.tolist())
            assert torch.equal(batch.labels, numbers % 3)
            assert torch.equal(batch.index, numbers // COUNT * STRIDE + numbers % COUNT)
            for pixels, number in zip(batch.images, numbers.tolist(), strict=True):
                assert np.array_equal(pixels.permute(1, 2, 0).numpy(), image(number))
    assert set(seen) == set(range(NUM_TARS * COUNT))
    assert max(seen.values()) <= 2, "a sample waits in the shuffle while the next epoch begins, for long by chance only"


def test_ranks_share_positions_exactly_and_tars_by_the_whole(tars: str) -> None:
    data = open_data(tars, CLASSES)
    num_batches = NUM_TARS * COUNT // BATCH // 2
    positions, read = [], []
    for rank in range(2):
        with opened(data, rank, 2) as stream:
            batches = list(itertools.islice(stream, num_batches))
        positions += [batch.position for batch in batches]
        read.append({number // STRIDE for batch in batches for number in batch.index.tolist()})
        assert all(len(batch.index) == BATCH // 2 for batch in batches)
    assert torch.cat(positions).sort().values.tolist() == list(range(num_batches * BATCH))
    assert read[0].isdisjoint(read[1])


def test_each_epoch_deals_every_tar_once_at_any_world_size() -> None:
    for world_size, epoch in itertools.product((1, 2, 3, 4), range(3)):
        dealt = [deal(10, "seed", epoch, {2, 5}, rank, world_size) for rank in range(world_size)]
        assert sorted(itertools.chain(*dealt)) == [0, 1, 3, 4, 6, 7, 8, 9]
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    longest = [max(range(3), key=lambda rank: len(deal(10, "seed", epoch, (), rank, 3))) for epoch in range(3)]
    assert sorted(longest) == [0, 1, 2], "another rank has one more each time"


def test_the_same_seed_and_position_give_the_same_batches(tars: str) -> None:
    data = open_data(tars, CLASSES)
    with opened(data) as one, opened(data) as same, opened(data, seed=4) as other:
        first = numbers_in(one, 10)
        assert numbers_in(same, 10) == first
        assert numbers_in(other, 10) != first


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resume_goes_on_with_the_tars_that_were_not_finished(world_size: int, tars: str) -> None:
    data = open_data(tars, CLASSES)
    seen: list[int] = []
    finished: list[FinishedTar] = []
    for rank in range(2):
        with opened(data, rank, 2) as stream:
            seen += numbers_in(stream, 10)
            finished += stream.finished
            position = stream.position
    done = {one.tar for one in finished}
    assert 0 < len(done) < NUM_TARS
    streams = [
        opened(data, rank, world_size, position=position, finished=finished, global_batch_size=9)
        for rank in range(world_size)
    ]
    resumed: list[int] = []
    for stream in streams:
        with stream:
            while sum(one.epoch == 0 for one in stream.finished) < len(
                range(stream.lanes.rank, NUM_TARS - len(done), world_size)
            ):
                resumed += numbers_in(stream, 1)
    assert {number // COUNT for number in resumed[:COUNT]}.isdisjoint(done)
    assert set(seen) | set(resumed) == set(range(NUM_TARS * COUNT)), "none is left out"


def test_a_fresh_epoch_begins_when_all_tars_are_finished(tars: str) -> None:
    finished = [FinishedTar(0, tar) for tar in range(NUM_TARS)] + [FinishedTar(1, tar) for tar in range(1, NUM_TARS)]
    with opened(open_data(tars, CLASSES), finished=finished) as stream:
        assert sorted(numbers_in(stream, 2))[0] // COUNT == 0
        while not stream.finished:
            next(stream)
        assert stream.finished == [FinishedTar(1, 0)]


def test_pictures_of_several_sizes_are_fitted_on_demand(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [sample_of(i) | {"png": encode(image(i, 8 + i % 3, 3), "png")} for i in range(6)])
    with pytest.raises(DataError, match=r"is 9 x 9 pixels, the first sample has 8 x 8; data.image_size"):
        open_data(f"{tmp_path}/0.tar", CLASSES)
    data = open_data(f"{tmp_path}/0.tar", TarSettings(3, image_size=4))
    assert data.shape == [3, 4, 4]
    with opened(data) as stream:
        assert next(stream).images.shape == (BATCH, 3, 4, 4)


def test_grey_pictures_among_coloured_ones_and_arrays_of_floats(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", [sample_of(i) | {"png": encode(image(i, 8, 1 + 2 * (i % 2)), "png")} for i in range(4)]
    )
    with opened(open_data(f"{tmp_path}/a.tar", CLASSES)) as stream:
        assert next(stream).images.shape == (BATCH, 3, 8, 8)
    file = io.BytesIO()
    np.save(file, np.linspace(-1, 1, 5, dtype=np.float32))
    write_tar(tmp_path / "b.tar", [{"__key__": f"{i}", "npy": file.getvalue()} for i in range(4)])
    data = open_data(f"{tmp_path}/b.tar")
    assert (data.shape, data.dtype, data.classes) == ([5], "float32", [])
    with opened(data) as stream:
        batch = next(stream)
    assert batch.images.shape == (BATCH, 5)
    assert batch.labels.tolist() == [-1] * BATCH


def test_a_prefix_of_tars_and_a_list_name_the_same(tars: str) -> None:
    folder = str(Path(tars).parent)
    by_prefix, by_list = open_data(folder, CLASSES), open_data(expand(tars), CLASSES)
    assert by_prefix.identity == by_list.identity == open_data(tars, CLASSES).identity
    assert open_data(expand(tars)[:5], CLASSES).identity != by_list.identity


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ([], "an empty list names no tars"),
        ("s3://bucket/x-{0..3.tar", "braces don't pair"),
        ("s3://bucket/x-{0..99999999999}.tar", "over 2,000,000 tars"),
        ("s3://bucket/x-{0..9}{0..9}{0..99999}.tar", "over 2,000,000 tars"),
        (["/a/x.tar", "/a/x.tar"], "'/a/x.tar': is named twice"),
        ("pipe:cat x.tar", "runs a command, which is never done"),
        (["pipe:aws s3 cp s3://b/x.tar -"], "runs a command, which is never done"),
        ("https://host/x-{0..3}.tar", "copy them there first"),
        ("http://host/set", "copy them there first"),
        ("/a/x-{0..3}.tgz", "is not the name of a tar"),
    ],
)
def test_a_name_of_no_tars_is_one_line(url: str | list[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        open_data(url)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.url: ")


def test_one_missing_tar_of_many_is_named_before_anything_is_read(changed: Callable[[], Path]) -> None:
    folder = changed()
    (folder / "x-03.tar").unlink()
    with pytest.raises(UserError, match=r"x-03.tar: there is no such tar; 5 of the 6 that were named are there"):
        open_data(f"{folder}/x-{{00..05}}.tar", CLASSES)


def test_settings_that_the_samples_can_not_show(tars: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.num_classes: samples have classes \(0 to 2 in the first 126\)"):
        open_data(tars)
    assert open_data(tars, TarSettings(num_classes=0)).classes == []
    with pytest.raises(UserError, match="6 tars can't be shared by 8 workers"):
        opened(open_data(tars, CLASSES), 0, 8)
    write_tar(tmp_path / "0.tar", [{"__key__": "a", "png": encode(image(1), "png")}])
    with pytest.raises(UserError, match=r"data.num_classes: 3, and none of the first 1 samples has a class"):
        open_data(f"{tmp_path}/0.tar", CLASSES)
    write_tar(tmp_path / "0.tar", [{"__key__": "a", "txt": b"a caption"}])
    with pytest.raises(DataError, match=r"0.tar: byte 512: sample 'a' has no image"):
        open_data(f"{tmp_path}/0.tar")


def test_samples_without_a_class_among_others_are_noted(tmp_path: Path) -> None:
    without = {"__key__": "x", "png": encode(image(1), "png")}
    write_tar(tmp_path / "0.tar", [sample_of(0), without, sample_of(2)])
    data = open_data(f"{tmp_path}/0.tar", CLASSES)
    assert isinstance(data, UnpackedTars)
    promise, classes = data.notes()
    assert f"scoreray data pack '{tmp_path}/0.tar' {tmp_path} indexes them in place" in promise
    assert classes.startswith("data.num_classes: 1 of the first 3 samples have no class")
    resized = open_data(f"{tmp_path}/0.tar", TarSettings(num_classes=3, image_size=4))
    assert isinstance(resized, UnpackedTars)
    assert "scoreray data pack TARS URL --image-size 4 makes new tars of them" in resized.notes()[0]
    with opened(data) as stream:
        assert set(next(stream).labels.tolist()) <= {-1, 0, 2}


LATE = 5 * COUNT + 20  # the last sample of the last tar: the look at the first samples does not reach it


def late(folder: Path, sample: dict[str, object]) -> str:
    """The URL of the tars, with `sample` in the place of the last one of 60 of a tar."""
    write_tar(folder / "x-05.tar", [sample_of(number) for number in range(100, 160)] + [sample])
    return f"{folder}/x-{{00..05}}.tar"


@pytest.mark.parametrize(
    ("sample", "line"),
    [
        (sample_of(200, cls=b"3"), "has class 3, and data.num_classes is 3"),
        (sample_of(200, cls=b"cat"), "b'cat' is no class number .*data.num_classes=0 trains without classes"),
        (sample_of(200) | {"png": encode(image(200, 9), "png")}, "is 9 x 9 pixels, the first sample has 8 x 8"),
        (sample_of(200) | {"png": encode(image(200, 8, 3), "png")}, "has colours, and the first samples are grey"),
        (sample_of(200) | {"png": b"\x89PNG\r\n\x1a\n" + bytes(40)}, "is none of PNG"),
        ({"__key__": "lonely", "txt": b"no image"}, "sample 'lonely' has no image"),
    ],
)
def test_a_bad_sample_stops_the_run_or_is_quarantined(
    sample: dict[str, object], line: str, changed: Callable[[], Path]
) -> None:
    data = open_data(late(changed(), sample), CLASSES)
    with opened(data) as stream, pytest.raises(DataError, match=rf"x-05.tar: byte \d+: .*{line}"):
        numbers_in(stream, 60)
    with opened(data, quarantine=Quarantine(10)) as stream:
        numbers_in(stream, 60)
        assert {FinishedTar(0, tar) for tar in range(NUM_TARS)} <= set(stream.finished)
        (entry,) = stream.quarantined
    assert entry.shard.endswith("/x-05.tar")
    assert entry.sample == 5 * STRIDE + 60


def pickled(path: Path) -> None:
    write_tar(path, [sample_of(100), sample_of(101, pkl=b"cos\nsystem\n(S'true'\ntR.")])


def cut_between(path: Path) -> None:
    """Cut where a header begins: tarfile takes it for a whole tar."""
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[20].offset
    path.write_bytes(path.read_bytes()[:middle])


def cut_within(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-12_000])


def emptied(path: Path) -> None:
    write_tar(path, [])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (pickled, "is a pickle, which can run code"),
        (cut_between, "the tar ends here, without its end marker"),
        (cut_within, "are announced|end marker"),
        (emptied, "holds no sample"),
    ],
)
def test_a_damaged_tar_stops_the_run_or_what_it_lacks_is_counted(
    damage: Callable[[Path], None], line: str, changed: Callable[[], Path]
) -> None:
    folder = changed()
    data = open_data(f"{folder}/x-{{00..05}}.tar", CLASSES)
    damage(folder / "x-05.tar")
    data = UnpackedTars(**{**vars(data), "tars": tuple(find_tars(f"{folder}/x-{{00..05}}.tar"))})
    with opened(data) as stream, pytest.raises(DataError, match=rf"x-05.tar: byte \d+: .*({line})"):
        numbers_in(stream, 40)
    with opened(data, quarantine=Quarantine(10)) as stream:
        numbers_in(stream, 40)
        assert FinishedTar(0, 5) in stream.finished
        (entry,) = stream.quarantined
    assert entry.shard.endswith("/x-05.tar")
    assert entry.reason.endswith("the rest of this tar is left out")
    with pytest.raises(DataError):
        open_data(f"{folder}/x-05.tar", CLASSES)


def test_a_tar_that_goes_while_it_is_read_is_named(changed: Callable[[], Path]) -> None:
    folder = changed()
    data = open_data(str(folder), CLASSES)
    (folder / "x-02.tar").unlink()
    with opened(data) as stream, pytest.raises(DataError, match=r"x-02\.tar"):
        numbers_in(stream, 40)


def test_tars_none_of_which_can_be_read_any_more_end_a_run_that_quarantines(changed: Callable[[], Path]) -> None:
    folder = changed()
    data = open_data(str(folder), CLASSES)
    for path in folder.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    with opened(data, quarantine=Quarantine(1000)) as stream, pytest.raises(DataError, match="of all tars of rank 0"):
        numbers_in(stream, 1)


def test_reads_from_s3_run_ahead_and_are_counted(tars: str, s3_url: str, local_s3: LocalS3) -> None:
    for path in expand(tars):
        open_store(s3_url).put(Path(path).name, Path(path).read_bytes())
    with pytest.raises(UserError, match=r"s3://.*/x-06.tar: there is no such tar \(and 3 more"):
        open_data(f"{s3_url}/x-{{00..09}}.tar", CLASSES)
    remote = open_data(f"{s3_url}/x-{{00..05}}.tar", CLASSES)
    assert remote.identity == open_data(tars, CLASSES).identity
    with opened(remote) as stream, opened(open_data(tars, CLASSES)) as local:
        assert numbers_in(stream, 20) == numbers_in(local, 20)
        assert stream.stats.num_samples == 20 * BATCH
        assert stream.stats.num_requests >= NUM_TARS
        assert stream.stats.bytes_read >= sum(Path(path).stat().st_size for path in expand(tars))
