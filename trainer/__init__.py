"""Processes, the denoiser, networks, objectives, the sharded engine, checkpoints and the training run."""
