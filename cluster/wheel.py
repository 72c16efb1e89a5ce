"""Builds a wheel of this installation for submitted jobs: in a moment, the same bytes for the same files.

A wheel is a zip of modules and a few lines about them (packaging.python.org, "Binary distribution format"). This one
asks for no dependencies: the cluster's image has them, and Ray's `py_modules` would otherwise install torch again.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import zipfile
from pathlib import Path

import scoreray
from scoreray.data.presets import PRESETS

PACKAGES = ("data", "trainer", "sampling", "tune", "cluster")
LEFT_OUT = (".pyc", ".npz", ".LICENSE")  # the demo's images: nothing that runs on a cluster reads them
VERSION = "0.1.0"
EPOCH = (1980, 1, 1, 0, 0, 0)


def build_wheel(folder: Path) -> Path:
    """Writes scoreray-<version>+<hash of the files>-py3-none-any.whl into `folder`."""
    files = _files()
    version = f"{VERSION}+{_hash(files)}"
    info = f"scoreray-{version}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: scoreray\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: scoreray\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items())
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    wheel = folder / f"scoreray-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return wheel


def code_hash() -> str:
    """Which code this process runs: twelve hexadecimal digits of all files that a wheel of it would hold."""
    return _hash(_files())


def _hash(files: dict[str, bytes]) -> str:
    about = hashlib.sha256()
    for name, content in files.items():
        about.update(f"{name} {len(content)}\n".encode() + content)
    return about.hexdigest()[:12]


def _files() -> dict[str, bytes]:
    """Name in the wheel -> content, of the packages and presets of this process, wherever they are installed."""
    # With its own __init__.py: a namespace on Ray's path would lose to the package that the cluster's image has.
    home = Path(str(scoreray.__file__)).parent
    found = {f"scoreray/{path.name}": path.read_bytes() for path in sorted(home.glob("*.py"))}
    folders = [Path(str(importlib.import_module(f"scoreray.{package}").__file__)).parent for package in PACKAGES]
    for folder in (*folders, PRESETS):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.parent != home and not path.name.endswith(LEFT_OUT):
                found[f"scoreray/{folder.name}/{path.relative_to(folder)}"] = path.read_bytes()
    return found


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
