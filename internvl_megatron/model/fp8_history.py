"""The state of delayed scaling: the largest magnitudes of a run's last steps, which decide the scales of the next.

An entry is one tensor of one linear layer (its input, weight, or output gradient) in one optimizer step: the largest magnitude
over all micro-batches and over all data-, context- and tensor-parallel copies of the layer. So neither the split of a step into
micro-batches nor the layout changes a scale. Transformer Engine enters every micro-batch and rolls after each: there
`history_steps` micro-batches are remembered instead of steps, and the scales of a step's later micro-batches know its first.
As there, the scale is 1 while nothing is known, and a tensor that is zero, or not finite, leaves its entries as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from internvl_megatron.model.fp8_format import KINDS, Kind, amax


@dataclass(frozen=True)
class LayerAmax:
    """What one linear layer sees: places in its `AmaxHistories`."""

    largest: Tensor
    """fp32 [kinds]: of earlier steps, 0 = nothing known."""
    seen: Tensor
    """fp32 [kinds]: of this step so far."""

    def note(self, kind: Kind, values: Tensor) -> None:
        """Take a tensor's largest magnitude into this step's entry. Noting it twice, as recomputation does, changes nothing."""
        place = self.seen[KINDS.index(kind)]
        torch.maximum(place, amax(values), out=place)

    def scaling_for(self, kind: Kind) -> Tensor:
        """The magnitude, fp32 [], that becomes the format's largest number in this step."""
        return self.largest[KINDS.index(kind)]


class AmaxHistories:
    """Histories of all linear layers this rank holds in FP8 with delayed scaling."""

    def __init__(self, names: Sequence[str], num_steps: int, device: torch.device) -> None:
        """Begin without any entry.

        Args:
            names: of the layers, the same under every layout.
            num_steps: that are remembered.
            device: of the layers.
        """
        self.names = tuple(names)
        self.past = torch.zeros(len(names), num_steps, len(KINDS), device=device)
        """fp32 [layers, steps, kinds], newest first; 0 = no entry."""
        self._largest = torch.zeros(len(names), len(KINDS), device=device)
        self._seen = torch.zeros_like(self._largest)

    def of(self, name: str) -> LayerAmax:
        """The places of one layer."""
        place = self.names.index(name)
        return LayerAmax(self._largest[place], self._seen[place])

    def end_step(self, copies: dist.ProcessGroup) -> None:
        """Enter what was seen in this step, and choose the scales of the next; one small collective.

        Args:
            copies: all ranks of the pipeline stage, which hold copies or parts of these layers.
        """
        dist.all_reduce(self._seen, op=dist.ReduceOp.MAX, group=copies)
        has_entry = (self._seen > 0) & self._seen.isfinite()
        newer = torch.cat([self._seen[:, None], self.past[:, :-1]], dim=1)
        self.past.copy_(torch.where(has_entry[:, None], newer, self.past))
        self._seen.zero_()
        self.choose_scales()

    def choose_scales(self) -> None:
        """Have the scales follow from the entries."""
        self._largest.copy_(self.past.amax(1))
