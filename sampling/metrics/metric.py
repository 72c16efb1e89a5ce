"""One metric of an evaluation: what it is computed from, which models and data it fits, its function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scoreray.data.extras import check_installed
from scoreray.data.reading.manifest import Manifest
from scoreray.sampling.measures.features import ExtractorChoice
from scoreray.sampling.metrics.misfits import Misfit
from scoreray.sampling.metrics.plan import EvaluationInputs
from scoreray.sampling.metrics.record import MetricResult
from scoreray.sampling.model.describe import ModelInfo

OF_FEATURES = ("reference", "samples", "extractor")
OF_RECONSTRUCTIONS = ("reference", "restoration")
OF_ENSEMBLES = ("reference", "ensembles")
OF_CODES = ("reference", "codes")
PACKAGES = {"restoration": "torchmetrics", "codes": "sklearn", "residuals": "scipy", "own_likelihood": "scipy"}
"""Part of the protocol -> the package, of the extra `evaluate`, that computes it."""


@dataclass(frozen=True)
class EvaluationMetric:
    """One metric.

    title: as a page shows it. needs: parts of the protocol beside its own that its value depends on: the stages whose
    chunks it is computed from (`sampling/evaluation/stages.py`), and "extractor".
    compute: of the stored chunks; its keyword-only parameters are the metric's options (`checked_options`).
    protocol: its own settings, as the record has them.
    misfit: why it makes no sense for a model, data and an extractor, beside what holds for every metric (`unfit`).
    costly: only where it is asked for, or of an autoencoder, which is measured in a forward pass (`is_default`).
    """

    title: str
    needs: tuple[str, ...]
    compute: Callable[..., MetricResult]
    protocol: Callable[[EvaluationInputs], dict[str, Any]] | None = None
    misfit: Misfit = lambda info, manifest, extractor: None
    costly: bool = False

    def parts(self, name: str) -> tuple[str, ...]:
        """All parts of the protocol that it depends on: records are comparable in it where these agree."""
        return (*self.needs, name)

    def unfit(self, info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
        """Why it makes no sense for a model, data and an extractor; None where it does."""
        if info.is_autoencoder and not set(self.needs) <= {*OF_RECONSTRUCTIONS, "codes", "importance", "extractor"}:
            return "an autoencoder draws no samples and knows no noise level"
        return self.misfit(info, manifest, extractor)

    def is_default(self, info: ModelInfo) -> bool:
        """Whether a model is measured in it where no metrics are named."""
        return not self.costly or (info.is_autoencoder and not {"codes", "importance"} & set(self.needs))

    def check_packages(self, name: str) -> None:
        """Raises UserError where a package that the metric, of this name, is computed by is missing."""
        for part in self.needs:
            if part in PACKAGES:
                check_installed("evaluate", f"metric {name}", PACKAGES[part])

    @property
    def stages(self) -> set[str]:
        """The chunks that it is computed from; the reference's own only where sets are compared, as others read its
        images."""
        return set(self.needs) - {"extractor"} - (set() if self.compares_sets else {"reference"})

    @property
    def compares_sets(self) -> bool:
        """Whether it compares samples, or reconstructions, with the reference as a whole."""
        return "reference" in self.needs and bool({"samples", "extractor"} & set(self.needs))

    @property
    def draws(self) -> bool:
        """Whether settings of sampling change it."""
        return bool({"samples", "ensembles", "restoration", "own_likelihood"} & set(self.needs))
