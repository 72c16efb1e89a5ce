"""`data pack` with its progress shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scoreray.cluster.display import bar, say
from scoreray.data.manifest import Manifest
from scoreray.data.pack import pack


def pack_with_bar(source: str, url: str, **options: Any) -> Manifest:
    """`scoreray.data.pack.pack` with a bar; options as there."""
    with bar(f"pack {Path(source).name}", 1, "samples") as progress:
        task = progress.task_ids[0]
        manifest = pack(
            source, url, progress=lambda n, total: progress.update(task, completed=n, total=total), **options
        )
    say(f"packed {manifest.num_samples:,} samples in {len(manifest.shards)} shards at {url}")
    return manifest
