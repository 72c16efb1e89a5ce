"""Pretrained models of other libraries as models that every verb takes."""
