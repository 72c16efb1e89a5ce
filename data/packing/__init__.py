"""Making data sets: how samples become shards, an index and a manifest, and looking at the result."""
