"""What is measured of samples and models: features, distances, likelihoods."""
