"""Measuring a trained model on held-out questions."""
