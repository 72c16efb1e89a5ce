"""Trained models: which one is at a URL, loading, export, and making them fast."""
