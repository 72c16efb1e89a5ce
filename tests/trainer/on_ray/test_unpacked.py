"""`scoreray train` of tars in S3 that no manifest describes, by two workers, killed and resumed by the same command."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import yaml
from waiting import PATIENCE_S

from scoreray.data.packing.shards import encode
from scoreray.data.storage.store import open_store
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import load_config
from scoreray.trainer.records import FINISHED_TARS, read_metrics
from scoreray.trainer.run_folder import run_store

NUM_TARS, COUNT, TOTAL = 6, 50, 1600


def put_tars(url: str) -> None:
    rng = np.random.default_rng(0)
    for tar in range(NUM_TARS):
        file = io.BytesIO()
        with webdataset.TarWriter(file, encoder=False) as writer:
            for i in range(COUNT):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                writer.write({"__key__": f"{i:04d}", "jpg": encode(pixels, "jpg"), "cls": b"%d" % (i % 4)})
        open_store(url).put(f"laion-{tar:06d}.tar", file.getvalue())


@pytest.mark.slow
def test_a_run_over_tars_in_s3_goes_on_after_a_kill(
    s3_url: str, tmp_path: Path, small_run: Callable[..., dict[str, Any]], start_train: Any
) -> None:
    put_tars(f"{s3_url}/tars")
    data = {
        "url": f"{s3_url}/tars/laion-{{000000..000005}}.tar",
        "num_classes": 4,
        "global_batch_size": 16,
        "shuffle_block": 16,
    }
    file = tmp_path / "config.yaml"
    checkpoint = {"every_images": 160, "ahead_images": 0}
    settings = small_run("tars", f"{s3_url}/runs", TOTAL, data=data, checkpoint=checkpoint, scaling={"workers": 2})
    file.write_text(yaml.safe_dump(settings))
    run = run_store(load_config(file))

    first = start_train(file)
    first.wait_for("6 tars without a manifest: .*scoreray data pack 's3://.*{000000..000005}.tar' s3://")
    while latest(run) is None:
        first.wait_for("tars without", 1)
    first.process.kill()
    first.end()

    command = [sys.executable, "-m", "scoreray.cluster.cli", "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert re.search(r"goes on from [\d,]+ images", done.stderr)
    assert done.stderr.count("tars without a manifest") == 1, "said once"
    newest = latest(run)
    assert newest is not None
    assert (newest.images_seen, newest.marker.image_shape) == (TOTAL, [3, 8, 8])
    assert newest.marker.classes == ["0", "1", "2", "3"]
    assert all(np.isfinite(record.loss) for record in read_metrics(run))
    lines = [line for key, _ in run.list(f"{FINISHED_TARS}/") for line in run.get(key).splitlines()]
    finished = [(one["epoch"], one["tar"]) for one in map(json.loads, lines)]
    assert len(set(finished)) == len(finished), "no tar is finished twice in an epoch, by whichever worker"
    whole = [
        epoch for epoch in range(TOTAL // (NUM_TARS * COUNT)) if {(epoch, t) for t in range(NUM_TARS)} <= {*finished}
    ]
    assert whole[:3] == [0, 1, 2], "each epoch goes over every tar"

    sample = [
        sys.executable,
        "-m",
        "scoreray.cluster.cli",
        "sample",
        run.url(),
        "--count",
        "4",
        "--out",
        str(tmp_path / "s"),
    ]
    assert subprocess.run([*sample, "--steps", "2", "--class-label", "3"], timeout=PATIENCE_S).returncode == 0
