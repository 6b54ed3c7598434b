"""What a rank does in a training step, seen operation by operation: bytes alive, FLOPs by part of the model, messages by group.

It looks at torch's dispatcher, so it sees the same of a real step and of one whose tensors have no memory (`fake_step.py`). FLOPs are
those of matrix products, convolutions and attention by torch's own formulas (`torch.utils.flop_counter`), what is computed a second time
included; causal attention counts in full, as if nothing were masked. What runs in other threads is not seen.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils.flop_counter import flop_registry

from internvl_megatron.model.build import Model
from internvl_megatron.parallel.groups import Groups, Peers
from internvl_megatron.parallel.vision_mesh import COPIES, SHARDS
from tools.tensor_bytes import Noting, TensorBytes, is_of_others, plain_tensors

aten = torch.ops.aten

FLOPS: dict[Any, Any] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""torch's formulas, and the same for operations that it has none for."""

MESSAGES = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "allgather_": ("all-gather", 1),
    "_allgather_base_": ("all-gather", 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_": ("all-to-all", 1),
    "alltoall_base_": ("all-to-all", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}
"""By torch's operation: the kind of message, and which argument has what this rank gives (of a receive: what it gets)."""

ELSEWHERE = "elsewhere"
"""What belongs to no part of the model: the optimizers, and what the step does around the modules."""
_KEY = "part of the model"


class Message(NamedTuple):
    """Messages of one kind in one group."""

    kind: str
    group: str
    """Its name in `parallel.groups`; `vision_mesh.shards` and `.copies` are a sharded encoder's."""
    num_ranks: int


class Traffic(NamedTuple):
    """What a rank gives to messages, those to itself included; of receives, what it gets."""

    num_messages: int
    num_bytes: int


class StepAccount:
    """Counts what this thread does in `counting` blocks."""

    def __init__(self, model: Model, groups: Groups, live: TensorBytes) -> None:
        """`live` counts the bytes."""
        self.live = live
        self.flops = Counter[str]()
        """By part of the model."""
        self.messages: dict[Message, Traffic] = {}
        self._model = model
        self._names = group_names(model, groups)
        self._parts: list[str] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what happens in the block."""
        hooks = [hook for module, part in _parts_of(self._model) for hook in self._watch(module, part)]
        try:
            with self.live.resizes(), _Counting(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def part(self) -> str:
        """The part of the model that runs now, forward or backward."""
        if self._parts:
            return self._parts[-1]
        node: Any = torch._C._current_autograd_node()
        return ELSEWHERE if node is None else node.metadata.get(_KEY, ELSEWHERE)

    def add_message(self, func: Any, args: Any) -> None:
        """Count an operation of torch.distributed."""
        name = func.overloadpacket.__name__
        assert name in MESSAGES, f"{name} is not known as a message"
        kind, given = MESSAGES[name]
        group = dist.ProcessGroup.unbox(args[_group_argument(func)])
        num_bytes = sum(tensor.nbytes for tensor in plain_tensors(args[given]))
        key = Message(kind, self._names.get(group.group_name, group.group_desc), group.size())
        before = self.messages.get(key, Traffic(0, 0))
        self.messages[key] = Traffic(before.num_messages + 1, before.num_bytes + num_bytes)

    def _watch(self, module: torch.nn.Module, part: str) -> Iterator[Any]:
        """Know when a module runs, and mark what autograd has noted of it: backward passes call no modules."""

        def begin(_module: Any, _args: Any) -> None:
            self._parts.append(part)

        def end(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self._parts.pop()
            _mark(output, (args, *kwargs.values()), part)

        yield module.register_forward_pre_hook(begin)
        # Also where it is left by an error: recomputing stops in the middle when all is there again.
        yield module.register_forward_hook(end, with_kwargs=True, always_call=True)


def group_names(model: Model, groups: Groups) -> dict[str, str]:
    """Names of this rank's groups by torch's; of several names of one group the shortest."""
    named = {dist.group.WORLD: "world"}
    found: list[tuple[str, Any]] = []
    for name, value in vars(groups).items():
        if isinstance(value, ProcessGroupCollection):
            found += [(f"{name}.{axis}", group) for axis, group in vars(value).items()]
        else:
            found.append((name, value.group if isinstance(value, Peers) else value))
    if model.vision_mesh is not None:
        names = model.vision_mesh.mesh_dim_names or ()
        found += [(f"vision_mesh.{dim}", model.vision_mesh.get_group(dim)) for dim in (COPIES, SHARDS) if dim in names]
    for name, value in sorted(found, key=lambda item: (len(item[0]), item[0])):
        for place, group in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(group, dist.ProcessGroup):
                named.setdefault(group, f"{name}[{place}]" if isinstance(value, list) else name)
    return {group.group_name: name for group, name in named.items() if group is not None}


def _parts_of(model: Model) -> Iterator[tuple[torch.nn.Module, str]]:
    """Modules that are told apart; of two that contain each other the inner one counts."""
    yield model.vision, "vision: patches"
    sides = [("vision", model.vision.encoder.layers)]
    sides += [("language", chunk.decoder.layers) for chunk in model.language]
    for side, layers in sides:
        for layer in layers:
            of_layer: Any = layer
            yield of_layer, f"{side}: layers"
            yield of_layer.self_attention.core_attention, f"{side}: attention"
    yield model.vision.projector, "projector"
    for chunk in model.language:
        if chunk.post_process:
            yield chunk.output_layer, "output layer"


def _mark(output: Any, inputs: Any, part: str) -> None:
    """Mark the nodes of autograd's graph between a module's inputs and its output, but for those that are marked already."""
    known = [tensor.grad_fn for tensor in plain_tensors(inputs)]  # kept here, or the same node is another object later
    reached = {id(node) for node in known}
    waiting = [tensor.grad_fn for tensor in plain_tensors(output)]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in reached:
            continue
        reached.add(id(node))
        known.append(node)
        metadata: Any = node.metadata
        metadata.setdefault(_KEY, part)
        waiting += [following for following, _ in node.next_functions]


@cache
def _group_argument(func: Any) -> int:
    """Which argument of an operation is the process group."""
    types = [str(argument.type) for argument in func._schema.arguments]
    return next(place for place, name in enumerate(types) if name.endswith("ProcessGroup"))


class _Counting(Noting):
    def __init__(self, account: StepAccount) -> None:
        super().__init__(account.live)
        self._account = account

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_of_others(types):
            return NotImplemented
        if func.namespace == "c10d":
            self._account.add_message(func, args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        formula = FLOPS.get(func.overloadpacket)
        if formula is not None:
            self._account.flops[self._account.part()] += formula(*args, **(kwargs or {}), out_val=result)
        return result
