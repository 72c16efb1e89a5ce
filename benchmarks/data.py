"""Samples a second of the stream against stock webdataset, LitData and decoding alone, in one run on this machine.

    python benchmarks/data.py [--repeats 7] [--sets png,jpg,fields,buckets] [--out benchmarks/results/data.json]

Every figure is the median of the repeats, which take turns so that a busy machine slows all alike. One process a way,
no worker processes; the stream's and LitData's own threads are part of theirs. All use the same decoder (pyspng,
simplejpeg) and make batches of 256, but "decode from memory": members in memory, one after the other, no batch.

LitData is measured where it can be imported. It declares torchvision, which it does not need here, so:

    pip install --no-deps --target /some/folder litdata==0.2.76 lightning-utilities==0.15.3 tifffile
    PYTHONPATH=/some/folder python benchmarks/data.py
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyspng
import simplejpeg
import webdataset
from PIL import Image

from scoreray.data import fashion_mnist_path
from scoreray.data.buckets.bucket_stream import BucketStream
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.pack import pack
from scoreray.data.packing.pack_buckets import pack_buckets
from scoreray.data.reading.batches import BatchStream
from scoreray.data.reading.decode import npy_array
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.order import Order, RecordRange
from scoreray.data.reading.reader import Reader
from scoreray.data.reading.stream import Stream
from scoreray.data.sources.field_options import FieldOption, FieldOptions
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.data.storage.stats import ReadStats
from scoreray.data.storage.store import open_store
from scoreray.data.unpacked.tar_stream import TarStream
from scoreray.data.unpacked.tars import TarSettings, UnpackedTars, open_data
from scoreray.data.webdataset import SampleDecoder, shards

BATCH = 256


Seconds = tuple[float, float]  # of the clock, of the CPU (all threads of this process)


def timed(work: Callable[[], object]) -> Seconds:
    started = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def jpg_source(path: Path, num_images: int = 6000) -> Path:
    """64 x 64 colour images with some structure (enlarged garments, tinted), as .npz."""
    with np.load(fashion_mnist_path()) as archive:
        grey, labels = archive["images"][:num_images], archive["labels"][:num_images]
    large = np.stack([np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)) for image in grey])
    tint = np.random.default_rng(0).uniform(0.4, 1, (num_images, 1, 1, 3))
    np.savez(path, images=(large[..., None] * tint).astype(np.uint8), labels=labels)
    return path


def stream(url: str, num_batches: int, **options: Any) -> Seconds:
    """Of `num_batches` batches, after the first ones."""
    # 32 lanes of blocks of 256: what a data set of some 100,000 images gets by default; this one is smaller.
    with Stream(
        url, global_batch_size=BATCH, rank=0, world_size=1, seed=0, cache_bytes=0, num_lanes=32, shuffle_block=256,
        **options,
    ) as batches:  # fmt: skip
        drain(batches, 4)
        return timed(lambda: drain(batches, num_batches))


def without_manifest(tars: list[str], num_batches: int) -> Seconds:
    """Straight from the tars."""
    data = open_data(tars, TarSettings(num_classes=10))
    assert isinstance(data, UnpackedTars)
    with TarStream(data, global_batch_size=BATCH, rank=0, world_size=1, seed=0) as batches:
        drain(batches, 4)
        return timed(lambda: drain(batches, num_batches))


def stock(tars: list[str], num_batches: int, decoder: str | Callable) -> Seconds:
    """The same number of samples through webdataset's usual pipeline: shuffle, decode, batches of arrays."""
    pipeline = webdataset.WebDataset(tars * 4, shardshuffle=False).shuffle(1000)
    if callable(decoder):
        pipeline = pipeline.to_tuple("png;jpg", "cls").map_tuple(decoder, int)
    else:
        pipeline = pipeline.decode(decoder).to_tuple("png;jpg", "cls")
    batches = iter(pipeline.batched(BATCH))
    drain(batches, 4)
    return timed(lambda: drain(batches, num_batches))


