"""A data set in buckets: packed from every source, verified, resumed, read the same at every world size."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from scoreray.data.buckets.bucket_stream import BucketStream
from scoreray.data.buckets.bucketed import BucketedSet
from scoreray.data.errors import DataError, UserError
from scoreray.data.packing import commit
from scoreray.data.packing.pack import pack
from scoreray.data.packing.pack_buckets import pack_buckets
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.order import Order
from scoreray.data.reading.quarantine import Quarantine
from scoreray.data.reading.samples import SampleReader
from scoreray.data.reading.stream import default_shuffle_block
from scoreray.data.storage.store import open_store

SIZES = ((8, 8), (6, 10), (10, 6))
COUNTS = {"8x8": 23, "6x10": 12, "10x6": 3}  # the last has fewer than any batch
PICTURES = [
    (size, i) for size, count in zip(((16, 16), (12, 20), (20, 12)), COUNTS.values(), strict=True) for i in range(count)
]


def picture(number: int) -> Image.Image:
    """Picture `number`, of a grey level of its own, which resizing keeps."""
    (width, height), _ = PICTURES[number]
    return Image.fromarray(np.full((height, width, 3), 3 * number, np.uint8))


def png(number: int) -> bytes:
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return out.getvalue()


def levels(url: str) -> list[int]:
    """The numbers of the pictures that a packed set holds."""
    samples = SampleReader(url)
    return [int(one.float().mean()) // 3 for one in samples.read(range(samples.manifest.num_samples))[0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for number in range(len(PICTURES)):
        where = root / ("a" if number % 3 else "b")
        where.mkdir(exist_ok=True)
        (where / f"{number:03d}.png").write_bytes(png(number))
    return root


@pytest.fixture(scope="module")
def bucketed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BucketedSet:
    return pack_buckets(folder, tmp_path_factory.mktemp("set"), SIZES, samples_per_shard=7)


def check(data: BucketedSet) -> None:
    """Every picture is in the bucket of its shape, once, and the bytes are what the manifests say."""
    assert dict(zip(data.folders, data.counts, strict=True)) == COUNTS
    assert data.shapes_of("image") == [[3, 8, 8], [3, 10, 6], [3, 6, 10]]
    found = [levels(data.bucket_url(number)) for number in range(3)]
    assert [sorted(one) for one in found] == [list(range(23)), list(range(23, 35)), list(range(35, 38))]
    assert verify(data.url) == []


def test_a_folder(bucketed: BucketedSet) -> None:
    check(bucketed)
    check(BucketedSet.load(open_store(bucketed.url)))
    assert sum(bucketed.fields[1].class_counts) == 38
    values = np.concatenate([np.repeat(3.0 * np.arange(a, b), n) for a, b, n in ((0, 23, 64), (23, 38, 60))])
    assert bucketed.target.mean == pytest.approx([values.mean()] * 3)
    assert bucketed.target.std == pytest.approx([values.std()] * 3)
    assert bucketed.sigma_data == pytest.approx(values.std() / 127.5)


def test_tars_with_captions(tmp_path: Path) -> None:
    from scoreray.data.sources.field_options import parse_field_options

    (tmp_path / "tars").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / "tars" / f"{shard}.tar", "w") as tar:
            for number in range(shard, len(PICTURES), 3):
                for kind, data in (("png", png(number)), ("txt", f"picture {number}".encode())):
                    info = tarfile.TarInfo(f"{number:05d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    options = parse_field_options(["text=txt"])
    data = pack_buckets(tmp_path / "tars", tmp_path / "set", SIZES, fields=options)
    check(data)
    assert [one.name for one in data.fields] == ["image", "text"]
    again = pack_buckets(tmp_path / "tars", tmp_path / "set", (*SIZES,), fields=options)
    assert again.identity == data.identity


def test_parquet(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(len(PICTURES))], "text": ["x"] * len(PICTURES)}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet", row_group_size=10)
    check(pack_buckets(tmp_path / "a.parquet", tmp_path / "set", SIZES))


def test_an_image_folder_with_metadata(folder: Path, tmp_path: Path) -> None:
    from scoreray.data.sources.field_options import parse_field_options

    for number in range(len(PICTURES)):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    lines = [json.dumps({"file_name": f"{n}.png", "text": str(n)}) for n in range(len(PICTURES))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    check(
        pack_buckets(
            tmp_path, tmp_path.parent / f"{tmp_path.name}-set", SIZES, fields=parse_field_options(["text=text"])
        )
    )


OWN = """
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from PIL import Image
from scoreray.data.fields.field import Field

