"""Maximum likelihood of energies without their normaliser: noise-contrastive estimation, recovery likelihood."""
