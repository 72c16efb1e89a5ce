"""Objects under a URL: folders and S3, ranged reads, hedged requests, leases, and an S3 server for this machine."""
