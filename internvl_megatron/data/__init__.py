"""From files to packed rows: tiling, positions, tokens, packing and the resumable loader. Knows nothing of the model."""