@dataclass(frozen=True)
class Pictures:
    folder: str
    fields = [Field("image", "image", [3, 1, 1], "uint8", "")]

    @property
    def files(self):
        return sorted(Path(self.folder).rglob("*.png"), key=lambda path: path.name)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        file = self.files[number]
        return {"image": file.read_bytes() if number % 2 else np.asarray(Image.open(file))}
"""


def test_a_source_of_somebody_else(own_package: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    own_package("theirs", data=OWN)
    check(pack_buckets("theirs.data:Pictures", tmp_path / "set", SIZES, source_options={"folder": str(folder)}))


def test_a_killed_pack_goes_on_and_ends_in_the_same_bytes(
    folder: Path, bucketed: BucketedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, real = [0], commit.pack_shard

    def dying(plan: Any, number: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(plan, number)

    monkeypatch.setattr(commit, "pack_shard", dying)
    for shards in (0, 2, 3):  # of 2, 4 and 1
        left[0] = shards
        with pytest.raises(KeyboardInterrupt):
            pack_buckets(folder, tmp_path / "set", SIZES, samples_per_shard=7)
        with pytest.raises(UserError, match="a pack has begun there"):
            Manifest.load(open_store(tmp_path / "set"))
        with pytest.raises(UserError, match="another source, or with other arguments"):
            pack_buckets(folder, tmp_path / "set", SIZES[1:], samples_per_shard=7)
    monkeypatch.setattr(commit, "pack_shard", real)
    again = pack_buckets(folder, tmp_path / "set", SIZES, samples_per_shard=7)
    names = [key for key, _ in open_store(bucketed.url).list()]
    assert [key for key, _ in open_store(again.url).list()] == names
    for name in names:
        if not name.endswith(".json"):
            assert open_store(again.url).get(name) == open_store(bucketed.url).get(name)
    assert again.identity == bucketed.identity


def test_other_places_and_damage_are_one_line(folder: Path, bucketed: BucketedSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a data set in buckets .*give that of one of them, .*WIDTHxHEIGHT"):
        Manifest.load(open_store(bucketed.url))
    with pytest.raises(UserError, match="holds a data set in buckets"):
        pack(folder, bucketed.url, image_size=8)
    with pytest.raises(UserError, match="holds another data set"):
        pack_buckets(folder, bucketed.url, SIZES[:2])
    with pytest.raises(DataError, match=r"16 x 16 pixels would be enlarged 2.50 times to 40 x 40, --max-enlarge is 2"):
        pack_buckets(folder, tmp_path / "large", [(40, 40)])
    assert sum(pack_buckets(folder, tmp_path / "larger", [(40, 40)], max_enlarge=4).counts) == 38
    made = pack_buckets(folder, tmp_path / "set", SIZES)
    shard = tmp_path / "set" / "6x10" / "shards" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert "6x10" in "".join(verify(made.url))
    (tmp_path / "set" / "6x10" / "manifest.json").write_bytes(b"{}")
    assert "is not the manifest that buckets.json lists" in "".join(verify(made.url))


BATCH = 8


Row = tuple[int, int, tuple[int, ...], int]


def read(
    data: BucketedSet, world_size: int, position: int, batches: int, batch_size: int = BATCH, **options: Any
) -> list[list[Row]]:
    """Global batches, all ranks' parts put together: position, index, shape and level of each sample."""
    found: list[list[Row]] = [[] for _ in range(batches)]
    for rank in range(world_size):
        stream = BucketStream(
            data, global_batch_size=batch_size, rank=rank, world_size=world_size, seed=7, position=position, **options
        )
        for rows, batch in zip(found, itertools.islice(stream.batches(position), batches), strict=True):
            levels = (batch.images.float().mean((1, 2, 3)) / 3).round().int().tolist()
            shapes = [tuple(batch.images.shape[1:])] * len(levels)
            rows += zip(batch.position.tolist(), batch.index.tolist(), shapes, levels, strict=True)
            stream.handed_out(batch)
        stream.close()
    return [sorted(rows) for rows in found]


