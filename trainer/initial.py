"""Beginning a run from another model's weights (`init`): what of them fits, and how what is new beside it begins.

New classes begin as the null class. What is new for a condition begins so that its null acts as if the condition were
not there, and a value acts as the null does; new channels are neither read nor written. So the network first gives what
the other model gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from scoreray.data.errors import UserError, listed
from scoreray.trainer.checkpoints.checkpoint import Checkpoint
from scoreray.trainer.checkpoints.exported import PREFIX
from scoreray.trainer.checkpoints.marker import Ancestor
from scoreray.trainer.checkpoints.stored_model import StoredModel, find_base, find_named
from scoreray.trainer.config import Config, leaves
from scoreray.trainer.config.run_fields import RunFields
from scoreray.trainer.diffusion.buffers import state_buffers
from scoreray.trainer.diffusion.condition import HAS_LENGTH, Conditions, ConditionSpec
from scoreray.trainer.diffusion.levels import with_levels
from scoreray.trainer.engine import Engine
from scoreray.trainer.meta import on_meta
from scoreray.trainer.networks.conditioning import GRID_IN, Conditioning
from scoreray.trainer.networks.lora import base_name
from scoreray.trainer.networks.network import build_network
from scoreray.trainer.optim.ema import described_length
from scoreray.trainer.optim.fragments import MASTER, Fragment
from scoreray.trainer.ranks import from_rank_0

NO_MEANING = ("dropout", "activation_checkpointing")  # keys of `network` that change nothing of what weights mean
NULL = -1

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Growth:
    """Which entries along an axis of a stored tensor make up a tensor of the run's; 0 where one is NULL."""

    axis: int
    entries: tuple[int, ...]

    def apply(self, stored: Tensor) -> Tensor:
        index = torch.tensor(self.entries)
        grown = stored.index_select(self.axis, index.clamp(min=0))
        shape = [-1 if axis == self.axis else 1 for axis in range(stored.ndim)]
        return grown.masked_fill((index == NULL).view(shape), 0)


@dataclass
class InitialWeights:
    """What a network takes of a stored model's tensors, by the network's names for them.

    kept: as they are; grown: as parts of larger ones, with the stored shape; zero: new ones that begin at 0. All others
    begin as in any run.  notes: what is new; misfits: what does not fit, a phrase for each.
    """

    kept: set[str] = field(default_factory=set)
    grown: dict[str, tuple[Growth, list[int]]] = field(default_factory=dict)
    zero: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)


def find_initial(config: Config) -> StoredModel | None:
    """The model that `init` names; None where it names none. Raises UserError, DataError, StorageError."""
    section = config.init
    return None if section is None else find_named("init", section.checkpoint, section.ema)


def initial_weights(model: StoredModel, config: Config, fields: RunFields) -> InitialWeights:
    """What the network of `config` on these fields takes of `model`'s tensors.

    Raises UserError where something does not fit and `init.strict` is set, or where nothing fits; DataError,
    StorageError.
    """
    section, shape = config.init, model.page.image_shape
    assert section is not None
    conditions = with_levels(fields.conditions, config.levels)
    try:
        network = on_meta(lambda: build_network(config.network, fields.shape, conditions))
        before = on_meta(lambda: build_network(config.network, shape, model.conditions))  # with what the model knew
    except UserError as error:
        raise UserError(f"init.checkpoint: {model.url}: {error}") from None
    found = InitialWeights(misfits=_other_settings(model, config))
    further_channels = range(shape[0], fields.shape[0]) if shape[1:] == fields.shape[1:] else range(0)
    if further_channels:
        found.notes.append(f"channels {further_channels[0]} to {further_channels[-1]}")
    growths = _growths(found, before, network, model.conditions, conditions)
    _match(found, _shapes(network), _shapes(before), model.shapes(), growths, bool(further_channels))
    misfits = "; ".join(found.misfits)
    if not found.kept and not found.grown:
        raise UserError(f"init.checkpoint: {model.url}: nothing of it fits this network: {misfits}")
    if found.misfits and section.strict:
        raise UserError(f"init.checkpoint: {model.url} does not fit: {misfits}; init.strict=false takes what fits")
    if config.lora is not None and (found.grown or found.notes or found.misfits):
        differing = "; ".join([*found.misfits, *found.notes]) or f"classes of {', '.join(model.conditions)} are others"
        raise UserError(
            f"lora: {model.url} has to fit as it is, as its weights are not trained: {differing}; train without lora, "
            "or on data with its shape, conditions and classes"
        )
    return found


