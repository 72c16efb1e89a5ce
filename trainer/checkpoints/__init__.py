"""Checkpoints: written, committed by a marker, read, and averaged after training."""
