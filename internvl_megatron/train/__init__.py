"""Training: the decoupled step and both optimizers; the loop around them is `internvl_megatron.trainer`."""
