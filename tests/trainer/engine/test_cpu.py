"""A CPU's settings: products stay exact to float32's rounding, and large tensors cost no page faults."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from scoreray.data.packing.pack import pack
from scoreray.trainer import loop
from scoreray.trainer.config import load_config
from scoreray.trainer.engine.base import resolve_precision
from scoreray.trainer.engine.cpu import has_bf16_units, keep_large_tensors_on_the_heap, onednn_products


@pytest.mark.parametrize(("rows", "inner", "columns"), [(512, 768, 192), (196, 192, 768), (4, 192, 1152)])
def test_products_are_exact_to_rounding_and_the_setting_ends_with_the_block(
    rows: int, inner: int, columns: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    right = a.double() @ b.double()
    with onednn_products(torch.device("cpu")):
        found = a @ b
    assert (found - right).norm() < 1e-6 * right.norm()  # bf16 would be at 3e-3
    assert torch.get_float32_matmul_precision() == "highest"


def test_nothing_changes_where_units_would_round_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for capabilities in ({"amx_bf16": True}, {"amx_bf16": False}, {}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        with onednn_products(torch.device("cpu")):
            seen.append(torch.get_float32_matmul_precision())
        with onednn_products(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
    assert seen == ["highest", "medium", "highest"]


def test_a_large_tensor_made_again_and_again_costs_no_page_faults() -> None:
    """8,192 pages each time by glibc's own thresholds; the heap grows once or twice."""
    keep_large_tensors_on_the_heap()
    torch.ones(8 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(8 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 3 * 8192


def test_a_run_without_ray_has_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(
        tmp_path / "p.npz",
        images=np.random.default_rng(0).integers(0, 256, (16, 8, 8), np.uint8),
        labels=np.arange(16) % 2,
    )
    pack(str(tmp_path / "p.npz"), str(tmp_path / "packed"))
    settings = {
        "run": {"name": "run", "storage": str(tmp_path)},
        "data": {"url": str(tmp_path / "packed"), "global_batch_size": 8},
        "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 8},
    }
    heap, products, build = [], [], loop.build_training_module

    def watched(*arguments):  # type: ignore[no-untyped-def]
        module = build(*arguments)
        module.register_forward_hook(lambda *_: products.append(torch.get_float32_matmul_precision()))
        return module

    monkeypatch.setattr(loop, "build_training_module", watched)
    monkeypatch.setattr(loop, "keep_large_tensors_on_the_heap", lambda: heap.append(True))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx512_bf16": False})
    loop.train(load_config(settings))
    assert heap == [True]
    assert products == ["medium"]


@pytest.mark.parametrize(
    ("capabilities", "gains"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_f": True, "avx512_bw": True, "avx512_vl": True, "avx512_dq": True}, False),  # oneDNN would emulate it
        ({"avx2": True}, False),
        ({}, False),
    ],
)
def test_auto_takes_bf16_where_the_cpu_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], gains: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    device = torch.device("cpu")
    assert has_bf16_units(device) is gains
    assert resolve_precision("auto", device) == (torch.bfloat16 if gains else torch.float32)
    assert resolve_precision("bf16", device) == torch.bfloat16
    assert resolve_precision("fp32", device) == torch.float32
