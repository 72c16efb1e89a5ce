"""What is missing or will not fit, on this machine and on every node of a cluster."""
