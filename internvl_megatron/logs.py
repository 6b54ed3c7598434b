"""What a rank prints: rank 0 reports, the others only warn; libraries keep quiet unless something is wrong."""

import logging
import sys
import warnings

NOISY = ("megatron", "torch", "torch.distributed", "transformers", "PIL", "matplotlib")


def configure_logging(rank: int) -> None:
    """Set up logging of a trainer process.

    Megatron Core and torch warn about each other's deprecations on every call; a user can do nothing about them.
    """
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
