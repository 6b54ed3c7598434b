"""What every test relies on: the environment, and ranks of this machine."""

import os

# Before torch is imported, here and in every rank: some virtual machines advertise AMX and trap it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ["HF_HUB_OFFLINE"] = "1"

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from internvl_megatron.launcher import launch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A script that starts the suite in the background has it ignore Ctrl-C, and so would all that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, and for the ranks


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(function, num_ranks, *args)`: results of `function(rank_info, *args)` by rank.

    The process the ranks are forked from starts with the first call and serves the whole session. What needs the CPU
    adapter runs in ranks only, so that it never changes torch for other tests.
    """
    return launch
