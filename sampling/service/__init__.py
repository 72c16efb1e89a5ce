"""The sampling service: HTTP, step batching, idempotency, metrics, client."""
