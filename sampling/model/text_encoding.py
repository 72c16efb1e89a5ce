"""Texts in the place of what an encoder made of the data's texts: they are read by the encoder that the model records.

A run on encoded captions (`scoreray data encode`) has conditions of kind sequence or vector. A request may give a text
for them all the same: until it is read, its value is UTF-8 bytes, uint8 [B, L] under a mask [B, L].
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scoreray.trainer.config.condition_values import normalised
from scoreray.trainer.diffusion.condition import Condition, Conditions, ConditionSpec, is_unread
from scoreray.trainer.encoders.base import MASK, VALUES
from scoreray.trainer.encoders.load import load_encoder

MOST_KEPT = 64  # texts; T5-XXL's 128 tokens of 4096 numbers are 2 MB
MOST_AT_ONCE = 16

_kept: OrderedDict[Any, Condition] = OrderedDict()
_lock = threading.Lock()  # one pass of an encoder at a time, which is what there is memory for


def read_texts(condition: Condition, conditions: Conditions) -> Condition:
    """`condition` with its unread texts as their encoder's values. Raises UserError and DataError, as `load_encoder`:
    an encoder that is not there any more, or has changed."""
    return read_all([condition], conditions)[0]


def read_all(given: Sequence[Condition], conditions: Conditions, at_once: int = MOST_AT_ONCE) -> list[Condition]:
    """As `read_texts`, of several: each text is read once, `at_once` in a pass, the last MOST_KEPT are kept."""
    found = list(given)
    for name, spec in conditions.items():
        texts = {
            i: _texts(one.values[name], one.masks[name])
            for i, one in enumerate(found)
            if name in one.values and is_unread(spec, one.values[name])
        }
        if not texts:
            continue
        rows = _rows(name, spec, dict.fromkeys(text for each in texts.values() for text in each), at_once)
        for i, each in texts.items():
            device = found[i].values[name].device
            same = len(set(each)) == 1
            read = rows[each[0]].expand(len(each)) if same else Condition.cat([rows[t] for t in each], [1] * len(each))
            assert read is not None
            found[i] = found[i].updated(read.to(device))
    return found


def load_text_encoders(conditions: Conditions) -> None:
    """Loads what `read_texts` needs, so that the first text does not wait for it. Raises as that."""
    for spec in conditions.values():
        if spec.encoding is not None and spec.takes_text:
            load_encoder(spec.encoding.name, sha256=spec.encoding.sha256)


def _texts(value: Tensor, mask: Tensor) -> list[str]:
    """Of bytes uint8 [B, L]; of rows that share one (expanded), it is decoded once."""
    if len(value) > 1 and value.stride(0) == mask.stride(0) == 0:
        return _texts(value[:1], mask[:1]) * len(value)
    return [row[there].cpu().numpy().tobytes().decode() for row, there in zip(value, mask, strict=True)]


def _rows(name: str, spec: ConditionSpec, texts: Iterable[str], at_once: int) -> Mapping[str, Condition]:
    """One row for each text, as the network takes it; an empty text is the null."""
    encoding = spec.encoding
    assert encoding is not None
    key = (name, encoding.name, encoding.sha256, spec.shape, spec.normaliser, spec.data_dtype)
    with _lock:
        found = {text: _kept[key, text] for text in texts if (key, text) in _kept}
        missing = [text for text in texts if text not in found and text]
        for first in range(0, len(missing), at_once):
            part = missing[first : first + at_once]
            read = load_encoder(encoding.name, sha256=encoding.sha256).encode(part)
            for i, text in enumerate(part):
                value, mask = read[VALUES][i : i + 1].cpu(), read[MASK][i : i + 1].cpu() if MASK in read else None
                if mask is not None:
                    length = min(int(mask.sum()), spec.shape[0])  # tokens stand before padding
                    value, mask = value[:, :length], mask[:, :length]
                if spec.data_dtype is not None:  # as the network has seen values of this text
                    value = value.to(getattr(torch, spec.data_dtype)).float()
                row = Condition({name: value}, {} if mask is None else {name: mask})
                found[text] = normalised(row, {name: spec}).clone()
        for text in found:
            _kept[key, text] = found[text]
            _kept.move_to_end((key, text))
        while len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
    value, mask = spec.null(1)
    return {"": Condition({name: value}, {name: mask}), **found}
