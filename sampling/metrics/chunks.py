"""What an evaluation stores until its record is written: a chunk's named arrays as one npz, read without pickle."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

from scoreray.data.errors import DataError
from scoreray.data.storage.store import Store

PROJECTIONS = 128  # of samples onto lines, for sliced distances


@dataclass(frozen=True)
class FeatureChunk:
    """Of the reference or of samples: features [n, d], projections [n, p] of the values themselves.

    values: the samples [n, ...], where they are few values. pictures: the first chunk's samples, for the page.
    counts [b], probabilities [b, k], negentropies [b]: of each batch, where the extractor has classes (`ClassSums`).
    right: bool [n], whether the classifier takes a sample for the class that was requested. spectra: [g, C, K], mean
    power spectra of g groups of the samples (`torch.tensor_split`).
    """

    features: np.ndarray
    projections: np.ndarray
    values: np.ndarray | None = None
    counts: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    negentropies: np.ndarray | None = None
    pictures: np.ndarray | None = None
    right: np.ndarray | None = None
    spectra: np.ndarray | None = None


@dataclass(frozen=True)
class EnsembleChunk:
    """Of n ensembles: crps, variance, squared_error [n, C] (`EnsembleScores`).

    members [m, k, C, ...], observed [m, C, ...]: the first chunk's first ones, for the page. score_names [s], scores
    [n, M, s], observed_scores [n, s]: the scorer's, where there is one.
    """

    crps: np.ndarray
    variance: np.ndarray
    squared_error: np.ndarray
    members: np.ndarray
    observed: np.ndarray
    score_names: np.ndarray
    scores: np.ndarray
    observed_scores: np.ndarray


@dataclass(frozen=True)
class LikelihoodChunk:
    """nats, bpd [n]; nfe [], calls of the denoiser."""

    nats: np.ndarray
    bpd: np.ndarray
    nfe: np.ndarray


@dataclass(frozen=True)
class LossChunk:
    """Denoising errors [n, levels]."""

    errors: np.ndarray


@dataclass(frozen=True)
class BoundChunk:
    """prior, diffusion, reconstruction in nats, bpd [n]; nfe [], calls of the denoiser for each."""

    prior: np.ndarray
    diffusion: np.ndarray
    reconstruction: np.ndarray
    bpd: np.ndarray
    nfe: np.ndarray


@dataclass(frozen=True)
class ResidualChunk:
    """products [n, levels, K], among [n, levels, K, K]: `ResidualProducts`."""

    products: np.ndarray
    among: np.ndarray


@dataclass(frozen=True)
class OwnLikelihoodChunk:
    """nats, background [n] of the reference, own, own_background [n] of the model's samples: log-likelihoods under the
    model and under a Gaussian."""

    nats: np.ndarray
    background: np.ndarray
    own: np.ndarray
    own_background: np.ndarray


@dataclass(frozen=True)
class RestorationChunk:
    """psnr, ssim [n]; pictures uint8 [m, 3, C, H, W] of the first chunk: images, what is known of them, restored.

    Of an autoencoder, mse [n] too and features [n, d] of reconstructions where a metric needs them; psnr and ssim are
    empty where samples are no 8-bit images, and pictures are [m, 2, C, H, W]: images, reconstructed.
    """

    psnr: np.ndarray
    ssim: np.ndarray
    pictures: np.ndarray
    mse: np.ndarray | None = None
    features: np.ndarray | None = None


@dataclass(frozen=True)
class AnnealingChunk:
    """log_weights [chains] of AIS; energies [n] of the reference."""

    log_weights: np.ndarray
    energies: np.ndarray


@dataclass(frozen=True)
class CodesChunk:
    """codes float32 [n, d] of the reference's samples; factors float64 [n, f]: their class and scalar fields."""

    codes: np.ndarray
    factors: np.ndarray


@dataclass(frozen=True)
class ImportanceChunk:
    """log_weights [n, samples] of latents; log_z [] of an RBM and its standard error [], 0 of a normalised model."""

    log_weights: np.ndarray
    log_z: np.ndarray
    log_z_error: np.ndarray


@dataclass(frozen=True)
class ReferenceMoments:
    """`frechet.Reference` in the cache: mean [d], trace [], root [d, d]."""

    mean: np.ndarray
    trace: np.ndarray
    root: np.ndarray


ChunkArrays = (
    FeatureChunk
    | EnsembleChunk
    | LikelihoodChunk
    | BoundChunk
    | ResidualChunk
    | OwnLikelihoodChunk
    | LossChunk
    | RestorationChunk
    | AnnealingChunk
    | CodesChunk
    | ImportanceChunk
    | ReferenceMoments
)
C = TypeVar("C", bound=ChunkArrays)


def write_chunk(store: Store, key: str, chunk: ChunkArrays) -> None:
    """Writes a chunk as one object."""
    arrays = {one.name: value for one in fields(chunk) if (value := getattr(chunk, one.name)) is not None}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    store.put(key, buffer.getvalue())


def read_chunk(store: Store, key: str, kind: type[C]) -> C:
    """Reads it back. Raises NotFound, and DataError where the object is no such chunk."""
    data = store.get(key)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return kind(**dict(file))
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{store.url(key)}: not a chunk of an evaluation ({reason}); remove it, and the same command computes it "
            "again"
        ) from None
