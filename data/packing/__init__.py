"""Making data sets: what can be packed, how samples become shards and a manifest, and looking at the result."""
