"""Many samples to a place, by one process or many."""
