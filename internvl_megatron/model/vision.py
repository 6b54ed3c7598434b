"""InternViT, pixel shuffle and projector: the vision side of InternVL3.

Shapes: T tiles, P patches of a tile, N = 1 + P tokens in the encoder, C encoder width, D language model width,
K image tokens of a tile (P / shuffle_factor^2).
"""

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from internvl_megatron.config.schema import ModelConfig, VisionConfig
from internvl_megatron.device import TileKernel
from internvl_megatron.model.attention import TileAttention
from internvl_megatron.model.layer_specs import (
    TORCH,
    Linears,
    adding_bias,
    feed_forward,
    plain_norm,
    shared_settings,
    without_bias,
)
from internvl_megatron.model.padded_heads import mark_padded, only_real_heads, padded_heads
from internvl_megatron.model.position_table import interpolate_positions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class TileBatch(PackedSeqParams):
    """What the encoder's layers must know of a batch of tiles; travels in Megatron Core's packed-sequence slot."""

    residual_scale: Tensor | None = None
    """Drop path: fp32 [layers, 2, T], 0 where a tile skips the branch and 1 / (1 - rate) where it does not."""


def vision_transformer_config(
    model: ModelConfig, dtype: torch.dtype, tensor_size: int = 1, **settings: Any
) -> TransformerConfig:
    """Megatron Core's view of InternViT, with as many heads as divide over the tensor-parallel ranks.

    Args:
        model: its sizes.
        dtype: of the parameters.
        tensor_size: tensor-parallel ranks.
        settings: Megatron Core's that are not the same everywhere.
    """
    vision = model.vision
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=padded_heads(vision.num_heads, tensor_size),
        kv_channels=vision.hidden_size // vision.num_heads,
        ffn_hidden_size=vision.ffn_hidden_size,
        normalization="RMSNorm" if vision.norm == "rms_norm" else "LayerNorm",
        layernorm_epsilon=vision.norm_eps,
        activation_func=F.gelu,
        gated_linear_unit=False,
        add_bias_linear=True,
        tensor_model_parallel_size=tensor_size,
        # Nobody tells Transformer Engine which chunk of a step is the first: it rounds weights anew for each (FP8), and adds
        # every chunk's gradients to the buffer.
        disable_parameter_transpose_cache=True,
        **(shared_settings(dtype) | settings),
    )


