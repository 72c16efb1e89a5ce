"""Checks before a run starts: its data set fits, its place in storage can be written and is not another run's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scoreray.data.errors import UserError
from scoreray.data.extras import check_installed
from scoreray.data.own_code import check_stored
from scoreray.data.storage.store import Store
from scoreray.data.unpacked.tars import UnpackedTars
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, latest
from scoreray.trainer.checkpoints.duration import as_decided
from scoreray.trainer.checkpoints.stored_model import StoredModel, find_base
from scoreray.trainer.config import Config
from scoreray.trainer.config.data_scale import misfit, resolve_sigma_data
from scoreray.trainer.config.run_fields import RunFields, run_fields
from scoreray.trainer.diffusion.levels import data_conditions
from scoreray.trainer.dry_run import dry_run
from scoreray.trainer.encoders.load import load_autoencoder
from scoreray.trainer.flows import continuous_flow
from scoreray.trainer.flows.couplings import OptimalTransportCoupling
from scoreray.trainer.initial import begins_from, find_initial, initial_weights
from scoreray.trainer.meta import meta_module
from scoreray.trainer.objectives.consistency import ConsistencyObjective
from scoreray.trainer.objectives.maximum_likelihood import MaximumLikelihoodObjective
from scoreray.trainer.ranks import from_rank_0
from scoreray.trainer.run_data import RunData, open_run_data
from scoreray.trainer.run_folder import claim, run_store, with_unused_name
from scoreray.trainer.source_data import check_source, with_source
from scoreray.trainer.teacher import fitting_teacher, pinned


@dataclass(frozen=True)
class PreparedRun:
    """A checked config and what was read to check it.

    fields: what of the data is modelled, and what conditions it.
    newest: the run's newest checkpoint at that time; the workers look again.  warning: what a person should know about
    the scale of the data; "" where it is what the model expects.  notes: what was not tried, what tars without a
    manifest don't promise, stages that the run is too short for, and what is new beside the weights that it begins
    from.  initial: where these are; None of a run that goes on.  teacher: of `objective.teacher`.
    """

    config: Config
    data: RunData
    fields: RunFields
    newest: Checkpoint | None = None
    warning: str = ""
    notes: tuple[str, ...] = ()
    initial: StoredModel | None = None
    teacher: StoredModel | None = None


def check_run(config: Config, *, fresh: bool = False) -> PreparedRun:
    """What can be checked before Ray starts: the data set exists, fits the network, is the one that the run has been
    trained on so far (unless it is to be a `fresh` one), what it begins from fits, and its place can be written.

    Raises UserError, StorageError or DataError.
    """
    check_packages(config)
    data = open_run_data(config, patient=False)
    fields = run_fields(config.data, data, config.autoencoder, config.alignment)
    fields = with_source(config, fields, patient=False)
    config.optimizer.for_run(config.run.seed, data.num_samples)  # raises where it needs a number that is not known
    unrun = dry_run(config, fields, meta_module(config, fields))
    _check_autoencoder(config, fields)
    run = run_store(config)
    run.check_writable()
    newest = None if fresh else latest(run)
    if newest is not None:
        newest.check_data(data, config.data.url)
        check_source(newest, fields)
        check_stored(newest.marker.config, newest.marker.own_code, newest.url)
        if newest.marker.is_lora:
            find_base(newest.url, newest.marker)
    initial = find_initial(config) if newest is None else None
    teacher = fitting_teacher(config, fields, newest)
    notes = [*([unrun] if unrun else []), *(data.notes() if isinstance(data, UnpackedTars) else ())]
    if too_long := _too_long_stages(config):
        notes.append(too_long)
    if initial is not None:
        new = initial_weights(initial, config, fields)
        notes.append(begins_from(initial, new))
    found = misfit(with_sigma_data(config, fields, newest, initial), fields)
    if found and found.hopeless and newest is None:  # a run that has begun may go on: its config can't change
        raise UserError(found.text)
    return PreparedRun(config, data, fields, newest, found.text if found else "", tuple(notes), initial, teacher)


def _check_autoencoder(config: Config, fields: RunFields) -> None:
    """Whether the autoencoder that a config names is there and the one that made the latents. Training needs none, so
    one that the data set alone names may be missing. Raises UserError, DataError, StorageError."""
    if config.autoencoder is not None and fields.target.encoding is not None:
        load_autoencoder(fields.target.encoding, "cpu").decoded_shape(fields.shape)


def _too_long_stages(config: Config) -> str:
    """Of a consistency run that ends in its first stage, whose gap between noise levels is nearly a denoiser's; "" of
    any other."""
    objective, images = config.objective, config.duration.images
    if images is None or not isinstance(objective, ConsistencyObjective):
        return ""
    if objective.num_stages == 1 or images > objective.stage_images:
        return ""
    return (
        f"objective.stage_images is {objective.stage_images:,} and duration.images {images:,}: the run ends in the "
        f"first of {objective.num_stages} stages, where the gap between noise levels is largest; set "
        f"objective.stage_images={max(1, images // objective.num_stages)} (duration.images / objective.num_stages)"
    )


def check_packages(config: Config) -> None:
    """Raises UserError where records are to be sent somewhere, or an ODE solved, by a package that is missing."""
    if isinstance(config.objective, MaximumLikelihoodObjective):
        continuous_flow.package()
    if isinstance(getattr(config.objective, "coupling", None), OptimalTransportCoupling):
        check_installed("flows", "objective.coupling.kind 'optimal_transport'", "scipy")
    for name in ("mlflow", "wandb"):
        if getattr(config.log, name) is not None:
            check_installed(name, f"log.{name} (null for none)", name)


def prepare_run(config: Config, *, fresh: bool = False) -> PreparedRun:
    """`check_run`, then `claim_run`."""
    return claim_run(check_run(config, fresh=fresh), fresh=fresh)


def claim_run(checked: PreparedRun, *, fresh: bool = False) -> PreparedRun:
    """Make the run's place ours: its config is stored in it, or the one that is stored agrees.

    `fresh`: take the first unused name of name-2, name-3, ... instead of resuming. The result's config is the one to
    run. Raises UserError with the differing keys when another config made this run; StorageError, DataError.
    """
    config = with_unused_name(checked.config) if fresh else checked.config
    config = in_order_of_run(config, checked.newest)
    config = with_sigma_data(config, checked.fields, checked.newest, checked.initial)
    claim(run_store(config), config)
    config = as_decided(config, checked.newest)
    if config.init is not None and checked.initial is not None:  # all starts of its workers take the same, also of a
        found = {"checkpoint": checked.initial.url, "ema": checked.initial.ema}  # run that goes on meanwhile
        config = config.model_copy(update={"init": config.init.model_copy(update=found)})
    if checked.teacher is not None:
        config = pinned(config, checked.teacher)
    return replace(checked, config=config)


def as_begun(config: Config, data: RunData, run: Store, rank: int, world_size: int) -> tuple[Config, RunFields]:
    """The config as the run began, and its fields; every rank calls it, and rank 0 alone looks for the checkpoint. Only
    a start without `claim_run` comes with a config that leaves `sigma_data` to the data, or that names its conditions
    in another order."""
    auto = config.denoiser.sigma_data == "auto"
    newest = None
    if auto or len(config.data.conditions or ()) > 1:
        newest = from_rank_0(latest(run) if rank == 0 else None, world_size)
    config = in_order_of_run(config, newest)
    fields = with_source(config, run_fields(config.data, data, config.autoencoder, config.alignment))
    initial = find_initial(config) if auto and newest is None else None
    return with_sigma_data(config, fields, newest, initial), fields


def in_order_of_run(config: Config, newest: Checkpoint | None) -> Config:
    """`config` with `data.conditions` in the order of the run's newest checkpoint. A network adds embeddings and joins
    grids in this order, so in another one a grid would meet the weights of the other."""
    given, stored = config.data.conditions, data_conditions((newest and newest.marker.conditions) or {})
    if given is None or list(given) == list(stored):
        return config
    ordered = {name: given[name] for name in (*stored, *given) if name in given}
    return config.model_copy(update={"data": config.data.model_copy(update={"conditions": ordered})})


def with_sigma_data(
    config: Config, fields: RunFields, newest: Checkpoint | None, initial: StoredModel | None
) -> Config:
    """`config` with a number for `denoiser.sigma_data: auto`: that of the run's newest checkpoint, of the model that it
    begins from (whose weights mean something by that number alone), else the data's."""
    known = None
    if config.denoiser.sigma_data == "auto":
        if newest is not None:
            known = newest.marker.sigma_data
        elif initial is not None:
            known = initial.config.denoiser.resolved_sigma_data
    return resolve_sigma_data(config, fields, known)
