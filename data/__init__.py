"""Object store, manifest, packing, the order of samples, decoding, and the stream that a rank reads."""
