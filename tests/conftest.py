"""Fixtures that several parts' tests share."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

# For numpy, torch and all processes that tests start: threads of one process that spin while they wait for one another
# take the cores from the tests beside it (small trainings then took 5 to 30 times their CPU time).
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job: tests that interrupt would hang
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import psutil
import pytest
from waiting import PATIENCE_S, PATIENT_RAY

from scoreray.data.fields.field import Field
from scoreray.data.fields.record_layout import FORMATS, digest, index_bytes
from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import INDEX, MANIFEST, Index, Manifest, Shard
from scoreray.data.reading.records import chunk_digests, records_sha256
from scoreray.data.storage.local_s3 import LocalS3

# Begun first, in this order: a long file that is begun last, on one core, leaves the others idle.
LONGEST = (
    "tests/trainer/on_ray/test_training.py",
    "tests/trainer/engine/test_engine.py",
    "tests/test_layout.py",
    "tests/trainer/checkpoints/test_checkpoint.py",
    "tests/sampling/http/test_page.py",
    "tests/sampling/http/test_app.py",
    "tests/trainer/networks/test_conditioning.py",
    "tests/trainer/test_step.py",
    "tests/sampling/formats/test_lora_folder.py",
    "tests/sampling/evaluation/test_evaluate.py",
    "tests/trainer/test_buckets.py",
    "tests/trainer/engine/test_overlap.py",
    "tests/trainer/config/test_config.py",
    "tests/sampling/imports/test_import_diffusers.py",
    "tests/trainer/checkpoints/test_posthoc.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Else as they stand: the order of the tests of a file is kept."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


def pytest_collection_finish() -> None:
    """Ray reads its environment on import: before that `connected` sets it, else Ray listens on all addresses."""
    assert "ray" not in sys.modules, "a test module imports Ray at its top: import it in functions"
    gc.freeze()  # else each collection looks through the objects of thousands of tests and of all libraries


@pytest.fixture(scope="session")
def local_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """A real S3 server (SeaweedFS) on loopback; the environment points at it for the rest of the session."""
    with LocalS3(tmp_path_factory.mktemp("s3")) as server:
        before = {name: os.environ.get(name) for name in server.env}
        os.environ.update(server.env)
        server.create_bucket("scoreray-tests")
        yield server
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@pytest.fixture
def s3_url(local_s3: LocalS3, request: pytest.FixtureRequest) -> str:
    """A prefix of its own for this test: s3://scoreray-tests/<test>."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"s3://scoreray-tests/{os.getpid()}-{name}"


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def scoreray() -> Command:
    """The command: in this process, or with `env`, where the environment matters, in one of its own."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        if env is not None:
            command = [sys.executable, "-m", "scoreray.cluster.cli", *arguments]
            return subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, **env}
            )
        from scoreray.cluster.cli import main as cli

        out, errors = io.StringIO(), io.StringIO()
        handler, status = signal.getsignal(signal.SIGTERM), 0
        with (
            mock.patch.object(sys, "argv", ["scoreray", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            try:
                cli.main()
            except SystemExit as end:
                status = int(end.code or 0)
        signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess(arguments, status, out.getvalue(), errors.getvalue())

    return run


@pytest.fixture
def own_package(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes a package of somebody else's, own_package(name, module="its source", ...), and brings it; forgotten at the
    end of the test, with all else that it brought."""
    from own_code import own_code_forgotten

    from scoreray.data.own_code import bring

    made: list[str] = []

    def write(name: str, *, brought: bool = True, **modules: str) -> Path:
        folder = tmp_path / "theirs" / name
        folder.mkdir(parents=True, exist_ok=True)
        for module, source in {"__init__": "", **modules}.items():
            (folder / f"{module}.py").write_text(source)
        made.append(name)
        if brought:
            bring([str(folder)])
        return folder

    with own_code_forgotten(made):
        yield write


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of diffusers' AutoencoderKL with random weights: grey pictures, 2 latent channels, a factor of 2."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "vae"
    AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False, sample_size=16,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="session")