def begins_from(model: StoredModel, found: InitialWeights) -> str:
    """A line about a run that begins from a model."""
    line = f"begins from {model.url} at {model.page.images_seen:,} images, {described_length(model.ema)}"
    line += f"; new: {', '.join(found.notes)}" if found.notes else ""
    return line + (f"; left out: {'; '.join(found.misfits)}" if found.misfits else "")


def begin(
    config: Config,
    fields: RunFields,
    engine: Engine,
    module: nn.Module,
    rank: int,
    world_size: int,
    lora: Checkpoint | None = None,
) -> list[Ancestor]:
    """Makes the model that `init` names the run's first weights and averages; every rank calls it. Returns the run's
    lineage. Errors as of `find_initial` and `initial_weights`.

    lora: of a run that goes on, its checkpoint, without what it adapts: that is read again.
    """
    model = None
    if rank == 0:
        model = find_initial(config) if lora is None else find_base(lora.url, lora.marker)
    model = from_rank_0(model, world_size)
    assert model is not None, "called for a run with init, or of adapters"
    found = initial_weights(model, config, fields)
    grown = {name: torch.empty(torch.Size(shape)) for name, (_, shape) in found.grown.items()}
    wanted = [Fragment(PREFIX + name, 0, t.numel(), {MASTER: t.view(-1)}) for name, t in grown.items()]
    masters = list(_masters(engine))
    model.restore([*wanted, *(one for one in masters if one.name.removeprefix(PREFIX) in found.kept)])
    for name, (growth, _) in found.grown.items():
        grown[name] = growth.apply(grown[name]).view(-1)
    for one in masters:
        name, master = one.name.removeprefix(PREFIX), one.tensors[MASTER]
        if name in grown:
            master.copy_(grown[name][one.start : one.start + one.length])
        elif name in found.zero:
            master.zero_()
    buffers = {name: b for name, b in state_buffers(module).items() if name.removeprefix(PREFIX) in found.kept}
    stored = model.buffers() if buffers else {}
    for name, buffer in buffers.items():
        buffer.copy_(stored[name.removeprefix(PREFIX)])
    for one in engine.fragments():
        for key in engine.optimizer.ema_keys:
            one.tensors[key].copy_(one.tensors[MASTER])
    engine.publish(num_steps=0)
    if config.lora is None or lora is not None or rank:
        return model.lineage()
    return model.lineage_of_lora()


def _masters(engine: Engine) -> Iterator[Fragment]:
    """This rank's share of the network's masters, trained and frozen, with the names of a network without adapters."""
    for one in (*engine.fragments(), *engine.frozen_fragments()):
        if one.name.startswith(PREFIX):
            yield replace(one, name=base_name(one.name), tensors={MASTER: one.tensors[MASTER]})


def _other_settings(model: StoredModel, config: Config) -> list[str]:
    """Settings that the weights were trained under and that this run does not have, with which they mean another
    function."""
    theirs, ours = model.config, config
    if theirs.network.kind != ours.network.kind:
        return [f"network.kind is '{theirs.network.kind}' there, '{ours.network.kind}' here"]
    found = []
    for section in ("network", "denoiser"):
        old, new = (dict(leaves(one.model_dump()[section], section)) for one in (theirs, ours))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and key.rpartition(".")[2] not in NO_MEANING and new.get(key) != "auto":
                found.append(f"{key} is {old.get(key)} there, {new.get(key)} here")
    return found


