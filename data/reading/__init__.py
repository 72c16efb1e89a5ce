"""Reading a packed data set: manifest, records, the order of samples, decoding, and the stream that a rank reads."""
