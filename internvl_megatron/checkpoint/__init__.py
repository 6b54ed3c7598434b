"""Checkpoints: sharded state of both sides through Megatron Core, atomic folders, retention."""
