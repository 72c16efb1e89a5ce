"""What a run measures and reports, and the requests to save or stop that reach its loop."""
