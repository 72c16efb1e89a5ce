"""Exported models: what inference needs and nothing else, whole or refused."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from scoreray.cluster.verbs.export import export_model, on_ray
from scoreray.cluster.verbs.leftovers import clean
from scoreray.data.errors import DataError, UserError
from scoreray.sampling.model.export import export
from scoreray.sampling.model.load import load
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.checkpoints.exported import ExportedFile, ModelManifest
from scoreray.trainer.checkpoints.posthoc import find_mix, reconstruct
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.run_folder import run_store


@pytest.fixture(scope="module")
def config(small_run: Any, small_set: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    sections: dict[str, Any] = {
        "data": {"url": small_set, "global_batch_size": 8},
        "checkpoint": {"every_images": 32, "keep": 1, "snapshot_every_images": 32},
    }
    config = load_config(small_run("run", tmp_path_factory.mktemp("export") / "runs", 256, **sections))
    train(config)
    return config


def test_an_exported_model_is_the_checkpoints(config: Config, tmp_path: Path) -> None:
    """Every tracked length, by folder and by file, gives bitwise what loading the checkpoint gives."""
    run, out = run_store(config).url(), str(tmp_path / "model")
    page = export(run, out)
    names = sorted(path.name for path in Path(out).iterdir())
    assert names == ["ema-0.050.safetensors", "ema-0.100.safetensors", "model.json"]
    assert list(page["files"]) == ["0.050", "0.100"]
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 2.0])
    for source, ema in ((out, None), (out, "0.1"), (f"{out}/ema-0.100.safetensors", None)):
        exported = load(source, ema)
        original = load(run, exported.info.ema)
        assert exported.info.ema == ("0.050" if (source, ema) == (out, None) else "0.100")
        assert torch.equal(exported(x, sigma), original(x, sigma))
        assert exported.info.images_seen == 256
        assert exported.info.classes == original.info.classes
    weights = load_file(f"{out}/ema-0.050.safetensors")
    assert weights.keys() == original.network.state_dict().keys()
    assert not any(key.startswith(("exp_avg", "master")) for key in weights)


def test_what_a_killed_export_left_is_found_and_goes(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its weights and its model.json; the same export again leaves nothing but the model."""
    run, out, later = run_store(config).url(), tmp_path / "model", time.time() + 2 * 86400
    with monkeypatch.context() as killed:
        killed.setattr(ModelManifest, "to_json", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(run, str(out))
    (found,) = clean(str(tmp_path), 86400, remove=False, now=later).found
    assert found.what == "a model that was not written whole"
    assert set(found.keys) == {f"model/{path.name}" for path in out.iterdir()}
    export(run, str(out))
    assert clean(str(tmp_path), 86400, remove=True, now=later).found == ()
    assert "model.json" in {path.name for path in out.iterdir()}


def test_a_second_export_leaves_no_file_that_its_page_does_not_name(config: Config, tmp_path: Path) -> None:
    (tmp_path / "ema-mine.safetensors").write_text("somebody's")
    export(run_store(config).url(), str(tmp_path))
    export(run_store(config).url(), str(tmp_path), ["0.050"])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["ema-0.050.safetensors", "ema-mine.safetensors", "model.json"]


def test_raw_weights_and_unknown_lengths(config: Config, tmp_path: Path) -> None:
    page = export(run_store(config).url(), str(tmp_path), ["none"])
    assert page["files"]["none"]["file"] == "weights-none.safetensors"
    assert load(str(tmp_path), "none").info.ema == "none"
    assert load(str(tmp_path)).info.ema == "none"
    with pytest.raises(UserError, match=r"'0\.200'.*accepted: none"):
        load(str(tmp_path), "0.2")
    with pytest.raises(UserError, match="did you mean 'none'"):
        export_model(run_store(config).url(), str(tmp_path), ["nnoe"])


def test_a_run_is_not_hidden_by_a_model(config: Config, tmp_path: Path) -> None:
    run, other = run_store(config), tmp_path / "other"
    newest = latest(run)
    assert newest is not None
    export(run.url(), str(tmp_path / "model"))
    shutil.copytree(run.url(), other)
    (other / "config.yaml").touch()  # which the command stores before it starts workers
    for source in (run.url(), str(tmp_path / "model")):
        for out, what in ((other, "run"), (other / newest.folder, "checkpoint"), (newest.url, "checkpoint")):
            for write in (export, export_model):
                with pytest.raises(UserError, match=f"holds a {what}, which a model's files would hide"):
                    write(source, str(out))
    assert not list(tmp_path.glob("other/**/model.json"))


def test_what_is_not_whole_is_refused(config: Config, tmp_path: Path) -> None:
    run = run_store(config)
    out = tmp_path / "model"
    with pytest.raises(UserError, match="neither a run"):
        export(run.url("metrics"), str(out))
    (tmp_path / "model_index.json").touch()
    with pytest.raises(UserError, match=f"scoreray import diffusers {tmp_path} OUT"):
        export(str(tmp_path), str(out))
    newest = latest(run)
    assert newest is not None
    marker = run.get(f"{newest.folder}/COMMITTED.json")
    run.delete([f"{newest.folder}/COMMITTED.json"])
    with pytest.raises(UserError, match="neither a run"):
        export(newest.url, str(out))
    assert not (out / "model.json").exists()
    run.put(f"{newest.folder}/COMMITTED.json", marker)
    export(newest, str(out))
    file = out / "ema-0.050.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="SHA-256"):
        load(str(out))
    load(str(out), "0.1")
    (out / "model.json").write_text("{}")
    with pytest.raises(DataError, match=r"model\.json"):
        load(str(out))
    (out / "model.json").unlink()
    with pytest.raises(UserError, match=r"no model\.json is beside it"):
        load(str(file))


FILES = {"0.050": ExportedFile("ema-0.050.safetensors", 9, "0" * 64)}


def test_no_flipped_bit_of_a_page_has_another_meaning() -> None:
    config = {"process": {"sigma_max": 80.0}, "denoiser": {"sigma_data": 0.5}}
    page = ModelManifest(
        "runs/r", 4000, [3, 8, 8], ["cat"], {"0.050": ExportedFile("ema-0.050.safetensors", 9, "0" * 64)}, config
    )
    data = bytearray(page.to_json())
    assert read(bytes(data)) == page
    found = []
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        found.append(read(bytes(data)))
        data[bit // 8] ^= 1 << bit % 8
    lines = [one for one in found if isinstance(one, str)]
    assert all(one == page for one in found if not isinstance(one, str))
    assert len(lines) > 8 * (len(data) - 10)
    assert not [line for line in lines if "\n" in line or "model.json" not in line]


def read(data: bytes) -> ModelManifest | str:
    """The page, or the line that refuses it."""
    try:
        return ModelManifest.from_json(data, "model.json")
    except DataError as error:
        return str(error)


def test_a_page_from_before_seals_is_read_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    page = ModelManifest(
        "runs/r", 4000, [3, 8, 8], ["cat"], {"0.050": ExportedFile("ema-0.050.safetensors", 9, "0" * 64)}, {}, 1
    )
    assert read(json.dumps(asdict(page), indent=2).encode()) == page
    assert "before its JSON files had a seal" in caplog.text
    for text in (page.to_json(), json.dumps(asdict(replace(page, format=2))).encode()):
        assert "is damaged" in str(read(text))
    outside = asdict(page) | {"files": {"none": {"file": "../x", "bytes": 1, "sha256": "0" * 64}}}
    assert "bad entry for file '../x'" in str(read(json.dumps(outside).encode()))


def test_a_damaged_checkpoint_is_not_exported(config: Config, tmp_path: Path) -> None:
    run = run_store(config)
    newest = latest(run)
    assert newest is not None
    key = f"{newest.folder}/rank-00000.safetensors"
    original = run.get(key)
    run.put(key, original[:-1] + bytes([original[-1] ^ 1]))
    try:
        with pytest.raises(DataError, match="SHA-256"):
            export(newest, str(tmp_path))
        assert not (tmp_path / "model.json").exists()
    finally:
        run.put(key, original)


def test_a_length_that_was_not_tracked(config: Config, tmp_path: Path) -> None:
    answer = export_model(run_store(config).url(), str(tmp_path), ["0.07", "0.1"])
    assert list(answer.page.files) == ["0.070", "0.100"]
    assert answer.residuals["0.070"] < 0.03
    assert load(str(tmp_path)).info.ema == "0.070"
    json.loads((tmp_path / "model.json").read_text())


def test_ray_tasks_make_the_same(ray_cluster: Any, config: Config) -> None:
    newest = latest(run_store(config))
    assert newest is not None
    mix = find_mix(newest, 0.07)
    local, remote = reconstruct(newest, mix), reconstruct(newest, mix, on_ray)
    assert local.keys() == remote.keys()
    assert all(torch.equal(local[name], remote[name]) for name in local)
