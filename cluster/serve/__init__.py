"""The sampling service on Ray Serve."""
