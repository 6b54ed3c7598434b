"""Imported once by the process that CPU ranks are forked from, so that N ranks do not import torch N times.

Starts no thread. GPU ranks are not forked: these imports ask the driver for its devices, which does not survive a fork.
"""

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from internvl_megatron.device import hide_gpu_packages


def _compile_when_called(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`torch.compile`, which loads the compiler at once (a quarter of all this takes), put off to the function's first call."""
    compiled = functools.cache(lambda: torch.compile(function, **settings))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


hide_gpu_packages()
# Megatron Core tells at import which optional packages are absent, torch that a compiler has no GPU; `doctor` tells both.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings(), mock.patch.object(torch, "compile", _compile_when_called):
    warnings.simplefilter("ignore")
    import internvl_megatron.trainer  # noqa: F401 - imports everything a training rank needs
