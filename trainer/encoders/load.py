"""Which encoder an option or a stored record names: loaded once in a process, and checked against the recorded hash."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from scoreray.data import own_code
from scoreray.data.errors import DataError, UserError, nearest, shortened
from scoreray.data.fields.encoding import Encoding
from scoreray.trainer.encoders.base import Autoencoder, Encoder
from scoreray.trainer.encoders.diffusers import DiffusersAutoencoder
from scoreray.trainer.encoders.files import absolute
from scoreray.trainer.encoders.scoreray import ScorerayAutoencoder
from scoreray.trainer.encoders.transformers import transformers_encoder

ENCODERS: dict[str, Callable[[str], Encoder]] = {
    "diffusers": DiffusersAutoencoder,
    "transformers": transformers_encoder,
    "scoreray": ScorerayAutoencoder,
}
"""By kind; each is made of the path. `package.module:Name` is one of somebody else's."""

VARIABLE = "SCORERAY_AUTOENCODERS"
"""Environment variable: KIND=PATH, a line each, of autoencoders that are not where they were when they encoded."""

_loaded: dict[tuple[str, str], Encoder] = {}
_lock = threading.Lock()


def load_encoder(
    kind_and_path: str,
    device: torch.device | str | None = None,
    sha256: str | None = None,
    *,
    kinds: Mapping[str, Callable[[str], Encoder]] = ENCODERS,
) -> Encoder:
    """The encoder that KIND=PATH names, on a device (a GPU, where there is one). The same call again in this process
    gives the same object.

    sha256: the hash that was recorded when it was used; a DataError of one line where it is another's.  kinds: which
    are known, beside somebody else's. Raises UserError (unknown kind, nothing there, no GPU, a library is missing),
    DataError (what is there can't be loaded).
    """
    kind, equals, path = kind_and_path.partition("=")
    if not equals or not path:
        raise UserError(f"encoder '{kind_and_path}': write KIND=PATH, such as diffusers=FOLDER")
    at = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if at.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"{kind_and_path}: device {at}: no GPU is to be seen by torch in this process; give auto or cpu"
        )
    with _lock:
        key = (kind_and_path, at)
        if key not in _loaded:
            made = _class_of(kind, kinds)(path)
            if kind not in kinds:
                made.kind, made.path = kind, path
            _loaded[key] = made.to(at)
        found = _loaded[key]
    if sha256 is not None and found.sha256 != sha256:
        raise DataError(
            f"{kind_and_path}: has changed since it encoded the data: SHA-256 {found.sha256[:12]}, not {sha256[:12]}; "
            "name a copy of the one that was used, or encode the data again"
        )
    return found


def load_autoencoder(encoding: Encoding, device: torch.device | str | None = None) -> Autoencoder:
    """What decodes a field again: of the places that `name_autoencoders` named, the one with the recorded hash, else
    the recorded place. Raises as `load_encoder`, and UserError where nothing can decode it."""
    places = [place for place in os.environ.get(VARIABLE, "").splitlines() if place]
    named = (load_encoder(place, device) for place in places)
    found = next((one for one in named if one.sha256 == encoding.sha256), None) or _recorded(encoding, places, device)
    if not isinstance(found, Autoencoder):
        raise UserError(f"{encoding.name}: can't be decoded: it is an encoder of {encoding.of_kind} alone")
    return found


def _recorded(encoding: Encoding, others: Sequence[str], device: torch.device | str | None) -> Encoder:
    """The encoder at the recorded place. others: places whose encoders have another hash."""
    try:
        return load_encoder(encoding.name, device, encoding.sha256)
    except UserError as error:
        if others:
            raise UserError(
                f"--autoencoder {', '.join(others)}: is not the one that encoded the data, SHA-256 "
                f"{encoding.sha256[:12]}; name a copy of {encoding.name}"
            ) from error
        raise UserError(
            f"{error}. If it is elsewhere now, name that place: --autoencoder {encoding.kind}=PATH (train: "
            "autoencoder.path in the config)"
        ) from error


def name_autoencoders(places: Sequence[str]) -> None:
    """Where autoencoders are now, KIND=PATH each, for this process and those that it starts (`environment`). Raises
    UserError."""
    for place in places:
        kind, equals, path = place.partition("=")
        if not equals or not path or "\n" in place:
            raise UserError(f"--autoencoder {shortened(place)}: write KIND=PATH, such as diffusers=FOLDER")
        _class_of(kind, ENCODERS)
    os.environ[VARIABLE] = "\n".join(f"{kind}={absolute(path)}" for kind, _, path in (p.partition("=") for p in places))


def environment() -> dict[str, str]:
    """The variable of `name_autoencoders` for a process on another machine."""
    return {VARIABLE: os.environ[VARIABLE]} if os.environ.get(VARIABLE) else {}


def _class_of(kind: str, kinds: Mapping[str, Callable[[str], Encoder]]) -> Any:
    if kind in kinds:
        return kinds[kind]
    if not own_code.is_own(kind):
        raise UserError(f"encoder kind '{kind}': {nearest(kind, kinds)}, or package.module:Name")
    found = own_code.load(kind, "encoder")
    if not (isinstance(found, type) and issubclass(found, Encoder)):
        raise UserError(f"encoder '{kind}': is no subclass of scoreray.trainer.encoders.base.Encoder")
    return found
