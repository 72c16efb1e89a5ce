"""Data sets in buckets of sizes: which sizes there are, the list of the buckets, the order of batches, reading them."""
