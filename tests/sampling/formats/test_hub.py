"""hf://OWNER/NAME as a target, against a stand-in of the Hub on this machine (`conftest.py`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.cluster.verbs.export import ExportOptions, export_model
from scoreray.data.errors import StorageError, UserError
from scoreray.sampling.model.load import load


def test_an_export_is_one_commit_to_a_private_repository(hub: Any, new_run: Callable[..., str], tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    run = new_run(str(tmp_path / "run"))
    text = export_model(run, "hf://me/digits", (), ExportOptions("diffusers", "apache-2.0")).text()
    assert 'from_pretrained("me/digits", trust_remote_code=True)' in text
    files = hub.repositories["me/digits"]
    assert hub.private["me/digits"]
    assert {"README.md", "model.json", "model_index.json", "pipeline.py", "denoiser/config.json"} < set(files)
    assert b"license: apache-2.0" in files["README.md"]
    copy = snapshot_download("me/digits", cache_dir=tmp_path / "cache")
    x = torch.randn(1, 1, 8, 8)
    assert torch.allclose(load(copy)(x, 1.0), load(run)(x, 1.0), atol=1e-6)
    export_model(run, "hf://me/digits", ["0.1"])
    assert [name for name in sorted(files) if name.endswith(".safetensors")] == ["ema-0.100.safetensors"]


def test_what_the_hub_refuses_is_one_line(
    hub: Any, new_run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(str(tmp_path / "run"))
    for out in ("hf://digits", "hf://me/a/b", "hf://me/--"):
        with pytest.raises(UserError, match=f"^{out}: "):
            export_model(run, out)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"^hf://me/digits: .*; `hf auth login` or HF_TOKEN gives a token"):
        export_model(run, "hf://me/digits")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"^hf://me/digits: "):
        export_model(run, "hf://me/digits")
    assert not hub.repositories
