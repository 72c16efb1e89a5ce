"""Every metric of codes by the word that chooses it, and codes that are a field of a data set, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from scoreray.data.errors import UserError, nearest
from scoreray.data.extras import check_installed
from scoreray.data.fields.field import TARGETS, FieldRequest
from scoreray.data.reading.samples import SampleReader, spread
from scoreray.sampling.representations.clusters import PARTS, cluster_score
from scoreray.sampling.representations.information import modularity, mutual_information_gap
from scoreray.sampling.representations.labelled import CodeScore, LabelledCodes, factors_of, read_factors
from scoreray.sampling.representations.pairs import beta_vae_score, factor_vae_score
from scoreray.sampling.representations.predictors import attribute_predictability, dci
from scoreray.sampling.representations.probe import linear_probe
from scoreray.sampling.samplers.options import check_options

SCORES: dict[str, Callable[..., CodeScore]] = {
    **{name: cluster_score(name) for name in PARTS},
    "probe": linear_probe,
    "beta_vae": beta_vae_score,
    "factor_vae": factor_vae_score,
    "mig": mutual_information_gap,
    "sap": attribute_predictability,
    "dci": dci,
    "modularity": modularity,
}


def measure_field(
    url: str, field: str, metrics: Sequence[str], options: Mapping[str, Mapping[str, Any]], count: int
) -> dict[str, CodeScore]:
    """Metrics of the values of a field, of at most `count` samples, moments by their means, against the data set's
    class and scalar fields. Raises UserError (no such field, metric or option; no factors), DataError, StorageError."""
    for name in (*metrics, *options):
        if name not in SCORES:
            raise UserError(f"--metrics {name}: {nearest(name, SCORES)}")
    check_installed("evaluate", "--metrics", "sklearn")
    checked = {name: check_options(name, SCORES[name], options.get(name, {}), "metric") for name in metrics}
    reader = SampleReader(url)
    wanted = reader.manifest.find_field(field, "--field")
    if wanted.kind not in TARGETS:
        raise UserError(f"--field {field}: of kind {wanted.kind}; codes are numbers, of kind {', '.join(TARGETS)}")
    numbers = spread(count, reader.manifest.num_samples)
    values = reader.read_fields(numbers, [FieldRequest(field)]).fields[field]
    if wanted.holds_moments:
        values = values[:, : wanted.drawn_shape[0]]
    factors = factors_of(reader.manifest, read_factors(reader, numbers))
    codes = values.flatten(1).double().numpy().astype(np.float64)
    labelled = LabelledCodes(codes, tuple(one for one in factors if one.name != field))
    return {name: SCORES[name](labelled, **checked[name]) for name in metrics}
