"""`data pack` with its progress shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scoreray.cluster.display import counted, say
from scoreray.data.manifest import Manifest
from scoreray.data.pack import pack
from scoreray.data.store import open_store


def pack_with_bar(source: str, url: str, **options: Any) -> Manifest:
    """`scoreray.data.pack.pack` with a bar; options as there."""
    open_store(url).check_writable()
    with counted(f"pack {Path(source).name}", "samples") as progress:
        manifest = pack(source, url, progress=progress, **options)
    say(f"packed {manifest.num_samples:,} samples in {len(manifest.shards)} shards at {url}")
    return manifest
