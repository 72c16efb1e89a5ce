"""What a test brings of somebody else's code goes with it: the next test of its process may not meet it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from scoreray.data.own_code import code_hash, gate, part


@contextlib.contextmanager
def own_code_forgotten(also: Sequence[str] = ()) -> Iterator[None]:
    """Within it nothing is brought but what is brought there, and after it that is not either, nor are the packages
    `also`."""
    names, paths, finders = dict(gate._names), dict(gate._paths), list(sys.meta_path)
    # A module that is written twice within a second, at one length, would be taken from what was compiled of the first.
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    _forget(also)
    try:
        yield
    finally:
        gate._names.clear()
        gate._names.update(names)
        # Only ours: a package that was first imported meanwhile may have put its own in the place of Python's.
        sys.meta_path[:] = [one for one in sys.meta_path if one in finders or not isinstance(one, gate._PathsFinder)]
        sys.dont_write_bytecode = write_bytecode
        _forget(also)
        gate._paths.update(paths)


def _forget(also: Sequence[str]) -> None:
    for name in {*also, *gate._paths}:
        gate._paths.pop(name, None)
        for module in [one for one in sys.modules if one.partition(".")[0] == name]:
            del sys.modules[module]
    for cached in (code_hash, part.config_class, part._adapter, gate._read_variable, gate._warn):
        cached.cache_clear()
