"""InternVL3 on Megatron Core: vision tower (InternViT + projector), language model, attention, positions, loss."""
