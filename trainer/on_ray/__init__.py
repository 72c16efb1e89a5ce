"""A run on Ray Train: its workers, restarts, and what we change of Ray."""
