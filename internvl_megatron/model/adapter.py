"""Low-rank adapters beside tensor-parallel linear layers: y = W x + scale * B (A x), W frozen (LoRA, arXiv 2106.09685, eq. 3).

Shapes: K inputs and N outputs of a layer over all tensor-parallel ranks, r the adapter's rank, A [r, K], B [N, r]. The matrices are
those of Megatron Core's layers: one adapter for q, k and v together, one for gate and up. Where the layer stacks several
matrices and each is split over the ranks (gate and up), B is [stacked, N / stacked, r] and split along its second
dimension.

One of the two is split as W is, the other is whole on every rank. Between them are r numbers a token, and there the ranks
exchange what they have to:

    split along N   A whole; A x is gathered along the sequence (sequence parallelism), its gradient summed over the ranks
    split along K   A split; A x is summed over the ranks, or summed and scattered along the sequence; B whole

Without sequence parallelism the whole one's gradient is whole on every rank; with it every rank has that of its tokens, and
the parameter is marked for Megatron Core to sum them.
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from internvl_megatron.config.schema import LoraConfig

Block = Literal["attention", "mlp"]
A, B = "lora_a", "lora_b"
"""What the two matrices are called inside their layer."""


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its name."""
    return name.rsplit(".", 1)[-1] in (A, B)


def adapter_rank(name: str, lora: LoraConfig) -> int | None:
    """Rank of the adapters in the part of the model that a parameter belongs to; None = it has none."""
    if name.startswith("language."):
        return lora.language_rank
    return None if name.startswith("vision.projector.") else lora.vision_rank


@dataclass(frozen=True)
class Adapter:
    """What adapters of a transformer layer are like."""

    rank: int
    scale: float
    layers: Literal["all", "attention", "mlp"]

    def beside(self, linear: type[torch.nn.Module], side: "type[AdaptedLinear]", block: Block) -> Any:
        """Builder of a linear layer with an adapter, or of the layer alone, if those of the block have none."""
        if self.layers not in ("all", block):
            return linear
        return partial(_with_adapter(linear, side), adapter=self)


class AdaptedLinear(torch.nn.Module):
    """Added in front of a linear layer's class: the layer, and an adapter beside it."""

    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    split: str
    """The one of the two that is split over the ranks."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        adapter: Adapter,
        config: ModelParallelConfig,
        tp_group: dist.ProcessGroup,
        stride: int = 1,
        **settings: Any,
    ) -> None:
        """Build both.

        Args:
            input_size: K.
            output_size: N.
            adapter: what the adapter is like.
            config: Megatron Core's.
            tp_group: ranks that W is split over.
            stride: matrices that the layer stacks, each split by itself.
            settings: of the layer.
        """
        stacked = {"stride": stride} if stride > 1 else {}
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **stacked, **settings)
        num_ranks = tp_group.size()
        self._scale, self._group = adapter.scale, tp_group
        self._along_sequence = config.sequence_parallel and num_ranks > 1
        in_size, out_size = (
            (input_size, output_size // num_ranks) if self.split == B else (input_size // num_ranks, output_size)
        )
        shape_b = (out_size, adapter.rank) if stride == 1 else (stride, out_size // stride, adapter.rank)
        weight: Any = self.weight
        for name, shape in ((A, (adapter.rank, in_size)), (B, shape_b)):
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=weight.device))
            is_split = name == self.split
            set_tensor_model_parallel_attributes(parameter, is_split, len(shape) - 2 if name == B else 1, 1)
            setattr(parameter, "sequence_parallel", self._along_sequence and not is_split)
            setattr(self, name, parameter)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, batch, K of this rank] to [S, batch, N of this rank], and what the layer itself returns as its bias."""
        output, bias = super().forward(input_)
        low = self._between(F.linear(input_, self.lora_a)) * self._scale
        return output + F.linear(low, self.lora_b.flatten(0, -2)), bias

    @abstractmethod
    def _between(self, low: Tensor) -> Tensor:
        """A x of this rank to what its B takes."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What this rank saves and loads."""
        assert metadata is not None, "the checkpoint says which ranks hold copies"
        layer: Any = super()
        state: dict[str, Any] = layer.sharded_state_dict(prefix, sharded_offsets, metadata)
        return state | make_sharded_tensors_for_checkpoint(
            {A: self.lora_a, B: self.lora_b},
            prefix,
            {self.split: getattr(self, self.split).partition_dim},
            sharded_offsets,
            tp_group=self._group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class SplitOutputs(AdaptedLinear):
    """Beside a layer that is split along its outputs."""

    split = B

    def _between(self, low: Tensor) -> Tensor:
        """Of all tokens, on every rank."""
        if self._along_sequence:
            return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self._group)
        return copy_to_tensor_model_parallel_region(low, group=self._group)


class SplitInputs(AdaptedLinear):
    """Beside a layer that is split along its inputs."""

    split = A

    def _between(self, low: Tensor) -> Tensor:
        """The sum over the ranks, of this rank's tokens under sequence parallelism."""
        if self._along_sequence:
            return reduce_scatter_to_sequence_parallel_region(low, group=self._group)
        return reduce_from_tensor_model_parallel_region(low, group=self._group)


@cache
def _with_adapter(linear: type[torch.nn.Module], side: type[AdaptedLinear]) -> type[torch.nn.Module]:
    return type(f"{linear.__name__}WithAdapter", (side, linear), {})
