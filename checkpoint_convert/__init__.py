"""Hugging Face <-> Megatron weights: one table of names, invertible transforms."""
