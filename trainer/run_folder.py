"""A run's folder in storage, and the config stored in it: the same command with the same config resumes the run."""

from __future__ import annotations

import contextlib
import re

import yaml

from scoreray.data.errors import DataError, StorageError, UserError
from scoreray.data.own_code import require
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.trainer.checkpoints.checkpoint import committed
from scoreray.trainer.config import Config, differing_keys, dump_config, load_config, parse_sections

CONFIG_FILE = "config.yaml"


def run_store(config: Config) -> Store:
    """Everything that the run writes is stored under this."""
    return open_store(f"{config.run.storage.rstrip('/')}/{config.run.name}")


def store_config(run: Store, config: Config) -> bool:
    """Makes `config` the run's, unless it has one; returns whether it had none."""
    return run.put_new(CONFIG_FILE, dump_config(config).encode())


def claim(run: Store, config: Config) -> None:
    """Stores the config of a new run, or checks that the stored one agrees. Raises UserError with the keys that differ,
    StorageError, DataError."""
    if store_config(run, config):
        return
    differing = differing_keys(stored_config(run), config)
    if differing and not committed(run):  # nothing was trained under it: nothing would be mixed
        run.put(CONFIG_FILE, dump_config(config).encode())
    elif differing:
        raise UserError(
            f"run '{config.run.name}' exists at {run.url()} with another config; "
            "give its config, another run.name, or --fresh\n  " + "\n  ".join(differing)
        )


def stored_config(run: Store) -> Config:
    """The config that made a run. Raises UserError where there is none, DataError where it is not valid."""
    name = run.url(CONFIG_FILE)
    try:
        data = run.get(CONFIG_FILE)
    except NotFound:
        raise UserError(f"{run.url()}: not a run ({CONFIG_FILE} is missing)") from None
    try:
        raw = parse_sections(data, name)
    except UserError as error:
        raise _no_config(name, error) from None
    require(raw, name)
    try:
        try:
            return load_config(raw)
        except UserError:
            if (older := _stored_as_yaml_1_1(data)) is None:
                raise
            return older
    except UserError as error:
        raise _no_config(name, error) from None


def _no_config(name: str, error: UserError) -> DataError:
    reason = " ".join(str(error).removeprefix(f"{name}: ").split())
    return DataError(f"{name}: not the config of a run: {reason}; fix it, or --fresh")


def _stored_as_yaml_1_1(data: bytes) -> Config | None:
    """A config that an earlier version stored: in YAML 1.1 a name such as 1e3 or 089 is a string without quotes."""
    with contextlib.suppress(yaml.YAMLError, ValueError, TypeError, OverflowError):  # UserError is a ValueError
        return load_config(yaml.safe_load(data))
    return None


def with_unused_name(config: Config) -> Config:
    """`config` under the first name of name, name-2, name-3, ... under which no run has committed anything."""
    base = re.sub(r"-\d+$", "", config.run.name)
    for number in range(1, 10_000):
        name = base if number == 1 else f"{base}-{number}"
        candidate = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        run = run_store(candidate)
        if not run.exists(CONFIG_FILE) or not committed(run):
            return candidate
    raise StorageError(f"{config.run.storage}: no unused name like '{base}-N' is left")