class InternViTAttention(SelfAttention):
    """Self-attention with RMSNorm over the whole query and key vectors (6B family), before the split into heads.

    A tensor-parallel rank has its share of the heads, and its share of these norms' weights.
    """

    def __init__(self, *args: Any, qk_norm: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        local_width = self.num_attention_heads_per_partition * self.hidden_size_per_attention_head
        eps = self.config.layernorm_epsilon
        self.q_norm: Any = plain_norm(self.config, local_width, eps) if qk_norm else None
        self.k_norm: Any = plain_norm(self.config, local_width, eps) if qk_norm else None
        if self.world_size > 1:
            self._mark_split_parameters()

    def _mark_split_parameters(self) -> None:
        """Say of the norms' weights that they are split, and of all that belongs to heads how much of it is real."""
        real_width = self.config.hidden_size
        norms = [norm.weight for norm in (self.q_norm, self.k_norm) if norm is not None]
        for weight in norms:
            set_tensor_model_parallel_attributes(weight, True, 0, 1)
        if self.query_projection_size == real_width:
            return
        for width, parameters in (
            (3 * real_width, self.linear_qkv.parameters()),
            (real_width, (*norms, *self.linear_proj.parameters())),
        ):
            for parameter in parameters:
                # A norm in front, a bias behind, and one half of an adapter are whole.
                if getattr(parameter, "tensor_model_parallel", False):
                    mark_padded(parameter, width)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Query, key, value, each [N, T, local heads, head size]."""
        projected: Any = super().get_query_key_value_tensors(*args, **kwargs)
        query, key, value = projected
        if self.q_norm is not None and self.k_norm is not None:
            if self.world_size > 1:
                query_scale, key_scale = self._scales_over_all_ranks(query, key)
                query = (query * query_scale).to(query.dtype) * self.q_norm.weight.view(query.shape[2:])
                key = (key * key_scale).to(key.dtype) * self.k_norm.weight.view(key.shape[2:])
            else:
                query = self.q_norm(query.flatten(2)).view_as(query)
                key = self.k_norm(key.flatten(2)).view_as(key)
        return query, key, value

    def _scales_over_all_ranks(self, query: Tensor, key: Tensor) -> Tensor:
        """1 / RMS of query and key vectors, fp32 [2, N, T, 1, 1], over the heads of all ranks; padding adds nothing."""
        squares = torch.stack([vectors.float().square().sum((2, 3), keepdim=True) for vectors in (query, key)])
        # Summed in backward too: what a rank's heads change in the sum reaches the heads of all ranks. `reduce_from` alone
        # has the right values, and gradients that lack the other ranks' share.
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        return torch.rsqrt(squares / self.config.hidden_size + self.config.layernorm_epsilon)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What this rank saves and loads of every parameter: the real heads of its shard."""
        assert metadata is not None, "the checkpoint says which ranks hold copies"
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.world_size == 1:
            return state
        for name in ("q_norm", "k_norm"):
            norm = getattr(self, name)
            if norm is not None:  # Megatron Core takes torch's norms for whole on every rank
                state |= make_sharded_tensors_for_checkpoint(
                    norm.state_dict(keep_vars=True),
                    f"{prefix}{name}.",
                    {"weight": 0},
                    sharded_offsets,
                    tp_group=self.tp_group,
                    dp_cp_group=metadata["dp_cp_group"],
                )
        return {key: only_real_heads(entry) for key, entry in state.items()}


class InternViTLayer(TransformerLayer):
    """x + drop_path(ls1 * attention(norm1 x)), then x + drop_path(ls2 * mlp(norm2 x))."""

    def __init__(self, *args: Any, layer_scale_init: float, recompute: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recompute = recompute
        width, dtype = self.config.hidden_size, self.config.params_dtype
        self.ls1 = torch.nn.Parameter(torch.full((width,), layer_scale_init, dtype=dtype))
        self.ls2 = torch.nn.Parameter(torch.full((width,), layer_scale_init, dtype=dtype))
        self._residual_scale: Tensor | None = None
        # Megatron Core built its identity modules here; torch refuses to put a plain callable in a module's place.
        del self.self_attn_bda, self.mlp_bda
        self.self_attn_bda = partial(self._add_branch, 0)
        self.mlp_bda = partial(self._add_branch, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; the tile batch in `packed_seq_params` carries the drop-path decisions."""
        if not self._recompute or not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        # In here, so that hooks of the layer itself (which gather a sharded layer) run around it and not inside. Nothing is
        # random: drop path is decided outside.
        return checkpoint(self._run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        tiles = kwargs.get("packed_seq_params")
        assert isinstance(tiles, TileBatch), f"the vision encoder needs a TileBatch, got {type(tiles).__name__}"
        scale = tiles.residual_scale
        self._residual_scale = None if scale is None else scale[self.layer_number - 1]
        # The block is in this context already, but not where a layer runs again for backward.
        try:
            with get_fp8_context(self.config, self.layer_number - 1):
                return super().forward(*args, **kwargs)
        finally:
            # Running again for backward ends by an exception where nothing more is needed, before Megatron Core empties this. It
            # would keep all that was computed again until the layer's next forward pass.
            self.mlp_norm_manager = None

    def _add_branch(self, branch: int, _training: bool, _fused: bool) -> Any:
        """The slot Megatron Core fills with bias-dropout-add: here LayerScale, drop path and residual in one kernel."""
        scale: Tensor = (self.ls1, self.ls2)[branch]
        if self._residual_scale is not None:
            scale = scale * self._residual_scale[branch].to(scale.dtype)[None, :, None]

        def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _dropout: float) -> Tensor:
            output, bias = output_with_bias
            assert bias is None, "the linear layer before has added its bias"
            return torch.addcmul(residual, scale, output)

        return add


def _vision_block(
    vision: VisionConfig, linears: Linears, attention: TileKernel, recompute_layers: bool
) -> TransformerBlockSubmodules:
    qkv = linears.first("attention")
    layer = ModuleSpec(
        module=InternViTLayer,
        params={"layer_scale_init": vision.layer_scale_init, "recompute": recompute_layers},
        submodules=TransformerLayerSubmodules(
            input_layernorm=linears.own_norm,
            self_attention=ModuleSpec(
                module=InternViTAttention,
                params={"attn_mask_type": AttnMaskType.no_mask, "qk_norm": vision.qk_norm},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=qkv if vision.qkv_bias else without_bias(qkv),
                    core_attention=partial(TileAttention, kernel=attention),
                    linear_proj=adding_bias(linears.last("attention")),
                ),
            ),
            pre_mlp_layernorm=linears.own_norm,
            mlp=feed_forward(linears),
            sharded_state_dict_keys_map=linears.plain_names,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * vision.num_layers, layer_norm=None)


@dataclass(frozen=True)
class VisionKernels:
    """What the vision side's linear layers and attention are, and what that asks of a batch of tiles."""

    encoder: Linears = TORCH
    """Of every encoder layer."""
    projector: Any = torch.nn.Linear
    """Builder with the signature of torch's."""
    tile_multiple: int = 1
    """Tiles are computed in multiples of so many: products in FP8 want a multiple of rows, and a tile's 1025 are odd."""
    attention: TileKernel = "sdpa"
    """Of the encoder."""


class VisionTower(MegatronModule):
    """Pixels of tiles to image embeddings: InternViT, pixel shuffle, projector."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        device: torch.device,
        recompute_layers: bool = False,
        linears: VisionKernels = VisionKernels(),
        projector_fp8: TransformerConfig | None = None,
    ) -> None:
        """Build it.

        Args:
            model: sizes.
            config: Megatron Core's view of the encoder.
            groups: process groups of the vision side.
            device: of the parameters.
            recompute_layers: run every layer again for backward instead of keeping its activations.
            linears: what the linear layers are.
            projector_fp8: FP8 settings of the projector, for Transformer Engine; None = it is not in FP8.
        """
        super().__init__(config)
        # Of the parameters outside the encoder, for checkpoints: Megatron Core would take the language model's.
        self.tp_group = groups.tp
        vision, language = model.vision, model.language
        width, dtype = vision.hidden_size, config.params_dtype
        options = {"dtype": dtype, "device": device}
        self.vision = vision
        self.tile_multiple = linears.tile_multiple
        self.class_embedding = torch.nn.Parameter(torch.empty(1, 1, width, **options))
        self.patch_embedding = torch.nn.Conv2d(3, width, vision.patch_pixels, stride=vision.patch_pixels, **options)
        self.position_embedding = torch.nn.Parameter(torch.empty(1, 1 + vision.patches_per_side**2, width, **options))
        # No norm after the last block: the projector's LayerNorm takes its output as it is.
        block = _vision_block(vision, linears.encoder, linears.attention, recompute_layers)
        self.encoder = TransformerBlock(config, block, post_layer_norm=False, pg_collection=groups)
        shuffled = width * vision.shuffle_factor**2
        self.projector = Projector(
            shuffled, language.hidden_size, model.projector_norm_eps, options, linears.projector, projector_fp8
        )
        self.to(device)

    def forward(self, tiles: Tensor, residual_scale: Tensor | None = None) -> Tensor:
        """Encode tiles.

        Args:
            tiles: uint8 or normalised floating point [T, 3, pixels, pixels].
            residual_scale: drop-path factors fp32 [layers, 2, T], or None for none.

        Returns:
            Image embeddings [T, K, D] in the parameters' dtype, tokens of a tile row by row.
        """
        num_tiles = len(tiles)
        if num_tiles % self.tile_multiple:
            tiles, residual_scale = self._filled_up(tiles, residual_scale)
        # The class embedding stands for all of the encoder, unless adapters are all that is trained.
        trains = self.class_embedding.requires_grad or any(
            weight.requires_grad for weight in self.encoder.parameters()
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):  # a frozen encoder keeps no activations
            features = self._encode(tiles, residual_scale)
        embeddings = self.projector(pixel_shuffle(features, self.vision.shuffle_factor))
        return embeddings if len(embeddings) == num_tiles else embeddings[:num_tiles].clone()

    def _filled_up(self, tiles: Tensor, residual_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tiles and their drop-path factors up to a whole multiple: copies of the last one, which add no larger magnitude."""
        places = torch.arange(-(-len(tiles) // self.tile_multiple) * self.tile_multiple, device=tiles.device)
        places = places.clamp(max=len(tiles) - 1)
        return tiles[places], None if residual_scale is None else residual_scale[..., places]

    def _encode(self, tiles: Tensor, residual_scale: Tensor | None) -> Tensor:
        """Features [T, rows, columns, C] of the patches."""
        dtype = self.config.params_dtype
        pixels = normalize_pixels(tiles, dtype) if tiles.dtype == torch.uint8 else tiles.to(dtype)
        patches = self.patch_embedding(pixels)
        rows, columns = patches.shape[2:]
        hidden = patches.flatten(2).transpose(1, 2)
        hidden = torch.cat([self.class_embedding.expand(len(hidden), -1, -1), hidden], dim=1)
        hidden = hidden + interpolate_positions(self.position_embedding, rows, columns).to(hidden.dtype)
        hidden = self.encoder(
            hidden_states=hidden.transpose(0, 1).contiguous(),
            attention_mask=None,
            packed_seq_params=TileBatch(residual_scale=residual_scale),
        )
        return hidden[1:].transpose(0, 1).unflatten(1, (rows, columns))


class Projector(torch.nn.Module):
    """`mlp1` of InternVL: LayerNorm, linear, GELU (erf), linear."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        eps: float,
        options: dict[str, Any],
        linear: Any,
        fp8: TransformerConfig | None,
    ) -> None:
        """Build it; `linear` makes its linear layers, and `fp8` is what Transformer Engine is told around them."""
        super().__init__()
        self._fp8 = fp8
        self.norm = torch.nn.LayerNorm(in_size, eps=eps, **options)
        self.linear_1 = linear(in_size, out_size, **options)
        self.linear_2 = linear(out_size, out_size, **options)

    def forward(self, features: Tensor) -> Tensor:
        """[T, K, in_size] to [T, K, out_size]."""
        with contextlib.nullcontext() if self._fp8 is None else get_fp8_context(self._fp8):
            output = self.linear_2(F.gelu(self.linear_1(self.norm(features))))
        # A linear layer's output is a view of two dimensions; FSDP2 warns that its hooks on one are lost by changes in place.
        return make_viewless_tensor(output, requires_grad=output.requires_grad, keep_graph=True)


def normalize_pixels(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [T, 3, H, W] to ImageNet-normalised values."""
    mean, std = (_per_channel(values, tiles.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((tiles.float() / 255.0 - mean) / std).to(dtype)


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """fp32 [3, 1, 1]; numbers that are written on the device, where copying a tensor there would make the host wait."""
    return torch.cat([torch.full((1, 1, 1), value, device=device) for value in values])


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """InternVL's `ps_version` v2: neighbouring patches become one token, token-major.

    Args:
        features: [T, rows, columns, C].

    Returns:
        [T, rows * columns / factor^2, C * factor^2]; the token of cell (m, k) is the concatenation of the patches
        (m f, k f), (m f, k f + 1), .. (m f + f - 1, k f + f - 1).
    """
    tiles, rows, columns, width = features.shape
    cells = features.reshape(tiles, rows // factor, factor, columns // factor, factor, width)
    return cells.permute(0, 1, 3, 2, 4, 5).reshape(tiles, -1, factor * factor * width)
