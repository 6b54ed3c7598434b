"""Imported once by the process that forks local ranks, so that N ranks do not import torch N times.

Starts no thread and touches no GPU: both would not survive the fork.
"""

import megatron.core.dist_checkpointing
import megatron.core.models.gpt
import megatron.core.optimizer
import megatron.core.pipeline_parallel
import torch.distributed.checkpoint
import transformers.models.auto.tokenization_auto  # noqa: F401
