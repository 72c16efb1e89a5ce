"""The config of a run: typed sections, loading with overrides, validation across sections, the scale of the data."""

from scoreray.trainer.config.load import (
    differing_keys,
    dump_config,
    explained,
    kinds_first,
    leaves,
    left_out_by_kinds,
    load_config,
    override,
    parse_sections,
    read_yaml,
    refusal,
    set_key,
    with_default_kinds,
)
from scoreray.trainer.config.sections import Config, DataSection, DurationSection, Section, check_run_name
from scoreray.trainer.objectives.teacher import MAX_GUIDANCE

__all__ = [
    "MAX_GUIDANCE",
    "Config",
    "DataSection",
    "DurationSection",
    "Section",
    "check_run_name",
    "differing_keys",
    "dump_config",
    "explained",
    "kinds_first",
    "leaves",
    "left_out_by_kinds",
    "load_config",
    "override",
    "parse_sections",
    "read_yaml",
    "refusal",
    "set_key",
    "with_default_kinds",
]
