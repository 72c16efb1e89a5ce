"""A denoiser made fast: close to the exact one, measured; padding changes nothing; what is not possible is reported."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.sampling.model import fast
from scoreray.sampling.model.load import LoadedDenoiser, load


@pytest.fixture(scope="module")
def exact(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> LoadedDenoiser:
    return load(new_run(str(tmp_path_factory.mktemp("runs") / "small")))


def fake_compiler(network: torch.nn.Module, dynamic: bool, options: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """Stands in for torch.compile, which takes half a minute a size."""
    seen = network.seen = []  # type: ignore[assignment]

    def call(x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        seen.append(len(x))  # type: ignore[union-attr]
        return network(x, c_noise, labels)

    return call


def test_bf16_is_measured_and_taken_only_where_it_is_close(
    exact: LoadedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fast.make_fast(exact, 8, precision="bf16", compile_="off")
    assert made.name == "bf16"
    assert 0 < made.difference < 0.2
    assert next(exact.parameters()).dtype == torch.float32
    assert fast.make_fast(exact, 8, precision="fp32", compile_="off").denoiser is exact
    monkeypatch.setattr(fast, "MIN_PARAMETERS", 0)
    monkeypatch.setattr(fast, "has_bf16_units", lambda device: True)
    for tolerance, name in ((1e-9, "fp32"), (1.0, "bf16")):
        monkeypatch.setattr(fast, "TOLERANCE", tolerance)
        assert fast.make_fast(exact, 8, compile_="off").name == name


def test_batches_are_padded_to_compiled_sizes_and_larger_ones_are_not(
    exact: LoadedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", fake_compiler)
    made = fast.make_fast(exact, 8, precision="fp32", compile_="on", sizes=(4,))
    network = made.denoiser.network
    assert made.name == "fp32, compiled"
    assert isinstance(network, fast.Sized)
    assert network.sizes == [8, 4]
    network.network.seen.clear()
    for rows in (1, 4, 5, 8, 9):
        x, sigma, labels = torch.randn(rows, 1, 8, 8), torch.linspace(0.1, 5, rows), torch.arange(rows) % 3
        assert torch.allclose(made.denoiser(x, sigma, labels), exact(x, sigma, labels), atol=1e-5)
        assert torch.allclose(made.denoiser(x, sigma), exact(x, sigma), atol=1e-5)
    assert network.network.seen == [4, 4, 4, 4, 8, 8, 8, 8]


def test_a_batch_is_padded_only_where_that_is_quicker(exact: LoadedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled takes 1 ms a row, compiled for 16 takes 5 ms and for 4 takes 3: padding pays from 8 and 4 rows on."""
    monkeypatch.setattr(torch, "compile", fake_compiler)
    costs = {16: 5.0, 4: 3.0}
    monkeypatch.setattr(
        fast, "_seconds", lambda denoiser, _, size: costs[size] if denoiser.network is not exact.network else size
    )
    made = fast.make_fast(exact, 16, precision="fp32", compile_="on", sizes=(4,), pad_always=False)
    network = made.denoiser.network
    assert network.least == {16: 8, 4: 4}  # type: ignore[union-attr]
    network.network.seen.clear()  # type: ignore[union-attr, operator]
    for rows in (1, 3, 4, 7, 8, 16):
        x, sigma = torch.randn(rows, 1, 8, 8), torch.linspace(0.1, 5, rows)
        assert torch.allclose(made.denoiser(x, sigma), exact(x, sigma), atol=1e-5)
    assert network.network.seen == [4, 16, 16]  # type: ignore[union-attr]


def test_compiling_that_takes_too_long_or_fails_is_done_without(
    exact: LoadedDenoiser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fast, "MIN_PARAMETERS", 0)
    monkeypatch.setattr(fast, "has_compiler", lambda device: True)

    def slow(network: torch.nn.Module, dynamic: bool, options: dict[str, Any]) -> Callable[..., torch.Tensor]:
        return lambda x, c_noise, labels: time.sleep(0.5 if len(x) < 8 else 0) or network(x, c_noise, labels)

    monkeypatch.setattr(torch, "compile", slow)
    with caplog.at_level(logging.WARNING):
        made = fast.make_fast(exact, 8, precision="fp32", limit_s=0.3, sizes=(4,))
    assert made.denoiser.network.sizes == [8]  # type: ignore[union-attr]
    assert "not of" in caplog.text or "within" in caplog.text

    def broken(network: torch.nn.Module, dynamic: bool, options: dict[str, Any]) -> Callable[..., torch.Tensor]:
        raise_ = RuntimeError("no compiler here")

        def call(*_: torch.Tensor) -> torch.Tensor:
            raise raise_

        return call

    monkeypatch.setattr(torch, "compile", broken)
    assert fast.make_fast(exact, 8, precision="fp32").name == "fp32"
    with pytest.raises(UserError, match="no compiler here"):
        fast.make_fast(exact, 8, precision="fp32", compile_="on")
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        fast.check_choices("bf61", "on")


def test_a_loaded_model_is_not_changed(exact: LoadedDenoiser, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in exact.state_dict().items()}
    fast.make_fast(exact, 4, precision="bf16", compile_="off")
    assert all(torch.equal(value, before[name]) for name, value in exact.state_dict().items())
