"""Flows beyond noise: couplings, sources, continuous normalizing flows by maximum likelihood."""
