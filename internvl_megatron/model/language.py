"""The language model: Megatron Core's `GPTModel` as a Qwen2 decoder that takes image embeddings.

Shapes: S tokens of this rank's part of a packed row (all of it without context parallelism), S' = S / tensor size under
sequence parallelism (else S), D hidden size, V' padded vocabulary / tensor size.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from internvl_megatron.config.plan import stage_layers
from internvl_megatron.config.schema import LanguageConfig, RunConfig, padded_vocab_size
from internvl_megatron.device import AttentionKernel, Kernels
from internvl_megatron.model.attention import PackedRow
from internvl_megatron.model.fp8_settings import fp8_of_language
from internvl_megatron.model.layer_specs import Linears, language_block, recompute_settings, shared_settings
from internvl_megatron.model.output_layer import OutputLayer, Targets


def language_transformer_config(
    config: RunConfig, dtype: torch.dtype, kernels: Kernels, rows_per_replica: int
) -> TransformerConfig:
    """Megatron Core's view of the decoder.

    Args:
        config: of the run.
        dtype: of the parameters.
        kernels: what computes the layers.
        rows_per_replica: micro-batches of a replica in a step.
    """
    language, parallel = config.model.language, config.parallel
    interleaved = parallel.virtual_size > 1
    fp8 = fp8_of_language(config, rows_per_replica) if kernels.fp8 == "transformer_engine" else {}
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
        **fp8,
        bias_activation_fusion=kernels.fuse_swiglu,
        apply_rope_fusion=kernels.fuse_rotary,
        # Transformer Engine rounds weights once for all micro-batches of a step, if it is told which is the first (`Step`).
        disable_parameter_transpose_cache=not fp8,
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
        stages: Sequence[Sequence[Linears]],
        chunk: int = 0,
        loss_chunk_tokens: int | None = None,
    ) -> None:
        """Build it.

        Args:
            language: sizes.
            config: Megatron Core's view of them.
            groups: process groups of the language model.
            kernel: for attention.
            max_tokens: of a row.
            stages: what every layer of every stage is made of, in the order rows pass them.
            chunk: which of this rank's chunks.
            loss_chunk_tokens: positions whose logits exist at the same time; None = all that have a target.
        """
        stage = chunk * groups.pp.size() + groups.pp.rank()
        block = language_block(stages[stage], kernel)
        with _quiet_deprecation():
            super().__init__(
                config=config,
                transformer_layer_spec=block,  # pyright: ignore[reportArgumentType]
                vocab_size=padded_vocab_size(language.vocab_size),
                max_sequence_length=max_tokens,
                pre_process=stage == 0,
                post_process=stage == len(stages) - 1,
                vp_stage=chunk if config.virtual_pipeline_model_parallel_size else None,
                position_embedding_type="none",
                share_embeddings_and_output_weights=False,
                pg_collection=groups,
            )
        if self.post_process:
            del self.output_layer  # before the one in its place takes as much memory
            self.output_layer = OutputLayer(config, language.vocab_size, groups, loss_chunk_tokens)
            self.setup_embeddings_and_output_layer()  # once more: it marks the weight

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        token_ids: Tensor,
        row: PackedRow,
        images: ImageTokens | None = None,
        output_positions: Tensor | None = None,
        targets: Targets | None = None,
    ) -> Tensor:
        """Run this stage on one packed row.

        Args:
            token_ids: int64 [1, S], this rank's part of the row.
            row: segments of the whole row, rotary tables of this part.
            images: embeddings that replace this slice's image tokens; first stage only.
            output_positions: int64 [n], places in this part whose logits or losses are wanted; None = all S.
            targets: what these positions predict; None where logits are wanted.

        Returns:
            Last stage: what `OutputLayer` makes of the targets, if there are any; else logits [n, 1, V'] of this rank's part of the vocabulary, padding columns at -inf.
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
            output_processor=self._output,
            output_processor_context=(output_positions, targets),
        )

    def _output(self, hidden_states: Tensor, context: tuple[Tensor | None, Targets | None], **_kwargs: Any) -> Tensor:
        positions, targets = context
        return self.output_layer(hidden_states, positions, targets)


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
