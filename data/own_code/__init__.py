"""Code of somebody else's, named `package.module:Name`: which of it may be imported, how it travels, its sections."""

from scoreray.data.own_code.gate import (
    VARIABLE,
    bring,
    brought,
    check_stored,
    code_hash,
    code_hashes,
    environment,
    instance,
    is_own,
    line_of,
    load,
    name_in_command,
    py_modules,
    require,
)

__all__ = [
    "VARIABLE",
    "bring",
    "brought",
    "check_stored",
    "code_hash",
    "code_hashes",
    "environment",
    "instance",
    "is_own",
    "line_of",
    "load",
    "name_in_command",
    "py_modules",
    "require",
]
