"""Objects under a URL: folders, S3 and other clouds, retries, hedged reads, leases, an S3 server for this machine."""
