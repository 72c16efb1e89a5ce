"""Trained models in formats that others load, with model cards: diffusers folders, ONNX, torch.export; to the Hub."""
