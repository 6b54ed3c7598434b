"""Build both sides of the model on this rank, and fill fresh parameters the same way under every layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from internvl_megatron.config.schema import OptimizerConfig, PartConfig, RunConfig
from internvl_megatron.device import Device, Kernels
from internvl_megatron.errors import CheckpointError
from internvl_megatron.model.adapter import adapter_rank, is_adapter
from internvl_megatron.model.fp8_history import AmaxHistories
from internvl_megatron.model.fp8_layers import language_linears, vision_kernels, with_histories
from internvl_megatron.model.fp8_settings import fp8_of_recipe
from internvl_megatron.model.initial import fresh_parameter
from internvl_megatron.model.language import LanguageModel, language_transformer_config
from internvl_megatron.model.layer_specs import plain_name
from internvl_megatron.model.padded_heads import real_size, with_zeros
from internvl_megatron.model.vision import VisionTower, vision_transformer_config
from internvl_megatron.model.vision_shards import local_shard, own_rows, shard
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import gather_integers
from internvl_megatron.parallel.vision_mesh import holders_of_copies, vision_mesh


@dataclass(frozen=True)
class Model:
    """What every rank holds: its stages and shard of the language model, and the vision tower, whole or its shards."""

    vision: VisionTower
    language: tuple[LanguageModel, ...]
    """One stage, or several chunks under the interleaved pipeline schedule, in the order rows pass them."""
    vision_mesh: DeviceMesh | None = None
    """Ranks the vision tower is sharded over (`parallel.vision_mesh`); None where every rank has all of it."""
    amax_histories: AmaxHistories | None = None
    """State of the language model's layers with delayed scaling, where it is emulated and this rank has such layers."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters by names that do not depend on the layout, nor on what layers are made of: layers are counted over all
        pipeline stages, norms are modules."""
        for name, parameter in self.vision.named_parameters():
            yield f"vision.{plain_name(name)}", parameter
        for chunk in self.language:
            first: Any = chunk.decoder.layers[0]
            offset = first.layer_number - 1
            for name, parameter in chunk.named_parameters():
                parts = name.split(".")
                if parts[:2] == ["decoder", "layers"]:
                    parts[2] = str(int(parts[2]) + offset)
                yield plain_name(".".join(["language", *parts])), parameter

    @property
    def has_adapters(self) -> bool:
        """Whether some part of it has low-rank adapters; the same on every rank."""
        return any(is_adapter(name) for name, _ in self.named_parameters())

    def tensor_group(self, name: str) -> torch.distributed.ProcessGroup:
        """The group a parameter is split over; the two sides of the model have their own."""
        side = self.vision.encoder if name.startswith("vision.") else self.language[0]
        return side.pg_collection.tp

    @torch.no_grad()
    def load_full(self, name: str, parameter: torch.nn.Parameter, full: Tensor) -> None:
        """Fill a parameter with this rank's part of a full tensor.

        Raises:
            CheckpointError: the tensor has another shape than the parameter over all ranks.
        """
        group = self.tensor_group(name)
        wanted = _full_shape(parameter, group.size())
        if tuple(full.shape) != wanted:
            raise CheckpointError(
                f"{name}: the weights have shape {tuple(full.shape)}, the model {wanted}. Choose the recipe of the "
                "checkpoint's size."
            )
        part = full[own_rows(parameter)] if isinstance(parameter, DTensor) else _part(name, full, parameter, group)
        local_shard(parameter).copy_(part.to(parameter.dtype))


def torch_dtype(name: str) -> torch.dtype:
    """'fp32' or 'bf16' as torch's dtype."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def build_model(config: RunConfig, groups: Groups, device: Device, initialize: bool = True) -> Model:
    """Create this rank's modules with freshly initialised parameters.

    Without `initialize` their values are undefined, but for adapters': for parameters that are about to be loaded, which is
    much faster.
    Collective over all ranks where the vision side is sharded.

    Raises:
        ConfigError: the run asks for kernels that are not there (`Device.kernels`).
    """
    kernels = device.kernels(config)
    # Sequence parallelism forks Megatron Core's random state around dropout, even at rate 0: it has to exist.
    model_parallel_cuda_manual_seed(config.seed, tp_rank=groups.language.tp.rank(), ep_rank=0, etp_rank=0)
    rows_per_replica = config.rows_per_step // groups.layout.data_size
    language_config = language_transformer_config(config, torch_dtype(config.dtype), kernels, rows_per_replica)
    vision, mesh = _vision(config, groups, device, kernels)
    language = tuple(
        LanguageModel(
            config.model.language,
            language_config,
            groups.language,
            kernels.attention,
            max_tokens=config.data.tokens_per_row,
            stages=language_linears(config, kernels),
            chunk=chunk,
            loss_chunk_tokens=config.kernels.loss_chunk_tokens,
        )
        for chunk in range(config.parallel.virtual_size)
    )
    histories = with_histories(language, config.fp8.history_steps, device)
    model = Model(vision=vision, vision_mesh=mesh, language=language, amax_histories=histories)
    for chunk in model.language:
        chunk.to(device.torch_device)  # torch's norms are made on the CPU; Megatron Core's layers are there already
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, config))
        if initialize or is_adapter(name):
            # From (seed, name) alone, so that all layouts start from the same weights.
            shape = _full_shape(parameter, model.tensor_group(name).size())
            model.load_full(name, parameter, fresh_parameter(name, shape, config.model, config.seed))
    return model


