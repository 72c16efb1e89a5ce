"""Optional dependencies (the extras of pyproject.toml), and the command that installs them.

`pip install 'scoreray[NAME]'` is not printed: the index that pip uses may not have this package.
"""

from __future__ import annotations

EXTRAS = {
    "mlflow": ("mlflow-skinny>=3.10", "sqlalchemy>=2", "alembic>=1.10"),
    "wandb": ("wandb>=0.31",),
    "arrays": ("zarr>=3", "h5py>=3.10"),
    "redis": ("redis>=5",),
    "diffusers": ("diffusers>=0.36", "transformers>=4.57"),
    "lora": ("peft>=0.17",),
    "flows": ("torchdiffeq>=0.2.5",),
    "hub": ("huggingface_hub>=0.34",),
    "onnx": ("onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"),
    "metrics": ("scikit-learn>=1.5",),
    "otel": ("opentelemetry-sdk>=1.30", "opentelemetry-exporter-otlp-proto-http>=1.30"),
}


def install(extra: str) -> str:
    """The command."""
    return "pip install " + " ".join(f"'{requirement}'" for requirement in EXTRAS[extra])
