"""Encoders: autoencoders and text encoders that make fields of other fields, and decode latents again."""