def as_source(url: str, num_batches: int, *stages: Callable) -> Seconds:
    """The same number of samples from shards(), in the stream's order, through webdataset's stages."""
    samples = shards(url, global_batch_size=BATCH, num_lanes=32, shuffle_block=256)
    batches = iter(webdataset.DataPipeline(samples, *stages, webdataset.batched(BATCH)))
    drain(batches, 4)
    return timed(lambda: drain(batches, num_batches))


def from_memory(url: str, num_batches: int, decoder: Callable[[bytes], np.ndarray]) -> Seconds:
    manifest = Manifest.load(open_store(url))
    reader = Reader(open_store(url), manifest, ReadStats())
    ranges = [RecordRange(k, 0, shard.num_samples) for k, shard in enumerate(manifest.shards)]
    members = itertools.chain.from_iterable(reader.read([part])[0][0] for part in ranges)
    some = list(itertools.islice(itertools.cycle(members), num_batches * BATCH))  # a stream meets each once an epoch
    return timed(lambda: deque(map(decoder, some), maxlen=0))


def to_litdata(url: str, folder: Path) -> str:
    """The same members in LitData's own format."""
    from litdata.streaming.cache import Cache

    manifest, folder = Manifest.load(open_store(url)), folder / "litdata"
    reader, cache, number = Reader(open_store(url), manifest, ReadStats()), Cache(str(folder), chunk_bytes="64MB"), 0
    for k, shard in enumerate(manifest.shards):
        (members,), records = reader.read([RecordRange(k, 0, shard.num_samples)])
        for member, label in zip(members, records["label"].tolist(), strict=True):
            cache[number] = {"image": member, "label": label}
            number += 1
    cache.done()
    cache.merge(1)
    return str(folder)


def litdata(folder: str, num_batches: int, decoder: Callable[[bytes], np.ndarray]) -> Seconds:
    from litdata import StreamingDataset

    dataset = StreamingDataset(folder, shuffle=True, seed=0)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        items = itertools.chain.from_iterable(itertools.repeat(dataset))
        while True:
            some = [(decoder(item["image"]), item["label"]) for item in itertools.islice(items, BATCH)]
            yield np.stack([image for image, _ in some]), np.array([label for _, label in some])

    given = batches()
    drain(given, 4)
    return timed(lambda: drain(given, num_batches))


def drain(batches: Iterable[object], count: int) -> None:
    """Takes `count` batches and keeps none, as training does."""
    deque(itertools.islice(batches, count), maxlen=0)


