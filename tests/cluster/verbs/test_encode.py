"""`data encode` on Ray Data: the bytes of one process, whatever the number of actors, and mistakes in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from scoreray.cluster.connect.local_ray import set_environment
from scoreray.cluster.verbs.encode import encode_to
from scoreray.data.errors import DataError
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.data.storage.store import open_store
from scoreray.sampling.encoding.begin import EncodedField, EncodeOptions


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@pytest.mark.slow
def test_actors_make_the_bytes_of_one_process_and_go_on_after_a_mistake(
    ray_cluster: None, small_set: str, tiny_vae: str, tmp_path: Path
) -> None:
    wanted = [EncodedField(f"diffusers={tiny_vae}", "image", "latent")]
    options = EncodeOptions(batch_size=4, samples_per_shard=12, device="cpu")
    encode_to(small_set, str(tmp_path / "one"), wanted, options, actors=(0, 0))
    whole = files_in(tmp_path / "one")
    copy, out = tmp_path / "copy", tmp_path / "many"
    for name, data in files_in(Path(small_set)).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    (tar,) = (copy / "shards").iterdir()
    sound = tar.read_bytes()
    tar.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(DataError, match=r"its bytes are not those of the index") as refused:
        encode_to(str(copy), str(out), wanted, options, actors=(1, 2))
    assert "\n" not in str(refused.value)
    tar.write_bytes(sound)
    encode_to(str(copy), str(out), wanted, options, actors=(1, 1))
    assert files_in(out) == whole


@pytest.mark.slow
@pytest.mark.timeout(3000)  # eleven starts of Ray, over a minute each at a load of 20
def test_kills_at_ten_points_end_in_the_same_bytes(small_set: str, tiny_vae: str, tmp_path: Path) -> None:
    """By SIGKILL and Ctrl-C in turn, with one and two actors in turn."""
    wanted = ["--encoder", f"diffusers={tiny_vae}", "--field", "image", "--to", "latent"]
    sizes = ["--batch-size", "1", "--samples-per-shard", "1", "--device", "cpu"]

    def command(out: str, actors: int) -> list[str]:
        verb = [sys.executable, "-m", "scoreray.cluster.cli", "data", "encode", small_set, str(tmp_path / out)]
        return [*verb, *wanted, *sizes, "--actors", str(actors)]

    subprocess.run(command("whole", 0), check=True)
    packing = tmp_path / "killed/packing"
    for kill in range(10):
        before = len(list(packing.glob("0*")))
        with subprocess.Popen(command("killed", 1 + kill % 2), stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            while len(list(packing.glob("0*"))) <= before:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            process.send_signal((signal.SIGKILL, signal.SIGINT)[kill % 2])
            assert process.wait(PATIENCE_S) == (-signal.SIGKILL, 130)[kill % 2]
    subprocess.run(command("killed", 2), check=True)
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_actors_on_two_nodes_make_the_bytes_of_one_process(
    local_s3: LocalS3, s3_url: str, small_set: str, tiny_vae: str, tmp_path: Path
) -> None:
    """Source, target and encoder in S3; three actors do not fit on one of the nodes."""
    set_environment()
    from ray.cluster_utils import Cluster

    for name, folder in {"pictures": small_set, "vae": tiny_vae}.items():
        for file, data in files_in(Path(folder)).items():
            open_store(f"{s3_url}/{name}").put(file, data)

    def command(out: str, actors: int) -> list[str]:
        verb = [sys.executable, "-m", "scoreray.cluster.cli", "data", "encode", f"{s3_url}/pictures", out]
        encoder = ["--encoder", f"diffusers={s3_url}/vae", "--field", "image", "--to", "latent"]
        return [
            *verb,
            *encoder,
            "--batch-size",
            "2",
            "--samples-per-shard",
            "8",
            "--device",
            "cpu",
            "--actors",
            f"{actors}",
        ]

    subprocess.run(command(str(tmp_path / "whole"), 0), check=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2)
        subprocess.run(command(f"{s3_url}/out", 3), check=True, env={**os.environ, "RAY_ADDRESS": cluster.address})
    finally:
        cluster.shutdown()
    store = open_store(f"{s3_url}/out")
    assert {key: store.get(key) for key, _ in store.list()} == files_in(tmp_path / "whole")
