"""Connecting to Ray: a cluster's or one of our own on this machine, and whether it has room."""