def _shapes(network: nn.Module) -> dict[str, list[int]]:
    """Of parameters and of the buffers that are stored with them."""
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def _growths(found: InitialWeights, before: Any, network: Any, old: Conditions, new: Conditions) -> dict[str, Growth]:
    """By name, what becomes larger, or of another order, through other classes and further grids; what is new for
    conditions and begins at 0 goes to `found.zero`, what is worth a line to its notes."""
    growths = dict[str, Growth]()
    added = {name for name, spec in new.items() if name not in old or old[name].kind != spec.kind}
    for path, part in network.named_modules():
        if not isinstance(part, Conditioning):
            continue
        for name in new:
            outputs = [f"{path}.{one}" for one in part.outputs(name)]
            if name in added:
                found.zero.update(outputs)
            elif new[name].kind == "class" and new[name].classes != old[name].classes:
                growths[outputs[0]] = _of_classes(found, name, old[name].classes, new[name].classes)
    found.notes += [f"condition '{name}' ({new[name].kind})" for name in new if name in added]
    tokens = [name for name, spec in old.items() if spec.kind in HAS_LENGTH and name in new and name not in added]
    attended = any(name.endswith("null_token") for name, _ in network.named_parameters())
    for name in sorted(added):
        if tokens and attended and new[name].kind in HAS_LENGTH:
            found.notes.append(f"the null token of '{name}', which blocks attend to beside '{tokens[0]}'")
    grids = [{name: spec for name, spec in each.items() if spec.kind == "concat"} for each in (old, new)]
    for name, shape in _shapes(network).items():
        if name.endswith(GRID_IN) and list(grids[0]) != list(grids[1]):
            if grids[0]:
                growths[name] = _of_grids(shape[1], *grids)
            else:
                found.zero.add(name)
    return growths


def _of_classes(found: InitialWeights, name: str, old: Sequence[str], new: Sequence[str]) -> Growth:
    """Of a table whose row 0 is the null class."""
    row = {known: 1 + i for i, known in enumerate(old)}
    if further := [one for one in new if one not in row]:
        found.notes.append(f"classes of '{name}': {listed(further)}")
    if gone := [one for one in old if one not in set(new)]:
        found.misfits.append(f"the data lack classes of '{name}': {listed(gone)}")
    return Growth(0, (0, *(row.get(one, 0) for one in new)))


def _of_grids(size: int, old: Mapping[str, ConditionSpec], new: Mapping[str, ConditionSpec]) -> Growth:
    """Of input channels, of which each grid has its own and one more, in the order of the conditions."""
    each = size // sum(1 + spec.shape[0] for spec in new.values())  # entries a channel: of a patch, say
    places, start = dict[str, int](), 0
    for name, spec in old.items():
        places[name] = start
        start += (1 + spec.shape[0]) * each
    entries = list[int]()
    for name, spec in new.items():
        first, count = places.get(name, NULL), (1 + spec.shape[0]) * each
        entries += [NULL] * count if first == NULL else range(first, first + count)
    return Growth(1, tuple(entries))


def _match(
    found: InitialWeights, wanted: Shapes, before: Shapes, stored: Shapes, growths: Mapping[str, Growth], channels: bool
) -> None:
    """Sorts the tensors: wanted by the network, there before what is new, and stored. `channels`: there are further
    ones, and the axis that holds them is the one that is longer."""
    reshaped = [name for name in before if name in stored and list(stored[name]) != list(before[name])]
    missing = [name for name in before if name in wanted and name not in stored]
    for name, shape in wanted.items():
        known = list(before.get(name, ()))
        if name not in before or name not in stored or name in reshaped:
            continue
        longer = [axis for axis in range(len(known)) if len(shape) == len(known) and shape[axis] > known[axis]]
        if name in growths:
            found.grown[name] = growths[name], known
        elif list(shape) == known:
            found.kept.add(name)
        elif channels and len(longer) == 1:
            (axis,) = longer
            entries = (*range(known[axis]), *[NULL] * (shape[axis] - known[axis]))
            found.grown[name] = Growth(axis, entries), known
        else:
            reshaped.append(name)
    found.zero &= wanted.keys()
    further = [name for name in stored if name not in wanted]
    shapes = [f"{name} {list(stored[name])}, here {list(wanted[name])}" for name in reshaped if name in wanted]
    for what, names in (("missing", missing), ("further", further), ("of another shape", shapes)):
        if names:
            found.misfits.append(f"{len(names):,} tensor{'s' if names[1:] else ''} {what}: {listed(names)}")