def latent_set(tiny_vae: str, write_fields: FieldSet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 grey pictures of 8x8 in two classes, beside their moments by `tiny_vae`: `latent`, [4, 4, 4]."""
    import torch

    from scoreray.sampling.offline.generate import picture_file
    from scoreray.trainer.encoders.base import VALUES, Autoencoder, fit_preview
    from scoreray.trainer.encoders.load import load_encoder

    encoder = load_encoder(f"diffusers={tiny_vae}", "cpu")
    assert isinstance(encoder, Autoencoder)
    image = Field("image", "image", [1, 8, 8], "uint8", "png", mean=[127.5], std=[70.0])
    pictures = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moments = encoder.encode(pictures)[VALUES].half()
    mean, std = moments.double().chunk(2, 1)
    deviation = (std.square() + (mean - mean.mean((0, 2, 3), keepdim=True)).square()).mean((0, 2, 3)).sqrt()
    made = encoder.output(image)
    assert made.encoding is not None
    preview = fit_preview(mean, pictures / 127.5 - 1)
    latent = replace(
        made, name="latent", member="latent.npy", mean=mean.mean((0, 2, 3)).tolist(), std=deviation.tolist(),
        encoding=replace(made.encoding, preview=preview),
    )  # fmt: skip
    label = Field("label", "class", [], "int64", "cls", classes=["a", "b"], class_counts=[32, 32])
    samples = []
    for number, (picture, values) in enumerate(zip(pictures, moments, strict=True)):
        file = io.BytesIO()
        np.save(file, values.numpy())
        samples.append(
            {"image": ("png", picture_file(picture)), "latent": ("npy", file.getvalue()), "label": number % 2}
        )
    folder = tmp_path_factory.mktemp("latents") / "latents"
    write_fields(folder, [image, latent, label], samples)
    return str(folder)


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of 64 packed images of 8x8 in three classes."""
    folder = tmp_path_factory.mktemp("small")
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
    np.savez(folder / "p.npz", images=images, labels=np.arange(64) % 3)
    pack(str(folder / "p.npz"), str(folder / "packed"))
    return str(folder / "packed")


@pytest.fixture(scope="session")
def small_run(small_set: str) -> Callable[..., dict[str, Any]]:
    """Settings of a run of `small_set` that takes next to nothing: small_run(name, storage, images, **sections)."""

    def settings(name: str, storage: object, images: int, **sections: Any) -> dict[str, Any]:
        return {
            "run": {"name": name, "storage": str(storage)},
            "data": {"url": small_set, "global_batch_size": 16},
            "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "duration": {"images": images},
            **sections,
        }

    return settings


@pytest.fixture(scope="session")
def ray_cluster(local_s3: LocalS3) -> Iterator[None]:
    """One embedded Ray cluster for the session; its workers see the S3 server."""
    assert "PYTEST_XDIST_WORKER" not in os.environ, "a test that starts Ray belongs to SERIAL in the Makefile"
    from scoreray.cluster.connect.local_ray import connected

    with connected(num_cpus=4):
        yield


class Listeners:
    """What this process and those that it started listen on while it is entered: TCP, and UDP that is not connected."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, int]] = set()  # (process, address, port)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Listeners:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            names = {os.getpid(): "this process"}
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    names[process.pid] = process.name()
            for one in psutil.net_connections("inet"):
                takes_any = one.type == socket.SOCK_DGRAM and not one.raddr
                if one.pid in names and (one.status == psutil.CONN_LISTEN or takes_any):
                    self.seen.add((names[one.pid], one.laddr.ip.removeprefix("::ffff:"), one.laddr.port))

    def check(self) -> None:
        """Fails where another machine could reach one of them."""
        assert len(self.seen) > 5, f"these are not the listeners of a Ray cluster: {self.seen}"
        reached = {one for one in self.seen if not ipaddress.ip_address(one[1]).is_loopback}
        assert not reached, f"other machines reach {reached}"


@pytest.fixture(scope="session")
def new_listeners() -> type[Listeners]:
    """`with new_listeners() as listeners: ...; listeners.check()`"""
    return Listeners


RAY = [sys.executable, "-m", "ray.scripts.scripts"]
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "2000",
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Nodes:
    """Two namespaces joined by a cable, a Ray node in each; node 0 is the head, and where the driver runs."""

    def __init__(self, folder: Path) -> None:
        tag = f"{os.getpid() % 10_000}"
        self.names = [f"sr{tag}a", f"sr{tag}b"]
        self.addresses = [f"10.{77 + os.getpid() % 100}.0.{i + 1}" for i in range(2)]
        self.folder = folder
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            **QUICK_HEALTH_CHECKS,
            **PATIENT_RAY,
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        a, b = (f"v{name}" for name in self.names)
        ip("link", "add", a, "netns", self.names[0], "type", "veth", "peer", "name", b, "netns", self.names[1])
        for name, link, address in zip(self.names, (a, b), self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")

    def start(self, node: int, *options: str, environment: dict[str, str] | None = None, before: str = "true") -> None:
        """`ray start`, with more options and variables; `before` is a shell line that sees only this node's mounts."""
        head = f"{self.addresses[0]}:6399"
        where = ["--head", "--port=6399", "--include-dashboard=false"] if node == 0 else [f"--address={head}"]
        command = [*RAY, "start", *where, f"--node-ip-address={self.addresses[node]}", "--num-cpus=1"]
        if node == 0:
            command.append(f"--temp-dir={self.folder}/ray")
        shell = ["sh", "-ec", f'{before}; exec "$@"', "sh", *command, "--object-store-memory=100000000", *options]
        self.run(node, shell, environment, timeout=PATIENCE_S, check=True)

    def run(
        self, node: int, command: list[str], environment: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess:
        within = ["ip", "netns", "exec", self.names[node], *command]
        return subprocess.run(
            within, env=self.environment | (environment or {}), capture_output=True, text=True, **options
        )

    def kill(self, node: int) -> None:
        """Every process of the node, as when its machine loses power."""
        pids = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True)
        for pid in pids.stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        for node, name in enumerate(self.names):
            self.kill(node)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two joined namespaces, in which nothing runs yet."""
    folder = Path(tempfile.mkdtemp(prefix="sr2-", dir="/tmp"))
    found = Nodes(folder)
    try:
        found.connect()
    except (OSError, subprocess.CalledProcessError) as error:
        found.close()
        shutil.rmtree(folder)
        reason = getattr(error, "stderr", "") or error
        pytest.skip(f"two nodes need network namespaces (root, CAP_SYS_ADMIN, iproute2): {reason}")
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(folder, ignore_errors=True)


FieldSet = Callable[..., Manifest]


@pytest.fixture(scope="session")
def write_fields() -> FieldSet:
    """Writes a data set of several fields by hand, as `data/reading/manifest.py` describes it, not by the code that
    packs: see `_write_fields`."""
    return _write_fields


def _write_fields(
    url: Path, fields: Sequence[Field], samples: Sequence[Mapping[str, Any]], samples_per_shard: int = 64
) -> Manifest:
    """samples: by field name, of classes and scalars a number, of others (format, bytes of the member)."""
    record = _record(fields)
    members = list(dict.fromkeys(field.member for field in fields if field.kind not in ("class", "scalar")))
    shards, digests, index = [], b"", b""
    (url / "shards").mkdir(parents=True)
    for first in range(0, len(samples), samples_per_shard):
        part = samples[first : first + samples_per_shard]
        records, file = np.zeros(len(part), record), io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, sample in enumerate(part):
                for field in (field for field in fields if field.is_inline):
                    records[f"value:{field.name}"][row] = sample[field.name]
                for column, member in enumerate(members):
                    kind, data = next(
                        sample[field.name] for field in fields if field.member == member and not field.is_inline
                    )
                    entry = tarfile.TarInfo(f"{first + row:06d}.{member}")
                    entry.size = len(data)
                    offset = file.tell() + tarfile.BLOCKSIZE
                    tar.addfile(entry, io.BytesIO(data))
                    for name, value in (
                        ("offset", offset),
                        ("size", len(data)),
                        ("format", FORMATS[kind]),
                        ("digest", digest(data)),
                    ):
                        records[name][row, column] = value
        name, data, rows = f"shards/{first:06d}.tar", file.getvalue(), records.tobytes()
        (url / name).write_bytes(data)
        shards.append(Shard(name, len(part), len(data), hashlib.sha256(data).hexdigest(), records_sha256(rows, record)))
        index, digests = index + rows, digests + chunk_digests(rows, record)
    (url / INDEX).write_bytes(index + digests)
    counts = [shard.num_samples for shard in shards]
    manifest = Manifest(
        version=3, name=url.name, num_samples=len(samples), fields=list(fields), shards=shards,
        index=Index(INDEX, index_bytes(counts, record), hashlib.sha256(index + digests).hexdigest()),
    )  # fmt: skip
    (url / MANIFEST).write_text(manifest.to_json())
    return manifest


def _record(fields: Sequence[Field]) -> np.dtype:
    count = len({field.member for field in fields if field.kind not in ("class", "scalar")})
    types = {"class": "<i4", "bfloat16": "<u2"}
    widths = {"offset": "<u8", "size": "<u4", "format": "u1", "digest": "<u8"}
    columns: list[Any] = [(name, width, (count,)) for name, width in widths.items()]
    for field in fields:
        if field.kind in ("class", "scalar"):
            columns.append((f"value:{field.name}", types.get(field.kind) or types.get(field.dtype) or field.dtype))
    return np.dtype(columns)
