"""Parts of somebody else's as sections of a config: keys, defaults and checks are those of the part's own class."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, SerializationInfo, TypeAdapter, create_model
from pydantic_core import CoreSchema, core_schema

from scoreray.data.errors import ScorerayError, UserError
from scoreray.data.own_code.gate import is_own, line_of, load

FROM_DATA = ("shape", "conditions")  # arguments of an nn.Module's constructor that are no keys: the data give them
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class OwnPart:
    """A section whose `kind` is `package.module:Name`: `config` is an instance of what that names.

    It has the config's attributes; those that the config lacks are what `base`, the class of our own parts, has for
    all of them. Pickled it is its name and keys, so another process imports the code by its own rules.
    """

    kind: str
    config: Any
    base: type = field(default=object, compare=False, repr=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return getattr(self.config, name)
        except AttributeError:
            if not hasattr(self.base, name):
                raise
        found = inspect.getattr_static(self.base, name)
        return found.__get__(self, type(self)) if hasattr(found, "__get__") else found

    def build(self, *arguments: Any, **options: Any) -> Any:
        """The config's `build`, a torch.nn.Module. Raises UserError where it fails or gives something else."""
        from torch import nn

        try:
            made = self.__getattr__("build")(*arguments, **options)
        except ScorerayError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"kind '{self.kind}': its build failed: {line_of(error)}") from error
        if not isinstance(made, nn.Module):
            raise UserError(f"kind '{self.kind}': its build gave a {type(made).__name__}; a torch.nn.Module is needed")
        return made

    def dump(self, mode: Any = "python") -> dict[str, Any]:
        """The section: `kind`, then the keys with their values, defaults too."""
        keys = _adapter(self.kind).dump_python({self.kind: self.config}, mode=mode)[self.kind]
        return {"kind": self.kind, **{name: value for name, value in keys.items() if name != "kind"}}

    def __reduce__(self) -> Any:
        return _again, (self.dump(), self.base)


@dataclass(frozen=True)
class PartOf:
    """Beside a type of a config, `Annotated[Network, PartOf("network")]`: a section of it may be somebody else's.

    Ours are chosen by their `kind` where the type is a union. base: see `OwnPart`. needs: names, one of which a
    part's class must have.
    """

    what: str
    needs: tuple[str, ...] = ("build",)
    base: type = object

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        is_union = typing.get_origin(source) in (typing.Union, types.UnionType)
        ours = handler.generate_schema(Annotated[source, Field(discriminator="kind")] if is_union else source)
        dumped = core_schema.wrap_serializer_function_ser_schema(_dumped, info_arg=True, schema=ours)
        return core_schema.no_info_wrap_validator_function(self._read, ours, serialization=dumped)

    def _read(self, value: Any, ours: Any) -> Any:
        if isinstance(value, OwnPart):
            return value
        if not isinstance(value, Mapping) or not is_own(value.get("kind")):
            return ours(value)
        found = load(value["kind"], "kind")
        if not any(hasattr(found, name) for name in self.needs) and not _is_module(found):
            accepted = f"a class with {' or '.join(self.needs)}" + (" or an nn.Module" * (self.needs == ("build",)))
            raise UserError(f"kind '{value['kind']}': is no {self.what}: {_described(found)}; {accepted} is needed")
        return own_part(value, self.base)


def own_part(section: Mapping[str, Any], base: type = object) -> OwnPart:
    """A section with a `kind` of somebody else's. Raises UserError (not brought, no such class), ValidationError."""
    kind = section["kind"]
    keys = {name: value for name, value in section.items() if name != "kind"}
    return OwnPart(kind, _adapter(kind).validate_python({kind: keys})[kind], base)


@functools.cache
def config_class(kind: str) -> type[Any]:
    """The class of a part's section: a dataclass or pydantic model as it is, of an nn.Module one of its constructor's
    arguments. Raises UserError for anything else."""
    found = load(kind, "kind")
    if _is_module(found):
        return _of_constructor(found)
    if isinstance(found, type) and issubclass(found, BaseModel):
        if found.model_config.get("extra") is None:  # pydantic's default, by which a misspelt key is lost

            class Closed(found, extra="forbid"):  # type: ignore[misc, valid-type, call-arg]
                pass

            return Closed
        return found
    if isinstance(found, type) and is_dataclass(found):
        return found
    raise UserError(
        f"kind '{kind}': is {_described(found)}; a frozen dataclass, a pydantic model or a torch.nn.Module is needed"
    )


class ModuleSection(BaseModel):
    """The section of an nn.Module: its keys are the arguments of the module's constructor."""

    model_config = CONFIG
    module: ClassVar[type[Any]]
    from_data: ClassVar[tuple[str, ...]]

    def build(self, shape: Any, conditions: Any = 0) -> Any:
        given = {"shape": tuple(shape), "conditions": conditions}
        keys = {name: getattr(self, name) for name in type(self).model_fields}
        return self.module(**keys, **{name: given[name] for name in self.from_data})


def _of_constructor(module: type[Any]) -> type[ModuleSection]:
    parameters = [one for one in inspect.signature(module).parameters.values() if one.kind in _NAMED]
    hints = typing.get_type_hints(module.__init__, include_extras=True)
    fields: dict[str, Any] = {
        one.name: (hints.get(one.name, Any), ... if one.default is one.empty else one.default)
        for one in parameters
        if one.name not in FROM_DATA
    }
    section = create_model(module.__name__, __base__=ModuleSection, __module__=module.__module__, **fields)
    section.module = module
    section.from_data = tuple(one.name for one in parameters if one.name in FROM_DATA)
    return section


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@functools.cache
def _adapter(kind: str) -> TypeAdapter[dict[str, Any]]:
    """Of {kind: keys}: so an error's place holds the kind before the key, as pydantic's does for a tagged union. A
    dataclass without a pydantic config takes CONFIG's."""
    return TypeAdapter(dict[str, config_class(kind)], config=CONFIG)  # type: ignore[misc, arg-type]


class _Unavailable:
    """What stands for a part's config in a process that can't import it: any use of it raises why."""

    def __init__(self, reason: UserError) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._reason


def _again(section: dict[str, Any], base: type) -> OwnPart:
    """Unpickled. What is raised in here, Ray would report as a failure of its own, with a stack: so not here."""
    try:
        return own_part(section, base)
    except UserError as error:
        return OwnPart(section["kind"], _Unavailable(error), base)


def _dumped(value: Any, ours: Any, info: SerializationInfo) -> Any:
    return value.dump(info.mode) if isinstance(value, OwnPart) else ours(value)


def _is_module(found: Any) -> bool:
    from torch import nn

    return isinstance(found, type) and issubclass(found, nn.Module)


def _described(found: Any) -> str:
    return f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
