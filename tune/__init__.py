"""Searches over noise schedules and weightings."""
