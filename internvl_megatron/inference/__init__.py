"""Answering prompts with a trained model."""
