"""Engines that turn a loss into an update, on one process or sharded, and what they cost in memory and time."""