def over_read(url: str, world_size: int) -> float:
    """Bytes fetched (members, what lies between them, their part of the index) over bytes of the shards, for an epoch
    of all ranks together."""
    manifest = Manifest.load(open_store(url))
    fetched = 0
    order = Order([s.num_samples for s in manifest.shards], seed=0, num_lanes=64, shuffle_block=64)
    for rank in range(world_size):
        stats = ReadStats()
        reader = Reader(open_store(url), manifest, stats, records_kept=10**6)
        for lane in range(rank * 64 // world_size, (rank + 1) * 64 // world_size):
            for block in range(order.num_blocks(0, lane)):
                reader.read(order.block(0, lane, block).ranges)
        fetched += stats.bytes_read
    return fetched / sum(shard.bytes for shard in manifest.shards)


def compared(ways: dict[str, Callable[[], Seconds]], repeats: int, num_batches: int) -> dict[str, dict]:
    """Microseconds a sample of each way: medians of the clock and of the CPU, least and most of the clock."""
    seconds: dict[str, list[Seconds]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            seconds[way].append(run())
    per = 1e6 / (num_batches * BATCH)
    us, cpu_us = (
        {way: round(statistics.median(took[i] for took in runs) * per, 1) for way, runs in seconds.items()}
        for i in (0, 1)
    )
    spread = {way: [round(f(took[0] for took in runs) * per, 1) for f in (min, max)] for way, runs in seconds.items()}
    return {"us": us, "CPU us": cpu_us, "us, least and most": spread}


def measure_fields(source: Path, folder: Path, repeats: int, num_batches: int = 60) -> dict:
    """Samples as img2dataset writes them: a picture, a vector, a caption and JSON with the class."""
    url, chance = folder / "fields", np.random.default_rng(0)
    url.mkdir()
    with (
        np.load(source) as archive,
        webdataset.ShardWriter(f"{url}/%06d.tar", maxcount=2000, verbose=0, mtime=0) as writer,
    ):
        for number, (image, label) in enumerate(zip(archive["images"], archive["labels"].tolist(), strict=True)):
            vector = io.BytesIO()
            np.save(vector, chance.standard_normal(768).astype(np.float32))
            writer.write({
                "__key__": f"{number:08d}", "jpg": simplejpeg.encode_jpeg(image), "clip.npy": vector.getvalue(),
                "txt": f"a garment of class {label}, number {number} of them", "json": {"label": label},
            })  # fmt: skip
    named = [FieldOption("clip", "clip.npy"), FieldOption("caption", "txt"), FieldOption("label", "json", "label")]
    pack(url, url, fields=FieldOptions(tuple(named)))
    tars = sorted(str(tar) for tar in url.glob("*.tar"))
    wanted = [FieldRequest(name) for name in ("image", "clip", "caption", "label")]

    def with_webdataset() -> Seconds:
        pipeline = (
            webdataset.WebDataset(tars * 4, shardshuffle=False).shuffle(1000).to_tuple("jpg", "clip.npy", "txt", "json")
        )
        decoded = pipeline.map_tuple(
            simplejpeg.decode_jpeg, npy_array, bytes.decode, lambda data: json.loads(data)["label"]
        )
        batches = iter(decoded.batched(BATCH))
        drain(batches, 4)
        return timed(lambda: drain(batches, num_batches))

    ways = {
        "scoreray, local": lambda: stream(str(url), num_batches, fields=wanted),
        "scoreray, local, the picture alone": lambda: stream(str(url), num_batches),
        "webdataset, same decoders": with_webdataset,
    }
    took = compared(ways, repeats, num_batches)
    ratios = {
        f"times webdataset, same decoders, {clock}": round(
            took[clock]["webdataset, same decoders"] / took[clock]["scoreray, local"], 2
        )
        for clock in ("us", "CPU us")
    }
    return {**took, "ratios": ratios, "bytes fetched over needed": {}}


def measure(name: str, source: Path, folder: Path, repeats: int, decoder: Callable, stock_decoder: str) -> dict:
    url, num_batches = str(folder / name), 60
    manifest = pack(source, url, image_format=name, samples_per_shard=2000)
    tars = [f"{url}/{shard.name}" for shard in manifest.shards]
    with LocalS3(folder / f"s3-{name}") as server:
        os.environ.update(server.env)
        server.create_bucket("benchmark")
        remote = open_store("s3://benchmark/set")
        for key, _ in open_store(url).list():
            remote.put(key, open_store(url).get(key))
        fields = webdataset.to_tuple("png;jpg", "cls")
        ways: dict[str, Callable[[], Seconds]] = {
            "decode from memory": lambda: from_memory(url, num_batches, decoder),
            "scoreray, local": lambda: stream(url, num_batches),
            "scoreray, local, 2 decoding threads": lambda: stream(url, num_batches, decode_threads=2),
            "scoreray, S3 on this machine": lambda: stream(remote.url(), num_batches),
            "scoreray as a source of webdataset, same decoder": lambda: as_source(
                url, num_batches, fields, webdataset.map_tuple(decoder, int)
            ),
            "scoreray as a source of webdataset, SampleDecoder": lambda: as_source(
                url, num_batches, webdataset.map(SampleDecoder()), fields
            ),
            "scoreray, tars without a manifest, local": lambda: without_manifest(tars, num_batches),
            "scoreray, tars without a manifest, S3": lambda: without_manifest(
                [f"{remote.url()}/{shard.name}" for shard in manifest.shards], num_batches
            ),
            "LitData": lambda: litdata(lit, num_batches, decoder),
            "webdataset, same decoder": lambda: stock(tars, num_batches, decoder),
            "webdataset, its own decoder": lambda: stock(tars, num_batches, stock_decoder),
        }
        if importlib.util.find_spec("litdata"):
            lit = to_litdata(url, folder / name)
        else:
            del ways["LitData"]
        took = compared(ways, repeats, num_batches)
    us = took["us"]
    ours = us["scoreray, local"]
    goals = {
        "times webdataset, same decoder": us["webdataset, same decoder"] / ours,
        "times webdataset, its own decoder": us["webdataset, its own decoder"] / ours,
        "times LitData": us.get("LitData", math.nan) / ours,
        "tars without a manifest: times webdataset, same decoder": us["webdataset, same decoder"]
        / us["scoreray, tars without a manifest, local"],
        "of decode from memory": us["decode from memory"] / ours,
        "S3 of local": ours / us["scoreray, S3 on this machine"],
    }
    return {
        **took,
        "ratios": {goal: round(value, 2) for goal, value in goals.items()},
        "bytes fetched over needed": {w: round(over_read(url, w), 3) for w in (1, 2, 4, 8, 16, 32, 64)},
    }


def measure_buckets(folder: Path, repeats: int, num_images: int = 6000, num_batches: int = 60) -> dict:
    """6,000 jpgs in five sizes of about 64 x 64, against the same pictures as squares.

    Few lanes, so that a lane has whole blocks of each bucket, as it has in larger data sets.
    """
    with np.load(fashion_mnist_path()) as archive:
        grey = archive["images"][:num_images]
    (folder / "pictures").mkdir()
    ratios = np.random.default_rng(0).uniform(0.55, 1.8, num_images)
    for number, (image, ratio) in enumerate(zip(grey, ratios, strict=True)):
        size = round(64 * math.sqrt(ratio)), round(64 / math.sqrt(ratio))
        picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).convert("RGB")
        picture.save(folder / "pictures" / f"{number}.png")
    sizes = [(48, 80), (56, 72), (64, 64), (72, 56), (80, 48)]
    plain = pack(folder / "pictures", folder / "plain", image_size=64, image_format="jpg")
    data = pack_buckets(folder / "pictures", folder / "buckets", sizes, image_format="jpg")
    options: dict[str, Any] = {
        "global_batch_size": BATCH, "rank": 0, "world_size": 1, "seed": 0, "cache_bytes": 0, "num_lanes": 8,
        "shuffle_block": 64,
    }  # fmt: skip

    def run(batches: BatchStream) -> Seconds:
        with batches:
            drain(batches, 4)
            return timed(lambda: drain(batches, num_batches))

    ways = {
        "a plain set": lambda: run(Stream(str(folder / "plain"), manifest=plain, **options)),
        "in buckets": lambda: run(BucketStream(data, **options)),
    }
    found = compared(ways, repeats, num_batches)
    return {
        **found,
        "counts": dict(zip(data.folders, data.counts, strict=True)),
        "ratios": {"buckets over plain": round(found["us"]["in buckets"] / found["us"]["a plain set"], 3)},
        "bytes fetched over needed": {},
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--sets", default="png,jpg,fields,buckets")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data.json")
    options = arguments.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="scoreray-benchmark-") as name:
        folder = Path(name)
        for kind in options.sets.split(","):
            if kind == "png":
                result = measure("png", fashion_mnist_path(), folder, options.repeats, pyspng.load, "l8")
            elif kind == "jpg":
                source = jpg_source(folder / "jpg.npz")
                result = measure("jpg", source, folder, options.repeats, simplejpeg.decode_jpeg, "rgb8")
            elif kind == "buckets":
                result = measure_buckets(folder, options.repeats)
            else:
                result = measure_fields(jpg_source(folder / "fields.npz"), folder, options.repeats)
            title = {
                "png": "28x28 png",
                "jpg": "64x64 jpg",
                "fields": "64x64 jpg, vector of 768, caption, class",
                "buckets": "jpg of five sizes of about 64x64",
            }[kind]
            results[title] = {"repeats": options.repeats} | result
            print(f"| {title} | us a sample | CPU us | least to most |\n|---|---|---|---|")
            for way, us in result["us"].items():
                least, most = result["us, least and most"][way]
                print(f"| {way} | {us} | {result['CPU us'][way]} | {least} to {most} |")
            print(*(f"{goal}: {value}" for goal, value in result["ratios"].items()), sep="\n")
            print("bytes fetched over needed:", result["bytes fetched over needed"], flush=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
