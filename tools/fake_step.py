"""A training step of one rank of a fake world (`fake_world.py`): the trainer's own code, on tensors without memory.

Integers are real, so token ids, positions, pixels and the plans made of them are those of a real step. What other replicas say of
their rows is computed here from those rows; in all other messages the others give what this rank gives. The first step of a run differs
from the others (nothing is to be gathered yet, buffers are made), so that one runs before the one that is counted.
"""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from internvl_megatron.config.plan import cut_multiple, plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import open_device
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import gather_integers
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.saved_tensors import LayerKind
from tools.fake_world import META, BuiltBytes, FakeWorldDevice, held_bytes, tensors_that_stay, without_memory
from tools.modelled_layers import ModelledDevice, modelled
from tools.step_account import Message, StepAccount, Traffic
from tools.tensor_bytes import TensorBytes, is_of_others, plain_tensors

aten = torch.ops.aten
ELEMENTWISE = {"add", "sub", "mul", "div", "pow", "rsqrt", "gelu", "silu"}
IN_PLACE = {"add_", "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "lerp_", "copy_", "zero_", "fill_"}
"""Operations that are answered here: torch takes half a millisecond to find out the form of their results."""
RowsOf = Callable[[int, int], Any]
"""Rows of one step of a replica, as `Step.run` takes them, by replica and by a rank of it. Those of the first step are the same, or
what their `fewer()` gives, if they have that."""


@dataclass(frozen=True)
class StepFigures:
    """What one step of a rank takes and does."""

    held: BuiltBytes
    peak_bytes: int
    """At most in the step, beyond what stays from step to step: activations, buffers of messages, the gradients of a sharded
    encoder, pixels, what the host makes of rows."""
    flops: dict[str, int]
    """By part of the model."""
    messages: dict[Message, Traffic]
    num_rows: int
    """Micro-batches of this rank's replica."""


@dataclass(frozen=True)
class DryRun:
    """A step on a fake world, and what it took."""

    figures: StepFigures
    seconds: float
    """Of a core."""
    resident_bytes: int
    """Of the process, at most."""


def step_figures(step: Any, model: Any, groups: Groups, rows: Any, first_rows: Any | None = None) -> StepFigures:
    """Run two steps, and count the second; collective over all ranks, if these are real.

    Args:
        step: the trainer's.
        model: which it trains.
        groups: process groups.
        rows: of the step that is counted.
        first_rows: of the one before, whose only trace is that the run has begun; None = the same.
    """
    step.run(rows if first_rows is None else first_rows, 0)
    held = held_bytes(step, model)
    account = StepAccount(model, groups, TensorBytes(ignored=tensors_that_stay(step, model)))
    with account.counting():
        step.run(rows, 1)
    return StepFigures(held, account.live.peak, dict(account.flops), account.messages, len(rows.rows))


def dry_run(
    info: RankInfo,
    config: RunConfig,
    num_ranks: int,
    ranks: Sequence[int],
    rows_of: RowsOf,
    layers: LayerKind = "torch",
) -> list[DryRun]:
    """Body of a process that becomes ranks of a fake world, one after the other.

    Args:
        info: not looked at; there is one process.
        config: of a run with AdamW on a CPU.
        num_ranks: size of the world.
        ranks: which to be.
        rows_of: gives the rows of the step.
        layers: torch's as on a CPU, or modelled ones that keep what Transformer Engine's do (`modelled_layers.py`).
    """
    del info
    with modelled() if layers == "transformer_engine" else nullcontext():
        return [_dry_run(config, num_ranks, rank, rows_of, layers) for rank in ranks]


def _dry_run(config: RunConfig, num_ranks: int, rank: int, rows_of: RowsOf, layers: LayerKind) -> DryRun:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.train.step import Step

    began = time.process_time()
    torch.set_num_threads(1)
    made = plan(config, num_ranks)
    open_device("cpu")
    kind = FakeWorldDevice if layers == "torch" else ModelledDevice
    device = kind(kind="cpu", index=0, attention="sdpa")
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    groups = make_groups(made.layout, device, 60, made.vision_layout)
    layout = made.layout
    all_rows = [
        rows_of(replica, rank if replica == layout.replica(rank) else layout.replica_ranks(replica)[0])
        for replica in range(layout.data_size)
    ]
    first_rows = [rows.fewer() if hasattr(rows, "fewer") else rows for rows in all_rows]
    replica = layout.replica(rank)
    with without_memory(), without_values([all_rows, first_rows], groups, config):
        model = build_model(config, groups, device, initialize=False)
        step = Step(config, model, groups, device)
        figures = step_figures(step, model, groups, all_rows[replica], first_rows[replica])
    dist.destroy_process_group()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return DryRun(figures, time.process_time() - began, peak)


@contextmanager
def without_values(steps: Sequence[Sequence[Any]], groups: Groups, config: RunConfig) -> Iterator[None]:
    """In the block, tensors without memory go together with real ones, and every message is answered.

    Args:
        steps: rows that are trained on, of all replicas.
        groups: process groups of a fake world.
        config: of the run.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    from internvl_megatron.train import agreement

    of_steps = [_messages_of_replicas(all_rows, groups.layout, config) for all_rows in steps]
    replica = groups.layout.replica(groups.rank)

    def gather(values: np.ndarray, group: dist.ProcessGroup) -> list[np.ndarray]:
        assert group is groups.host_data, "what is gathered here is what replicas say of their rows"
        found = next(messages for messages in of_steps if np.array_equal(messages[replica], values))
        longest = max(len(message) for message in found)
        gather_integers(np.zeros(longest, dtype=np.int64), group)  # the messages themselves
        return found

    def begin_all(operations: list[dist.P2POp]) -> list[Any]:
        return [one.op(one.tensor, group=one.group, tag=one.tag, **_peer(one)) for one in operations]

    with (
        patch.object(agreement, "gather_integers", gather),
        # torch asks a group for its backend for the device, of which there is none.
        patch.object(dist, "batch_isend_irecv", begin_all),
        patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda self: None),
        patch("torch.optim.adam._device_dtype_check_for_fused", lambda *_args, **_kwargs: None),
        _WithoutValues(),
    ):
        yield


def _messages_of_replicas(all_rows: Sequence[Any], layout: Layout, config: RunConfig) -> list[np.ndarray]:
    """What replicas tell each other of their rows of a step."""
    from internvl_megatron.train.agreement import replica_message

    multiple = cut_multiple(config, layout)
    trained_on = [rows.rows if multiple is None else [row.cut(multiple) for row in rows.rows] for rows in all_rows]
    return [
        replica_message(rows, batch, replica, layout, config)
        for replica, (rows, batch) in enumerate(zip(trained_on, all_rows, strict=True))
    ]


def _peer(operation: dist.P2POp) -> dict[str, int]:
    return {"group_dst" if operation.op is dist.isend else "group_src": operation.group_peer}


class _WithoutValues(TorchDispatchMode):
    """Operations with a tensor that has no memory give tensors that have none; other ranks answer at once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_of_others(types):
            return NotImplemented
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return _answer(func, args)
        tensors = list(plain_tensors(args, *kwargs.values()))
        if not any(tensor.is_meta for tensor in tensors):
            if func is aten._to_copy.default and _makes_floats(args[0], kwargs.get("dtype")):
                return torch.empty_like(args[0], dtype=kwargs["dtype"], device=META)
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        found = _answered_here(name, args, kwargs)
        if found is not None:
            return found
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": META}
        if not all(tensor.is_meta for tensor in tensors):
            if name.endswith("_") and not name.startswith("_") and not args[0].is_meta:
                return args[0]  # a real tensor stays as it is
            args, kwargs = tree_map_only(torch.Tensor, _without_memory, (args, kwargs))
        return func(*args, **kwargs)


def _answered_here(name: str, args: Any, kwargs: Any) -> Any:
    """Results of operations that torch has no answer for on the meta device, another one, or a slow one; None = ask torch."""
    if name == "index_put_" or (name in IN_PLACE and args[0].is_meta):
        return args[0]  # where `index_put_` writes may be a mask, whose number of places is a value
    if name == "index_put":
        return torch.empty_like(args[0])
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return _attention_on_cpu(args[0])
    return _elementwise(*args[:2]) if name in ELEMENTWISE and "out" not in kwargs else None


def _makes_floats(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether integers become as many floating-point numbers, of which only the sizes matter."""
    return dtype is not None and dtype.is_floating_point and not tensor.is_floating_point() and tensor.numel() > 1


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor on the meta device. Single numbers stay: operations take them from the host, by other rules for types."""
    if tensor.is_meta or tensor.dim() == 0:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _elementwise(first: Any, second: Any = None) -> torch.Tensor | None:
    """The result of an elementwise operation; None where its form is not that of the larger operand, and torch is asked."""
    operands = [one for one in (first, second) if isinstance(one, torch.Tensor)]
    largest = max(operands, key=torch.Tensor.numel)
    for one in operands:
        if not (one.is_meta and one.is_floating_point()):
            return None
        if one.shape == largest.shape:
            fits = one.stride() == largest.stride()
        else:
            sizes = zip(one.shape[::-1], largest.shape[::-1], strict=False)
            fits = one.dim() <= largest.dim() and all(size in (1, wanted) for size, wanted in sizes)
            fits = fits and one.is_contiguous()
        if not fits:
            return None
    dtype = largest.dtype if second is None else torch.result_type(first, second)
    return torch.empty_like(largest, dtype=dtype)


def _attention_on_cpu(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Results in the order in memory that the kernel gives them; torch's own for the meta device have the query's."""
    batch, heads, tokens, size = query.shape
    attended = query.new_empty(batch, tokens, heads, size).transpose(1, 2)
    sums = query.new_empty(batch, tokens, heads, dtype=torch.promote_types(query.dtype, torch.float32))
    return attended, sums.transpose(1, 2)


def _answer(func: Any, args: Any) -> Any:
    """What an operation of torch.distributed gives back; the other ranks have the same numbers as this one."""
    if func.overloadpacket.__name__ == "_allgather_base_" and not args[0].is_meta:
        args[0].view(-1, args[1].numel()).copy_(args[1].view(1, -1))
    results = [args[0] if "Work" not in str(one.type) else FakeWork().boxed() for one in func._schema.returns]
    return results[0] if len(results) == 1 else tuple(results)
