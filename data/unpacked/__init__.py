"""Training from WebDataset tars that no manifest describes: what their first samples show, and their stream."""
