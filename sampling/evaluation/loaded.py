"""What a process loads once for all chunks of an evaluation: the model, the extractor; and torch's threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch

from scoreray.data.errors import UserError
from scoreray.data.own_code import is_own
from scoreray.data.storage.store import NotFound
from scoreray.sampling.measures import features
from scoreray.sampling.measures.features import Extract
from scoreray.sampling.metrics.plan import EvaluationInputs
from scoreray.sampling.model.load import LoadedDenoiser, LoadedModel, load_described

_loading = threading.Lock()
_loaded: dict[str, tuple[Hashable, Any]] = {}
T = TypeVar("T")


@contextlib.contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """torch on so many threads: sums are cut by threads, so their number is part of a result."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def once(what: str, which: Hashable, load: Callable[[], T]) -> T:
    """What this process has loaded under a name; loaded again where another one is wanted."""
    with _loading:
        if what not in _loaded or _loaded[what][0] != which:
            _loaded[what] = (which, load())
        found: T = _loaded[what][1]
        return found


def load_extractor(inputs: EvaluationInputs) -> Extract:
    """The extractor of an evaluation, once a process. Raises UserError where its weights are no longer in the cache."""
    choice, device = inputs.extractor, inputs.settings.device

    def build() -> Extract:
        if choice.kind == "identity" or is_own(choice.kind):
            return features.build(choice, b"", device)
        try:
            data = inputs.cache.get(choice.key)
        except NotFound:
            url = inputs.cache.url(choice.key)
            raise UserError(f"{url}: the extractor's weights are gone; start the evaluation again") from None
        return features.build(choice, data, device)

    return once("extractor", (choice, device), build)


def loaded_model(inputs: EvaluationInputs) -> LoadedModel:
    which = (inputs.info.url, inputs.info.ema, inputs.settings.device)
    return once("model", which, lambda: load_described(inputs.model, inputs.settings.device))


def loaded_denoiser(inputs: EvaluationInputs) -> LoadedDenoiser:
    model = loaded_model(inputs)
    assert isinstance(model, LoadedDenoiser)  # the plan has refused what does not fit a machine
    return model
