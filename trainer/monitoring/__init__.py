"""What a run measures and reports, and how it is asked to stop or to save."""
