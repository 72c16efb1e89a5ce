"""A run on Ray Train: its workers, restarts, rendezvous, and every private name of Ray that they need."""
