"""Save and load the state of a run through Megatron Core's distributed checkpoints.

The two sides of the model live in different process groups, so each describes its shards with its own groups, and the
two optimizers' keys carry different prefixes. Optimizer state has two formats: any layout can continue from the layout-free one
(`fully_reshardable`); the fast one (`dp_reshardable`) is what each rank has, and belongs to a layout (`optimizer_layout.py`).

Of a model with adapters, what is trained is saved, and a note on where the rest is (`adapter_base`).
"""

import json
import types
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from internvl_megatron.checkpoint import adapter_base, folders, fp8_state, vision_state, weights
from internvl_megatron.checkpoint.adam_state import read_in_place
from internvl_megatron.checkpoint.adapter_base import Base
from internvl_megatron.checkpoint.intact import newest_intact
from internvl_megatron.checkpoint.metadata_guard import check_metadata, plain_data_only
from internvl_megatron.checkpoint.module_state import Part, load_parameters, parameters_only
from internvl_megatron.checkpoint.saver import SavedState, Saver
from internvl_megatron.checkpoint.weight_sums import frozen_sums
from internvl_megatron.config.schema import CheckpointConfig, ModelConfig
from internvl_megatron.data.json_object import parse_object
from internvl_megatron.errors import CheckpointError, DataError
from internvl_megatron.model.build import Model, torch_dtype
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.train.optimizer import JointOptimizer
from internvl_megatron.train.sharded_optimizer import ShardedOptimizer

MAX_REASON_CHARACTERS = 400
"""Of torch's messages, which list every missing tensor of every rank."""

# torch's CheckpointException derives from BaseException.
_LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, CheckpointingException, CheckpointException,
)  # fmt: skip


def state_to_save(
    info: folders.CheckpointInfo,
    model: Model,
    optimizer: JointOptimizer | None,
    groups: Groups,
    loader_state: dict[str, Any] | None,
    base: Base | None = None,
) -> SavedState:
    """Describe a checkpoint for `Saver.start`; collective where `info` says that optimizer state fits any layout.

    Args:
        info: what the marker says.
        model: this rank's modules; all parameters up to date.
        optimizer: both optimizers; None where `info` says that no optimizer state is saved.
        groups: process groups.
        loader_state: position of this replica's data streams, on its leader; None elsewhere.
        base: of a model with adapters, what they belong to.
    """
    assert (base is not None) == model.has_adapters, (
        "adapters are saved with a note on their base, and nothing else is"
    )
    state = _model_state(model, groups, _saved(model))
    _divide_among_copies(model, groups, state)
    own_prefixes: tuple[str, ...] = ()
    if info.optimizer_state:
        assert optimizer is not None, "the marker promises optimizer state, and there is no optimizer"
        state |= _optimizer_state(optimizer, state, info.optimizer_layout, is_loading=False)
        if info.optimizer_layout is None:
            sides = _sides(optimizer).items()
            own_prefixes = tuple(f"{name}." for name, side in sides if not isinstance(side, ShardedOptimizer))
    state["fp8"] = fp8_state.histories_state(model.amax_histories, groups)
    files = {}
    if loader_state is not None:
        files[f"loader/replica-{groups.layout.replica(groups.rank):05d}.json"] = json.dumps(loader_state).encode()
    if base is not None and groups.rank == 0:
        files[adapter_base.BASE_FILE] = adapter_base.base_bytes(base)
    return SavedState(info, state, files, own_prefixes)


def save(
    root: Path,
    info: folders.CheckpointInfo,
    model: Model,
    optimizer: JointOptimizer | None,
    groups: Groups,
    loader_state: dict[str, Any] | None,
    keep_last: int,
    base: Base | None = None,
) -> Path:
    """Write a checkpoint and wait for it; collective over all ranks. Arguments are those of `state_to_save`.

    Returns:
        The finished checkpoint's folder.

    Raises:
        CheckpointError: it could not be written.
    """
    saver = Saver(root, CheckpointConfig(keep_last=keep_last), groups)
    saver.start(state_to_save(info, model, optimizer, groups, loader_state, base))
    is_saved = saver.wait()
    saver.close()
    if not is_saved:
        raise CheckpointError(f"{root}: step {info.step} could not be saved; rank 0 has said why")
    return folders.path_of(root, info.step)


