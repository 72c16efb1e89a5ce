"""Object store, manifest, packing, the order of samples, decoding, and the stream that a rank reads."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def fashion_mnist_path() -> Path:
    """The 12,000 Fashion-MNIST images (28x28, grey, 10 classes) that the package carries, as an .npz to pack."""
    return Path(str(importlib.resources.files("scoreray.data") / "fashion-mnist.npz"))
