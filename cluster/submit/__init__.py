"""Verbs as jobs on a remote cluster."""
