"""Makes the pictures of docs/gallery: python docs/tools/gallery.py [--out DIR] [--only NAME ...]"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import pictures
import pictures_dynamics
import pictures_trained
import torch
from PIL import Image

from scoreray.data.errors import UserError, nearest

PICTURES: dict[str, Callable[[], pictures.Figure]] = {
    "processes": pictures.processes,
    "score-fields": pictures.score_fields,
    "weightings": pictures_trained.weightings,
    "langevin": pictures.langevin_modes,
    "dynamics": pictures_dynamics.dynamics,
    "paths": pictures.sampler_paths,
    "error": pictures.error_by_calls,
    "every-sampler": pictures_trained.every_sampler,
    "guidance": pictures.guidance,
    "inverse": pictures.inverse,
    "likelihood": pictures.likelihood,
    "couplings": pictures.couplings,
}
"""Every picture by its file's name, in the order of the page."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python docs/tools/gallery.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/gallery"))
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(PICTURES))
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.only if name not in PICTURES]
    if unknown:
        raise SystemExit(f"unknown picture '{unknown[0]}': {nearest(unknown[0], PICTURES)}")
    for name in chosen.only:
        print(f"{make(name, chosen.out)}", flush=True)


def make(name: str, folder: Path) -> str:
    """Draws one picture into `folder`; returns a line that says where and how long it took. Raises UserError."""
    if name not in PICTURES:
        raise UserError(f"unknown picture '{name}': {nearest(name, PICTURES)}")
    began = time.perf_counter()
    torch.manual_seed(0)
    figure = PICTURES[name]()
    folder.mkdir(parents=True, exist_ok=True)
    save_small(figure, folder / f"{name}.png")
    return f"{folder / name}.png, {time.perf_counter() - began:.0f} s"


def save_small(figure: pictures.Figure, path: Path) -> None:
    """Writes a figure as a PNG of 256 colours, half the bytes and as good to look at, and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    pictures.plt.close(figure)
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


if __name__ == "__main__":
    main()
