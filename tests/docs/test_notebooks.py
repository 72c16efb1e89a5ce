"""Notebooks run from top to bottom, and are stored with outputs that are small and free of errors.

All run in one process, one after another, so that what they import is imported once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import reference_python
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from waiting import PATIENCE_S

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
FRESH = "%reset -f\n%matplotlib inline\nimport os\nos.chdir({!r})"
DEMO = """
import numpy as np
from scoreray.data import fashion_mnist_path
from scoreray.data.packing.pack import pack
from scoreray.data.presets import PRESETS
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import prepare_run

SMALL = ["network.model_channels=8", "duration.images=128", "optimizer.warmup_images=64", "scaling.workers=1"]
with LocalS3("demo-out/s3") as server, np.load(fashion_mnist_path()) as file:
    os.environ.update(server.env)
    server.create_bucket("scoreray")
    config = load_config(PRESETS / "demo.yaml", SMALL)
    for url, part in ((config.data.url, slice(200)), (f"{config.data.url}-held-out", slice(-200, None))):
        np.savez("part.npz", images=file["images"][part], labels=file["labels"][part], classes=file["classes"])
        pack("part.npz", url)
    train(prepare_run(config).config)
"""
"""What `scoreray demo` leaves, of a smaller network that is hardly trained."""
BEFORE = {"demo-model": DEMO}


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    manager, client = start_new_kernel(startup_timeout=PATIENCE_S, kernel_name="python3")
    yield manager
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, kernel: KernelManager, tmp_path: Path) -> None:
    book, stored = nbformat.read(path, 4), nbformat.read(path, 4)
    before = [FRESH.format(str(tmp_path)), BEFORE.get(path.stem, ""), "%reset -f"]
    book.cells = [*map(new_code_cell, before), *book.cells]
    NotebookClient(book, km=kernel, timeout=int(PATIENCE_S), coalesce_streams=True).execute()
    for ran, kept in zip(book.cells[len(before) :], stored.cells, strict=True):
        kinds = [[one.output_type for one in cell.get("outputs", [])] for cell in (ran, kept)]
        assert kinds[0] == kinds[1], ran.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_small_and_names_no_machine(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 400_000
    assert "/work/" not in text
    assert "/home/" not in text
    for cell in nbformat.read(path, 4).cells:
        assert not cell.metadata, "times of a run and a viewer's settings would differ each time"
        assert all(set(one.get("data", {})) <= {"image/png", "text/plain"} for one in cell.get("outputs", []))


def test_the_notebook_on_the_demos_model_uses_what_the_reference_describes() -> None:
    described = {name for *_, names in reference_python.AREAS.values() for name in names}
    source = "\n".join(cell.source for cell in nbformat.read(EXAMPLES / "demo-model.ipynb", 4).cells)
    used = re.findall(r"^from (scoreray\.[\w.]+) import (.+)$", source, re.M)
    assert len(used) > 5
    for module, names in used:
        for name in names.split(", "):
            assert {module, f"{module}.sample", f"{module}:{name}"} & described, f"{module}.{name}"
