"""Imported once by the process that forks local ranks, so that N ranks do not import torch N times.

Starts no thread and touches no GPU: both would not survive the fork.
"""

import logging
import warnings

# Megatron Core tells at import which optional packages are absent, torch that a compiler has no GPU; `doctor` tells both.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import internvl_megatron.trainer  # noqa: F401 - imports everything a training rank needs
