"""Where things are: ranks, process groups, which rank encodes which tile, and the exchange between them."""
