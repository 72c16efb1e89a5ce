"""The sampling service: checked requests, step batching, replicas, idempotency, metrics."""
