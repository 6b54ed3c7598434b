"""Imported once by the process that CPU ranks are forked from, so that N ranks do not import torch N times.

Starts no thread. GPU ranks are not forked: these imports ask the driver for its devices, which does not survive a fork.
"""

import logging
import warnings

from internvl_megatron.device import hide_gpu_packages

hide_gpu_packages()
# Megatron Core tells at import which optional packages are absent, torch that a compiler has no GPU; `doctor` tells both.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import internvl_megatron.trainer  # noqa: F401 - imports everything a training rank needs
