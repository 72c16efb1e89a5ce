"""A run's committed records at tracking servers (MLflow, Weights & Biases), sent from beside the run."""
