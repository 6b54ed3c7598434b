"""The language model: Megatron Core's `GPTModel` as a Qwen2 decoder that takes image embeddings.

Shapes: S tokens of this rank's part of a packed row (all of it without context parallelism), S' = S / tensor size under
sequence parallelism (else S), D hidden size, V padded vocabulary, V' = V / tensor size.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from internvl_megatron.config.plan import stage_layers
from internvl_megatron.config.schema import LanguageConfig, RunConfig, padded_vocab_size
from internvl_megatron.device import AttentionKernel
from internvl_megatron.model.attention import PackedRow
from internvl_megatron.model.layer_specs import Linears, language_block, recompute_settings, shared_settings


def language_transformer_config(config: RunConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron Core's view of the decoder."""
    language, parallel = config.model.language, config.parallel
    interleaved = parallel.virtual_size > 1
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads,
        num_query_groups=language.num_kv_heads,
        kv_channels=language.head_size,
        ffn_hidden_size=language.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        **shared_settings(dtype),
        **recompute_settings(parallel.language_recompute),
        tensor_model_parallel_size=parallel.tensor_size,
        pipeline_model_parallel_size=parallel.pipeline_size,
        context_parallel_size=parallel.context_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_layout=_pipeline_layout(stage_layers(config)) if parallel.pipeline_size > 1 else None,
        deallocate_pipeline_outputs=True,
        variable_seq_lengths=not parallel.pad_rows,
        # Asked for wherever lengths vary, in dense models too.
        moe_token_dispatcher_type="alltoall",
        overlap_p2p_comm=interleaved,
        # With two pipeline ranks the interleaved schedule's batched messages mix up neighbours, and gradients are silently
        # wrong; and a rank may only work on while a message is under way if it is not batched.
        batch_p2p_comm=False,
    )


def _pipeline_layout(layers: tuple[int, ...]) -> list[list[str]]:
    """Megatron Core's description of which stage, in the order rows pass them, holds what."""
    stages = [["decoder"] * count for count in layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


@dataclass(frozen=True)
class ImageTokens:
    """Image embeddings of one row that fall into this rank's slice of the sequence."""

    embeddings: Tensor
    """[n, D]."""
    positions: Tensor
    """int64 [n]: places in the local slice, ascending."""


class LanguageModel(GPTModel):
    """One stage of the decoder: what a pipeline rank holds, or one of its chunks under the interleaved schedule."""

    def __init__(
        self,
        language: LanguageConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        kernel: AttentionKernel,
        max_tokens: int,
        layers: tuple[int, ...],
        linears: Sequence[Linears],
        chunk: int = 0,
    ) -> None:
        """Build it.

        Args:
            language: sizes.
            config: Megatron Core's view of them.
            groups: process groups of the language model.
            kernel: for attention.
            max_tokens: of a row.
            layers: of every stage, in the order rows pass them.
            linears: of every layer of the whole model.
            chunk: which of this rank's chunks.
        """
        stage = chunk * groups.pp.size() + groups.pp.rank()
        first = sum(layers[:stage])
        own_linears = linears[first : first + layers[stage]]
        with _quiet_deprecation():
            super().__init__(
                config=config,
                transformer_layer_spec=language_block(own_linears, kernel),  # pyright: ignore[reportArgumentType]
                vocab_size=padded_vocab_size(language.vocab_size),
                max_sequence_length=max_tokens,
                pre_process=stage == 0,
                post_process=stage == len(layers) - 1,
                vp_stage=chunk if config.virtual_pipeline_model_parallel_size else None,
                position_embedding_type="none",
                share_embeddings_and_output_weights=False,
                pg_collection=groups,
            )
        self.language = language
        if self.post_process:
            # Under sequence parallelism the output layer would gather the row itself; here the row is gathered before
            # it, so that only the positions that are asked for are multiplied with the vocabulary.
            self.gather_before_output = self.output_layer.sequence_parallel
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = groups.tp.size() > 1

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        token_ids: Tensor,
        row: PackedRow,
        images: ImageTokens | None = None,
        output_positions: Tensor | None = None,
    ) -> Tensor:
        """Run this stage on one packed row.

        Args:
            token_ids: int64 [1, S], this rank's part of the row.
            row: segments of the whole row, rotary tables of this part.
            images: embeddings that replace this slice's image tokens; first stage only.
            output_positions: int64 [n], places in this part whose logits are wanted; None = all S.

        Returns:
            Last stage: logits [n, 1, V'] of this rank's part of the vocabulary, padding columns at -inf.
            Other stages: hidden states [S', 1, D] for the next one.
        """
        decoder_input: Any = None
        if self.pre_process:
            decoder_input = self.embedding(token_ids, None)
            if images is not None:
                decoder_input = insert_image_tokens(decoder_input, images)
            if torch.is_grad_enabled() and not decoder_input.requires_grad:
                # A frozen embedding without images: the schedule runs backward through every stage all the same.
                decoder_input = decoder_input.requires_grad_()
        return super().forward(
            input_ids=token_ids,
            position_ids=None,  # pyright: ignore[reportArgumentType]
            attention_mask=None,  # pyright: ignore[reportArgumentType]
            decoder_input=decoder_input,
            packed_seq_params=row,
            output_processor=self._logits,
            output_processor_context=output_positions,
        )

    def _logits(self, hidden_states: Tensor, context: Tensor | None, **_kwargs: Any) -> Tensor:
        if self.gather_before_output:
            # The output layer's backward sums the gradient over the tensor-parallel ranks: each keeps its slice of it.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        if context is not None:
            hidden_states = hidden_states.index_select(0, context)
        logits, _ = self.output_layer(hidden_states)
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        num_real = self.language.vocab_size - first
        if num_real >= logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= num_real
        return logits.masked_fill(padding, float("-inf"))


def insert_image_tokens(hidden: Tensor, images: ImageTokens) -> Tensor:
    """Replace the placeholders' embeddings [S', 1, D] by the image's; the placeholder row gets no gradient.

    Raises:
        AssertionError: numbers of embeddings and placeholders differ. A silent shift of images against text would
            train a broken model without a sign.
    """
    count, places = len(images.embeddings), len(images.positions)
    assert count == places, f"{count} image embeddings for {places} image tokens in this slice of the row"
    return hidden.index_copy(0, images.positions, images.embeddings.unsqueeze(1).to(hidden.dtype))


class _quiet_deprecation:
    """GPTModel warns in favour of HybridModel, which has no place for image embeddings; say nothing for our own use."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)
