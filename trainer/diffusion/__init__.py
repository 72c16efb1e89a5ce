"""The mathematics: forward processes, the denoiser, objectives, weightings, noise levels and keyed noise."""
