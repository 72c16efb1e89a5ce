"""What is minimised in training, by the word that chooses it in a config."""
