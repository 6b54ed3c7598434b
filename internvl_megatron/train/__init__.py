"""Training: the decoupled step, both optimizers, the loop."""
