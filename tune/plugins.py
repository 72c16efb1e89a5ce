"""Searchers, schedulers and callbacks by the name that a sweep gives: Ray Tune's own, or a user's `module:Name`."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from scoreray.data.errors import UserError, nearest
from scoreray.data.own_code import load

SEARCHERS = {
    "ax": "ray.tune.search.ax:AxSearch",
    "bayesopt": "ray.tune.search.bayesopt:BayesOptSearch",
    "bohb": "ray.tune.search.bohb:TuneBOHB",
    "hebo": "ray.tune.search.hebo:HEBOSearch",
    "hyperopt": "ray.tune.search.hyperopt:HyperOptSearch",
    "zoopt": "ray.tune.search.zoopt:ZOOptSearch",
}
SCHEDULERS = {
    "asha": "ray.tune.schedulers:ASHAScheduler",
    "hyperband": "ray.tune.schedulers:HyperBandScheduler",
    "median": "ray.tune.schedulers:MedianStoppingRule",
    "pb2": "ray.tune.schedulers.pb2:PB2",
    "pbt": "ray.tune.schedulers:PopulationBasedTraining",
}
CALLBACKS = {
    "aim": "ray.tune.logger.aim:AimLoggerCallback",
    "comet": "ray.air.integrations.comet:CometLoggerCallback",
    "csv": "ray.tune.logger:CSVLoggerCallback",
    "json": "ray.tune.logger:JsonLoggerCallback",
    "mlflow": "ray.air.integrations.mlflow:MLflowLoggerCallback",
    "tbx": "ray.tune.logger:TBXLoggerCallback",
    "tensorboard": "ray.tune.logger:TBXLoggerCallback",
    "wandb": "ray.air.integrations.wandb:WandbLoggerCallback",
}


def plugin_class(name: str, known: Mapping[str, str]) -> type[Any]:
    """The class of a known name, or of a user's `module:Name`. Raises UserError where it can't be imported."""
    if name not in known:
        found = load(name, "kind")
    else:
        try:
            found = pkgutil.resolve_name(known[name])
        except ModuleNotFoundError as error:
            raise UserError(_missing(name, error)) from None
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"'{name}' can't be imported: {_line(error)}") from None
    if not isinstance(found, type):
        raise UserError(f"'{name}' is no class; name one as package.module:Name")
    return found


def build(kind: type[Any], given: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """An instance of `kind` from those of `given` that it has parameters for, and from all of a user's `options`.

    Raises UserError on an option that it does not have, and with the first line of what its constructor raises: there
    Tune's own classes name the package that is missing.
    """
    parameters = inspect.signature(kind).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        for name in options:
            if name not in parameters:
                raise UserError(f"options.{name}: unknown key; {nearest(name, parameters)}")
    try:
        return kind(**{name: value for name, value in given.items() if name in parameters} | dict(options))
    except ModuleNotFoundError as error:
        raise UserError(_missing(kind.__name__, error)) from None
    except Exception as error:  # whatever a library raises: AssertionError, TypeError, TuneError, ...
        raise UserError(_line(error)) from None


def _missing(name: str, error: ModuleNotFoundError) -> str:
    return f"'{name}' needs the module {error.name}, which is not installed; pip install it, or set PYTHONPATH"


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