@pytest.fixture(scope="module")
def whole(bucketed: BucketedSet) -> list[Any]:
    return read(bucketed, 1, 0, 40)


def test_a_thread_hands_out_the_same(bucketed: BucketedSet, whole: list[Any]) -> None:
    with BucketStream(bucketed, global_batch_size=BATCH, rank=0, world_size=1, seed=7, position=3 * BATCH) as stream:
        indices = [next(stream).index.tolist() for _ in range(5)]
    assert indices == [[row[1] for row in batch] for batch in whole[3:8]]
    assert (stream.position, stream.stats.num_samples) == (8 * BATCH, 5 * BATCH)


def test_each_batch_is_of_one_bucket_and_each_sample_comes_once_an_epoch_of_its_own(
    bucketed: BucketedSet, whole: list[Any]
) -> None:
    seen: dict[tuple[int, ...], list[int]] = {}
    for k, batch in enumerate(whole):
        assert [one[0] for one in batch] == list(range(k * BATCH, (k + 1) * BATCH))
        shapes = {one[2] for one in batch}
        assert len(shapes) == 1
        seen.setdefault(shapes.pop(), []).extend(one[3] for one in batch)
    for shape, count in zip(bucketed.shapes_of("image"), bucketed.counts, strict=True):
        numbers = seen[tuple(shape)]
        assert len(numbers) > count
        for epoch in range(len(numbers) // count):
            assert len(set(numbers[epoch * count : (epoch + 1) * count])) == count


@pytest.mark.parametrize(("world_size", "batch"), [(2, 8), (4, 8), (8, 8), (3, 6), (6, 6), (5, 5), (7, 7)])
def test_any_world_size_from_any_batch_gets_the_same(bucketed: BucketedSet, world_size: int, batch: int) -> None:
    start = 5 * batch
    assert read(bucketed, world_size, start, 6, batch) == read(bucketed, 1, 0, 11, batch)[5:]


def test_a_lanes_part_of_a_small_bucket_is_one_block(bucketed: BucketedSet) -> None:
    manifest = bucketed.manifests[1]

    def blocks(shuffle_block: int) -> int:
        order = Order([one.num_samples for one in manifest.shards], seed=0, num_lanes=4, shuffle_block=shuffle_block)
        return sum(order.num_blocks(epoch, lane) for epoch in range(5) for lane in range(4))

    assert blocks(default_shuffle_block(manifest, 4, len(bucketed.manifests))) == 5 * 4
    assert blocks(3) == 5 * 6  # as long as a lane's part: the stagger cuts that of two lanes of four


def test_a_position_within_a_batch_is_refused(bucketed: BucketedSet) -> None:
    with pytest.raises(UserError, match="position 25 is within a batch of 8"):
        BucketStream(bucketed, global_batch_size=BATCH, rank=0, world_size=1, seed=0, position=25)


def test_quarantined_samples_are_named_by_bucket_and_number(folder: Path, tmp_path: Path) -> None:
    data = pack_buckets(folder, tmp_path / "set", SIZES)
    shard = tmp_path / "set" / "6x10" / "shards" / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[512 + 40] ^= 1
    shard.write_bytes(content)
    quarantine = Quarantine(2)
    read_with = {"quarantine": quarantine, "num_lanes": 1}
    batches = read(data, 1, 0, 20, **read_with)
    found = quarantine.found
    assert [(one.shard, one.sample) for one in found] == [("6x10/shards/000000.tar", 23)]
    assert all(one[1] != 23 for batch in batches for one in batch)
