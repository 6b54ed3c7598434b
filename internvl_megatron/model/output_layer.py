"""The output layer: hidden states to logits over the vocabulary, or straight to the loss.

Shapes as in `language`: S' tokens of this rank's slice of a row, S of its part, D hidden size, V' this rank's part of the padded
vocabulary; n positions that are asked for.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from internvl_megatron.config.schema import padded_vocab_size
from internvl_megatron.device import likes_whole_widths
from internvl_megatron.model.chunked_loss import chunked_linear_loss
from internvl_megatron.model.loss import cross_entropies, weighted_sum
from internvl_megatron.model.token_losses import chunked_token_losses


@dataclass(frozen=True)
class Targets:
    """What n positions predict."""

    tokens: Tensor
    """int64 [n]; anything below 0 is read as token 0 and needs weight 0."""
    weights: Tensor | None
    """fp32 [n], of their losses in the sum; None = no sum, the loss of every position is wanted."""


class OutputLayer(ColumnParallelLinear):
    """Megatron Core's, that multiplies only the positions that are asked for, and knows the vocabulary's padding.

    The loss is computed in here, and not behind it, because this is the module before whose forward pass Megatron Core waits
    for the weight where gathering parameters overlaps with computing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        groups: ProcessGroupCollection,
        loss_chunk_tokens: int | None,
    ) -> None:
        """Build it.

        Args:
            config: Megatron Core's view of the decoder.
            vocab_size: without padding.
            groups: process groups of the language model.
            loss_chunk_tokens: positions whose logits exist at the same time when the loss is asked for; None = all.
        """
        super().__init__(
            config.hidden_size,
            padded_vocab_size(vocab_size),
            config=config,
            init_method=torch.nn.init.normal_,  # not called: `build` fills all parameters
            bias=False,
            gather_output=False,
            tp_group=groups.tp,
        )
        self._tensor_group = groups.tp
        # Under sequence parallelism it would gather the row itself; here the row is gathered before positions are chosen.
        self._gathers_sequence = self.sequence_parallel
        self.sequence_parallel = False
        self.allreduce_dgrad = groups.tp.size() > 1
        num_columns = self.output_size_per_partition
        self._num_real_columns = min(max(0, vocab_size - groups.tp.rank() * num_columns), num_columns)
        self._loss_chunk_tokens = loss_chunk_tokens

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, positions: Tensor | None = None, targets: Targets | None = None
    ) -> Tensor:
        """Logits, or the loss.

        Args:
            hidden_states: [S', 1, D].
            positions: int64 [n], places in this rank's part of the row; None = all S.
            targets: of these positions.

        Returns:
            Without targets: logits [n, 1, V'] of this rank's part of the vocabulary, padding columns at -inf.
            With targets: fp32 [1 + n], the sum of weight times cross entropy, and its terms, which have no gradient; without
            weights the cross entropy of every position, fp32 [n].
        """
        if self._gathers_sequence:
            # This layer's backward sums the gradient over the tensor-parallel ranks: each keeps its slice of it.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self._tensor_group
            )
        if positions is not None:
            hidden_states = hidden_states.index_select(0, positions)
        if targets is None:
            return self._logits(hidden_states)
        if targets.weights is None:
            return self._token_losses(hidden_states, targets.tokens)
        if self._loss_chunk_tokens is None:
            losses = cross_entropies(self._logits(hidden_states), targets.tokens, self._tensor_group)
            return _with_terms(*weighted_sum(losses, targets.weights))
        weight: Any = self.weight
        return _with_terms(
            *chunked_linear_loss(
                hidden_states.flatten(0, 1),
                weight,
                targets.tokens,
                targets.weights,
                self._tensor_group,
                self._num_real_columns,
                self._loss_chunk_tokens,
            )
        )

    def _token_losses(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        if self._loss_chunk_tokens is None:
            return cross_entropies(self._logits(hidden_states), targets, self._tensor_group)
        weight: Any = self.weight
        return chunked_token_losses(
            hidden_states.flatten(0, 1),
            weight,
            targets,
            self._tensor_group,
            self._num_real_columns,
            self._loss_chunk_tokens,
        )

    def _logits(self, hidden_states: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            weight: Any = self.weight
            if likes_whole_widths(weight):
                logits = torch.nn.functional.linear(hidden_states, weight)
                logits[..., self._num_real_columns :] = float("-inf")
                return logits
            # Without padding: 8 positions of the 1B take 53 ms of two cores, and 84 with it (MKL, 151,674 of 152,064 columns).
            logits = torch.nn.functional.linear(hidden_states, weight[: self._num_real_columns])
            return torch.nn.functional.pad(
                logits, (0, self.output_size_per_partition - self._num_real_columns), value=float("-inf")
            )
        output: Any = super().forward(hidden_states)
        logits = output[0]
        if self._num_real_columns == logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= self._num_real_columns
        return logits.masked_fill(padding, float("-inf"))


def _with_terms(loss: Tensor, terms: Tensor) -> Tensor:
    """One tensor, which is what passes through Megatron Core's modules and schedules."""
    return torch.cat([loss[None], terms])