def load_weights(folder: Path, config: ModelConfig, model: Model, groups: Groups) -> Path:
    """Load the weights alone, from a run, one of its checkpoints or a weights folder, under any layout; collective.

    Adapters stay as they are, unless the folder has some: then what they belong to is loaded as well.

    Returns:
        The folder the weights are in: of a run, its newest checkpoint whose files are whole.

    Raises:
        CheckpointError: the folder is neither, or does not fit the model.
    """
    if weights.is_weights_folder(folder):
        weights.load_into(folder, model, config)
        return folder
    found: Path | None = folder
    if not (folder / folders.MARKER).is_file():
        found = newest_intact(folder / folders.CHECKPOINTS, groups, contents=False, sets_aside=False)
    if found is None:
        raise CheckpointError(weights.why_not(folder))
    folders.read_info(found)
    part: Part = "base" if model.has_adapters else "whole"
    if adapter_base.is_adapter_checkpoint(found):
        if not model.has_adapters:
            adapter_base.refuse_adapters(found)
        base, part = adapter_base.read_base(found), "trained"
        below = load_weights(adapter_base.base_folder(found, base), config, model, groups)
        sums = frozen_sums(model, groups, torch_dtype(base.dtype))
        adapter_base.check_sums(found, base.sums, sums, str(below))
    _apply_model(_load(found, _model_state(model, groups, part)), model, part)
    return found


def base_of(folder: Path, dtype: str, model: Model, groups: Groups) -> Base:
    """A note on the weights that have been loaded from a folder into a model with adapters, in a run's number format; collective."""
    return Base(str(folder.resolve()), dtype, frozen_sums(model, groups, torch_dtype(dtype)))


def load(
    folder: Path,
    model: Model,
    optimizer: JointOptimizer,
    groups: Groups,
    base: Base | None = None,
    own_layout: str | None = None,
) -> tuple[folders.CheckpointInfo, dict[str, Any]]:
    """Load weights and optimizer state, under any layout; collective.

    Args:
        folder: of the checkpoint.
        model: to be filled; one with adapters has the weights they belong to already.
        optimizer: to be filled.
        groups: process groups.
        base: of a model with adapters, what has been loaded into it.
        own_layout: this run's, as the fast format has it (`optimizer_layout.py`); None = layout-free state only.

    Returns:
        The marker, and the positions of all data streams by stream number.

    Raises:
        CheckpointError: the folder is no finished checkpoint, or does not fit the model or the layout.
    """
    info, part = folders.read_info(folder), _saved(model)
    if info.optimizer_layout not in (None, own_layout):
        raise CheckpointError(
            f"{folder}: its optimizer state is in the fast format and fits only the layout it was saved under "
            f"({info.optimizer_layout}); this run has {own_layout}. Make it layout-free: python -m "
            f"tools.convert_optimizer {folder.parent.parent}; or start from its weights alone (checkpoint.load={folder} in another folder)"
        )
    if base is not None:
        adapter_base.check_sums(folder, adapter_base.read_base(folder).sums, base.sums, base.path)
    state = _model_state(model, groups, part)
    state["fp8"] = fp8_state.histories_to_load(folder, model.amax_histories, groups)
    if info.optimizer_state:
        for side in _sides(optimizer).values():
            if not isinstance(side, ShardedOptimizer):
                _create_state(side)
        state |= _optimizer_state(optimizer, state, info.optimizer_layout, is_loading=True)
    loaded = _load(folder, state)
    _apply_model(loaded, model, part)
    fp8_state.apply_histories(model.amax_histories, loaded.get("fp8", {}))
    if info.optimizer_state:
        with torch.no_grad():
            for name, side in _sides(optimizer).items():
                try:
                    _apply_optimizer(side, loaded[name])
                except AssertionError as error:  # Megatron Core compares its buffers with the saved ones
                    raise CheckpointError(
                        f"{folder}: its optimizer state does not fit this layout: {error}"
                    ) from error
    else:
        optimizer.reload_parameters()
    return info, _loader_state(folder)


def _sides(optimizer: JointOptimizer) -> dict[str, MegatronOptimizer | ShardedOptimizer]:
    named = {"vision_optimizer": optimizer.vision, "language_optimizer": optimizer.language}
    return {name: side for name, side in named.items() if side is not None}


def _saved(model: Model) -> Part:
    """What of the model's parameters a checkpoint holds."""
    return "trained" if model.has_adapters else "whole"


def _model_state(model: Model, groups: Groups, part: Part = "whole") -> dict[str, Any]:
    return {
        "vision": vision_state.model_state(model, groups, part),
        # Chunks number their layers from 0 each, so they need places of their own; in the file layers are counted through.
        "language": {
            str(place): parameters_only(
                chunk.sharded_state_dict(prefix="language.", metadata={"dp_cp_group": groups.language.dp_cp}),
                part,
            )
            for place, chunk in enumerate(model.language)
        },
    }


def _optimizer_state(
    optimizer: JointOptimizer, model_state: dict[str, Any], own_layout: str | None, is_loading: bool
) -> dict[str, Any]:
    """Of both sides, in the layout-free format or (with a layout) the fast one."""
    kind = "fully_reshardable" if own_layout is None else "dp_reshardable"
    settings = {"distrib_optim_sharding_type": kind, "chained_optim_avoid_prefix": True}
    state = {}
    for name, side in _sides(optimizer).items():
        module = model_state[name.removesuffix("_optimizer")]
        if isinstance(side, ShardedOptimizer):
            state[name] = vision_state.optimizer_state(side, module, is_loading)
        else:
            with read_in_place(_inner_optimizers(side)):
                state[name] = side.sharded_state_dict(module, is_loading, metadata=settings)
        add_prefix_for_sharding(state[name], f"{name}.")
    return state


