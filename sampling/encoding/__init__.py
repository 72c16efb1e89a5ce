"""Encoding fields of a packed data set by models: pictures to latents, captions to tokens (`data encode`)."""
