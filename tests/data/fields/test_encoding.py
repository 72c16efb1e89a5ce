"""The record of what encoded a field: stored with the field, absent where nothing encoded it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoreray.data.fields.encoding import Encoding
from scoreray.data.fields.field import Field, is_plain
from scoreray.data.packing.moments import FieldCounter
from scoreray.data.reading.manifest import Manifest

ENCODING = Encoding("diffusers", "s3://models/vae", "a" * 64, "image", "image", [3, 8, 8], True, [[0.5, 1.0, 0.0]])
LATENT = Field("latent", "array", [4, 2, 2], "float16", "npy", mean=[0.0, 1.0], std=[1.0, 2.0], encoding=ENCODING)


def test_a_manifest_keeps_the_record_and_one_without_it_has_no_such_key(
    tmp_path: Path, write_fields: Callable[..., Any]
) -> None:
    plain = replace(LATENT, encoding=None, mean=[0.0] * 4, std=[1.0] * 4)
    member = io.BytesIO()
    np.save(member, np.zeros((4, 2, 2), np.float16))
    manifest = write_fields(tmp_path, [plain], [{"latent": ("npy", member.getvalue())}])
    assert "encoding" not in manifest.to_json()
    assert "encoding" not in plain.as_dict()
    encoded = replace(manifest, fields=[LATENT])
    assert Manifest.from_json(encoded.to_json()).fields == [LATENT]


def test_statistics_of_moments_are_those_of_draws() -> None:
    """E x = mean, E x^2 = mean^2 + std^2."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(2, 2, 2, 2)), rng.uniform(0.5, 2, size=(2, 2, 2, 2))
    counter = FieldCounter(LATENT, plain=False)
    for one in np.concatenate([mean, std], 1).astype(np.float16):
        counter.add(one)
    found = counter.finish()
    assert LATENT.num_channels == 2
    assert LATENT.drawn_shape == [2, 2, 2]
    np.testing.assert_allclose(found.sums, mean.sum((0, 2, 3)), rtol=1e-2)
    np.testing.assert_allclose(found.squares, (mean**2 + std**2).sum((0, 2, 3)), rtol=1e-2)


def test_moments_are_an_array_of_as_many_means_as_deviations_and_no_plain_data_set() -> None:
    with pytest.raises(ValueError, match="an even number of channels"):
        replace(LATENT, shape=[3, 2, 2])
    values = replace(LATENT, name="array", dtype="float32", encoding=replace(ENCODING, moments=False), mean=[], std=[])
    assert not is_plain([values])
    assert is_plain([replace(values, encoding=None)])
