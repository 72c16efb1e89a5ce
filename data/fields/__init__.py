"""Fields of samples: what kinds there are, how each is stored, and the values that a network sees."""