def _vision(
    config: RunConfig, groups: Groups, device: Device, kernels: Kernels
) -> tuple[VisionTower, DeviceMesh | None]:
    """The vision tower, whole; or this rank's shards of it, and the mesh they are spread over."""
    dtype, parallel, where = torch_dtype(config.dtype), config.parallel, device.torch_device
    by_layer, linears = parallel.vision_recompute == "layer", vision_kernels(config, kernels)
    if parallel.vision_sharding == "replicated":
        in_fp8 = kernels.fp8 == "transformer_engine"
        encoder_fp8, projector_fp8 = (
            fp8_of_recipe(recipe if in_fp8 else "none") for recipe in (config.fp8.vision, config.fp8.projector)
        )
        settings = vision_transformer_config(config.model, dtype, groups.vision.tp.size(), **encoder_fp8)
        projector = vision_transformer_config(config.model, dtype, **projector_fp8) if projector_fp8 else None
        return VisionTower(config.model, settings, groups.vision, where, by_layer, linears, projector), None
    # Megatron Core names the GPU in its layers, unless it is told to begin on the CPU; then it names nothing, and all
    # parameters are made without values: the whole tower never is on this rank.
    settings = vision_transformer_config(config.model, dtype, use_cpu_initialization=True)
    with torch.device("meta") as meta:
        tower = VisionTower(config.model, settings, groups.vision, meta, by_layer, linears)
    mesh = vision_mesh(groups, parallel.vision_shard_ranks, device, parallel.collective_timeout_seconds)
    shard(tower, mesh, dtype, where)
    return tower, mesh


def part_of(name: str, optimizer: OptimizerConfig) -> PartConfig:
    """How the part of the model is trained that a parameter belongs to."""
    if name.startswith("vision.projector."):
        return optimizer.projector
    return optimizer.vision if name.startswith("vision.") else optimizer.language


def is_trained(name: str, config: RunConfig) -> bool:
    """Whether a parameter is trained: its part is, and of a part with adapters they are alone."""
    has_adapters = adapter_rank(name, config.lora) is not None
    return part_of(name, config.optimizer).trainable and (is_adapter(name) or not has_adapters)


def check_copies_agree(model: Model, groups: Groups) -> None:
    """Compare checksums of every parameter's copies; collective over all ranks.

    Copies that differ at the start stay different: training goes on without a sign, and its result depends on which copy
    is saved.

    Raises:
        RuntimeError: copies differ; names the first parameter.
    """
    for side, group in (("vision", groups.host_world), ("language", groups.host_copies)):
        named = [(name, parameter) for name, parameter in model.named_parameters() if name.startswith(side)]
        sums = torch.stack([local_shard(parameter.detach()).double().sum() for _, parameter in named])
        place = model.tensor_group(named[0][0]).rank()
        gathered = np.stack(gather_integers(np.append(sums.cpu().numpy().view(np.int64), place), group))
        if side == "vision" and model.vision_mesh is not None:
            gathered = gathered[holders_of_copies(model.vision_mesh)]
        copies, places = gathered[:, :-1], gathered[:, -1]
        # Whole parameters have a copy on every rank of the group, split ones where the tensor-parallel place is the same.
        splits = [is_split(parameter) for _, parameter in named]
        first_at_place = [int(np.flatnonzero(places == other)[0]) for other in places]
        differing = np.flatnonzero((copies != np.where(splits, copies[first_at_place], copies[0])).any(axis=0))
        if len(differing):
            raise RuntimeError(
                f"{named[int(differing[0])][0]} and {len(differing) - 1} more parameters differ between ranks that "
                "should hold copies of them"
            )


def _full_shape(parameter: torch.nn.Parameter, tensor_size: int) -> tuple[int, ...]:
    """Shape of a parameter over all ranks it is split over, without padded heads."""
    shape = list(parameter.shape)
    if is_split(parameter) and tensor_size > 1:
        axis = _axis(parameter)
        shape[axis] = real_size(parameter) or shape[axis] * tensor_size
    return tuple(shape)


def _part(
    name: str, full: Tensor, parameter: torch.nn.Parameter, tensor_group: torch.distributed.ProcessGroup
) -> Tensor:
    """This rank's part of a full parameter.

    Megatron Core stacks gate and up projection in one matrix and splits each of the two over the ranks, so a rank's
    shard of `linear_fc1` is [its gate rows; its up rows] and not a contiguous block. In the vision encoder zeros follow
    where the heads do not divide over the ranks.
    """
    rank, size = tensor_group.rank(), tensor_group.size()
    if size == 1 or not is_split(parameter):
        return full
    axis = _axis(parameter)
    if real_size(parameter) is not None:
        full = with_zeros(full, axis, parameter.shape[axis] * size)
    if name.startswith("language.") and name.endswith("mlp.linear_fc1.weight"):
        return torch.cat([half.chunk(size, dim=axis)[rank] for half in full.chunk(2, dim=axis)], dim=axis)
    return full.chunk(size, dim=axis)[rank]


def is_split(parameter: torch.nn.Parameter) -> bool:
    """Whether tensor-parallel ranks hold different parts of it (or would, if there were several)."""
    return getattr(parameter, "tensor_model_parallel", False)


def _axis(parameter: torch.nn.Parameter) -> int:
    """The dimension Megatron Core says it has split."""
    return getattr(parameter, "partition_dim")  # noqa: B009 - torch's stubs do not know it