def _divide_among_copies(model: Model, groups: Groups, state: dict[str, Any]) -> None:
    """Let the ranks that have copies of the same parameters each write some of them.

    Every rank of such a group has the same entries in the same order, so all come to the same answer without asking.
    """
    sides = [(list(state["language"].values()), groups.language.dp_cp)]
    if model.vision_mesh is None:  # shards are divided already
        sides.append(([state["vision"]], groups.vision.dp_cp))
    for parts, copies in sides:
        entries = [
            entry
            for part in parts
            for entry in part.values()
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
        ]
        load = [0] * copies.size()
        sizes = [entry.data.numel() if entry.data is not None else 0 for entry in entries]
        for size, entry in sorted(zip(sizes, entries, strict=True), key=lambda pair: -pair[0]):
            owner = load.index(min(load))
            load[owner] += size
            *others, place = cast(tuple[int, ...], entry.replica_id)
            entry.replica_id = (*others, (place - owner) % copies.size())


def _load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    check_metadata(folder)
    try:
        with plain_data_only():
            loaded = dist_checkpointing.load(state, str(folder))
    except _LOAD_ERRORS as error:
        reason = str(error)[:MAX_REASON_CHARACTERS]
        raise CheckpointError(
            f"{folder}: cannot be loaded into this model ({reason}). The model's sizes must be those it was trained "
            "with; if they are, the checkpoint is damaged: use an older one."
        ) from error
    assert isinstance(loaded, dict), "without strict handling, Megatron Core returns the state alone"
    return loaded


def _apply_model(loaded: dict[str, Any], model: Model, part: Part) -> None:
    vision_state.apply_model_state(model, loaded["vision"], part)
    for place, chunk in enumerate(model.language):
        values = loaded["language"][str(place)]
        load_parameters(chunk, {key.removeprefix("language."): value for key, value in values.items()}, part)


def _apply_optimizer(optimizer: MegatronOptimizer | ShardedOptimizer, loaded: dict[str, Any]) -> None:
    if isinstance(optimizer, ShardedOptimizer):
        vision_state.apply_optimizer_state(optimizer, loaded)
        return
    with read_in_place(_inner_optimizers(optimizer)):
        # Of the parameter groups only the step count is taken over: their settings are this run's, and groups of a sharded vision
        # side have nothing else.
        step, own = vision_state.num_updates(loaded), cast(dict[str, Any], optimizer.state_dict())
        groups = [{**group, "step": type(group.get("step", 0))(step)} for group in own["optimizer"]["param_groups"]]
        optimizer.load_state_dict({**loaded, "optimizer": {**loaded["optimizer"], "param_groups": groups}})
    _own_step_counts(optimizer)


def _create_state(optimizer: MegatronOptimizer) -> None:
    """Allocate Adam's state, which torch does in the first step, and which must be there to be loaded into.

    With torch's AdamW (no Transformer Engine, no Apex) each parameter's state has a step count, which Megatron Core's
    formats keep elsewhere: its setter must leave it alone (one format has no such entry, the other an outdated one).
    """
    for part in _distributed_parts(optimizer):
        inner = part.optimizer
        fused: Any = inner
        for group in inner.param_groups:
            for parameter in group["params"]:
                if inner.state[parameter]:
                    continue
                if getattr(fused, "master_weights", False):  # Transformer Engine's, with moments in bf16
                    fused.initialize_state(parameter, fused.store_param_remainders)
                else:
                    inner.state[parameter] |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    if isinstance(inner, torch.optim.AdamW):
                        inner.state[parameter]["step"] = torch.zeros((), dtype=torch.float32)
        if isinstance(inner, torch.optim.AdamW):
            part._set_main_param_and_optimizer_states = types.MethodType(_set_states_but_step, part)


def _set_states_but_step(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    group, place = self.model_param_group_index_map[model_param]
    own = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
    type(self)._set_main_param_and_optimizer_states(self, model_param, {**tensors, "step": own.get("step")})


def _own_step_counts(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own step count: Megatron Core loads one tensor that all of them share, and AdamW would
    advance it once per parameter."""
    for part in _distributed_parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _distributed_parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """What Megatron Core's optimizers have their updates done by."""
    return [part.optimizer for part in _distributed_parts(optimizer)]


def _loader_state(folder: Path) -> dict[str, Any]:
    """Positions of all data streams, whichever replica they belonged to."""
    state: dict[str, Any] = {}
    for path in sorted((folder / "loader").glob("replica-*.json")):
        try:
            state |= parse_object(path.read_bytes(), str(path), "it")
        except (OSError, DataError) as error:
            raise CheckpointError(f"{error}; use an older checkpoint") from error
    return state
