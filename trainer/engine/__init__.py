"""Engines that turn a loss into an update, on one process or sharded, and what they cost in memory and time."""

from scoreray.trainer.engine.base import Engine, EngineConfig, resolve_precision
from scoreray.trainer.engine.build import build_engine

__all__ = ["Engine", "EngineConfig", "build_engine", "resolve_precision"]
