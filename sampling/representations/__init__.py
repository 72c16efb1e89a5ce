"""Representations: codes that a trained model gives data, and what is measured of codes beside known factors."""
