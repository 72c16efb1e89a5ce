"""HTTP of the sampling service: the FastAPI application, its pages, its listener, and a client."""
