"""Tensors into a file, hashed on the way."""

from __future__ import annotations

import hashlib
import json
from typing import IO, Any

import torch

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(file: IO[bytes], tensors: dict[str, torch.Tensor]) -> tuple[int, str]:
    """Write CPU tensors as safetensors; returns (bytes, SHA-256). Hashing and writing leave the interpreter free."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that every one is aligned
    header, offset = {}, 0
    for name in names:
        end = offset + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    for part in (len(text).to_bytes(8, "little"), text, *(_bytes(tensors[name]) for name in names)):
        digest.update(part)
        file.write(part)
        size += len(part)
    file.flush()
    return size, digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
