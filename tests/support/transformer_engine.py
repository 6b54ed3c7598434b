"""Transformer Engine's modules without a GPU: made on the CPU, their kernels replaced by plain arithmetic.

The body of a process of its own (`python -m tests.support.transformer_engine FILE`), for it changes torch and Transformer Engine for
the whole process. Every call of a replaced kernel is bound to the signature of the installed package's, so that one it does not
know fails. Writes what it saw to a file, as JSON.
"""

# Torch first: Transformer Engine's libraries ask for those it loads.
import torch  # isort: skip

import inspect
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist
import torch.nn.functional as F
import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from internvl_megatron import cpu_shim
from internvl_megatron.config.schema import Fp8Config, ParallelConfig, RunConfig
from internvl_megatron.device import Device, Kernels, LayerKernel
from tests.support.layouts import run_config
from tests.support.models import small_model
from tests.support.rows import random_step
from tools.fake_world import FakeWorldDevice

FAMILIES = ("300m", "6b")
KINDS: tuple[LayerKernel, ...] = ("transformer_engine", "torch")
calls: list[tuple[torch.nn.Module, str | None]] = []
"""Linear layers that ran, in order, and the FP8 recipe they ran in."""


class AsAsked(Device):
    """A CPU that has whatever kernels a run asks for by name, and is a GPU to Transformer Engine."""

    def kernels(self, config: RunConfig) -> Kernels:
        layers: LayerKernel = "torch" if config.kernels.layers == "torch" else "transformer_engine"
        return Kernels(layers, layers, "sdpa", "sdpa", "transformer_engine", fuse_swiglu=False, fuse_rotary=False)


class OfFakeWorld(AsAsked, FakeWorldDevice):
    """The same, and its messages go nowhere."""


CPU = AsAsked(kind="cpu", index=0, attention="sdpa")
FAKE = OfFakeWorld(kind="cpu", index=0, attention="sdpa")


def replace_kernels() -> None:
    """Give the modules that this project uses a forward pass that runs on the CPU."""
    from transformer_engine.pytorch import quantization  # pyright: ignore[reportMissingImports]

    state = quantization.FP8GlobalStateManager
    cpu_shim.install()
    torch.cuda.is_available = lambda: True  # what its constructors ask
    for name in ("is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available"):
        setattr(state, name, classmethod(lambda _: (True, "")))
    quantization.check_recipe_support = lambda _: None

    def note(module: torch.nn.Module) -> None:
        recipe = state.get_fp8_recipe() if state.is_fp8_enabled() else None
        calls.append((module, None if recipe is None else type(recipe).__name__))

    def linear(module: Any, inp: Tensor, **_: Any) -> Any:
        note(module)
        output = F.linear(inp, module.weight, module.bias if module.apply_bias else None)
        return (output, module.bias) if module.return_bias else output

    def norm(module: Any, inp: Tensor, kind: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert not module.zero_centered_gamma, "weights of norms are factors, not what they differ from 1"
        if kind == "RMSNorm":
            return F.rms_norm(inp, weight.shape, weight, module.eps)
        return F.layer_norm(inp, weight.shape, weight, bias, module.eps)

    def norm_and_linear(module: Any, inp: Tensor, **_: Any) -> Any:
        return linear(
            module, norm(module, inp, module.normalization, module.layer_norm_weight, module.layer_norm_bias)
        )

    _replace(te.Linear, linear)
    _replace(te.LayerNormLinear, norm_and_linear)
    _replace(te.RMSNorm, lambda module, input_: norm(module, input_, "RMSNorm", module.weight, None))


def _replace(kind: Any, body: Callable[..., Any]) -> None:
    signature = inspect.signature(kind.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        signature.bind(self, *args, **kwargs)
        return body(self, *args, **kwargs)

    kind.forward = forward


@contextmanager
def world(size: int = 1, rank: int = 0) -> Iterator[None]:
    """A world of one; or a rank of a larger one, whose messages go nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        if size == 1:
            dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder}/store")
        else:
            dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        yield
        dist.destroy_process_group()


def built(config: RunConfig, layers: LayerKernel, groups: Any) -> Any:
    """The model with these layers."""
    from internvl_megatron.model.build import build_model

    return build_model(replace(config, kernels=replace(config.kernels, layers=layers)), groups, CPU)


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names that only one of them has, or that differ by more than 1e-5 of their norm."""
    found = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        one, other = ours[name].float(), theirs[name].float()
        if one.shape != other.shape or (one - other).norm() > 1e-5 * other.norm() + 1e-7:
            found.append(f"{name}: {one.shape} {(one - other).norm() if one.shape == other.shape else other.shape}")
    return found


def tensors_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def small_config(family: str, **changes: Any) -> RunConfig:
    return run_config(small_model(family), **changes)


def one_rank(family: str) -> dict[str, Any]:
    """Both kinds of layers on one rank: fresh values, logits, gradients, and checkpoints of one loaded into the other."""
    from internvl_megatron.checkpoint import save_load
    from internvl_megatron.checkpoint.folders import CheckpointInfo
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.train.optimizer import distributed
    from tests.support.forward import row_output

    config = small_config(family)
    data = random_step(config.model, num_rows=1, seed=0)
    seen: dict[str, Any] = {}
    with world(), tempfile.TemporaryDirectory() as folder:
        groups = make_groups(Layout(1, 1, 1), CPU, 60)
        models = {kernel: built(config, kernel, groups) for kernel in KINDS}
        fused, plain = models["transformer_engine"], models["torch"]
        seen["fresh values"] = differences(tensors_of(fused), tensors_of(plain))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in plain.named_parameters():  # nothing hides behind ones and zeros
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            dict(fused.named_parameters())[name].data.copy_(parameter)
        gradients = {}
        for kernel, model in models.items():
            calls.clear()
            output = row_output(model, config, CPU, data, 0)[:, : config.model.language.vocab_size]
            output.square().mean().backward()
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            gradients[kernel] = {"logits": output.detach(), **found}
            seen[f"calls of {kernel}"] = len(calls)
        seen["logits and gradients"] = differences(gradients["transformer_engine"], gradients["torch"])
        info = CheckpointInfo(1, 0, 0, "", optimizer_state=False)
        for source, target in itertools.permutations(KINDS):
            root = Path(folder) / source
            root.mkdir()
            save_load.save(root, info, models[source], None, groups, None, keep_last=1)
            other = built(replace(config, seed=7), target, groups)
            save_load.load_weights(root / "step-00000001", config.model, other, groups)
            seen[f"{source} to {target}"] = differences(tensors_of(other), tensors_of(plain))
        for wanted in (True, False):
            kernels = replace(config.kernels, fuse_gradient_accumulation=wanted)
            wrapped = distributed(fused.language[0], groups.language, replace(config, kernels=kernels))
            fuse = {m.fuse_wgrad_accumulation for m in wrapped.modules() if hasattr(m, "fuse_wgrad_accumulation")}
            seen[f"gradient accumulation {wanted}"] = list(fuse)
    return seen


def split_over_two(family: str, rank: int) -> list[str]:
    """What differs between both kinds of layers, as a rank of two tensor-parallel ones of both sides of the model, with sequence
    parallelism: values, shapes, marks on parameters, and what goes into a checkpoint."""
    from internvl_megatron.checkpoint.save_load import _model_state
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout, VisionLayout

    parallel = ParallelConfig(tensor_size=2, vision_tensor_size=2, sequence_parallel=True)
    config = small_config(family, parallel=parallel)
    layout = Layout(2, 1, 1)
    with world(2, rank):
        groups = make_groups(layout, FAKE, 60, VisionLayout(layout, 2, 1))
        models = {kernel: built(config, kernel, groups) for kernel in KINDS}
        found = differences(*(tensors_of(model) for model in models.values()))
        marks, entries = [], []
        for model in models.values():
            marks.append({name: _marks(parameter) for name, parameter in model.named_parameters()})
            entries.append(dict(_entries(_model_state(model, groups))))
        for one, other in (marks, entries):
            found += [
                f"{name}: {one.get(name)} {other.get(name)}"
                for name in sorted(one.keys() | other.keys())
                if one.get(name) != other.get(name)
            ]
    return found


def _marks(parameter: Tensor) -> tuple[Any, ...]:
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return (
        is_split,
        getattr(parameter, "partition_dim", None) if is_split else None,
        getattr(parameter, "sequence_parallel", False),
        getattr(parameter, "real_size", None),
        parameter.requires_grad,
        str(parameter.device),
    )


def _entries(state: Any) -> Iterator[tuple[str, str]]:
    from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor

    for value in state.values():
        if isinstance(value, ShardedTensor):
            shard = (value.global_shape, value.global_offset, value.local_shape, value.replica_id)
            yield f"{value.key} {value.global_offset}", str(shard)
        elif isinstance(value, ShardedBase):
            yield f"{value.key} {type(value).__name__}", str(value.replica_id)
        else:
            yield from _entries(value)


def fp8(config: Fp8Config, **changes: Any) -> list[list[str | None]]:
    """[layer, recipe it ran in] of every linear layer of Transformer Engine, in a forward and a backward pass."""
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from tests.support.forward import row_output

    run = small_config("300m", fp8=config, **changes)
    with world():
        model = built(run, "transformer_engine", make_groups(Layout(1, 1, 1), CPU, 60))
        names = {module: f"vision.{name}" for name, module in model.vision.named_modules()}
        names |= {module: f"language.{name}" for name, module in model.language[0].named_modules()}
        calls.clear()
        row_output(model, run, CPU, random_step(run.model, num_rows=1, seed=0), 0).square().mean().backward()
        return [[names[module], recipe] for module, recipe in calls]


def attention() -> dict[str, Any]:
    """Packed attention in bf16 by Transformer Engine's interface, against one call per segment; and what a ring is told."""
    from megatron.core.transformer.enums import AttnMaskType
    from transformer_engine.pytorch.attention.dot_product_attention.context_parallel import (  # pyright: ignore[reportMissingImports]
        get_batch_on_this_cp_rank,
    )

    from internvl_megatron.model.attention import PackedAttention, PackedRow
    from internvl_megatron.parallel.layout import Layout

    told: dict[str, Any] = {}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        told.update(options, ring=module.cp_group, kind=module.cp_comm_type, ranks=module.cp_global_ranks)
        assert options["qkv_format"] == "thd", "rows are packed"
        assert options["attn_mask_type"] == "padding_causal", "tokens see what is before them in their segment"
        assert query.shape[1] == module.num_attention_heads, "the heads that it was made for"
        assert key.shape[1] == module.num_gqa_groups, "the heads of keys that it was made for"
        if module.cp_group is not None:
            return query.flatten(1)
        outputs = []
        for first, end in itertools.pairwise(options["cu_seqlens_q"].tolist()):
            q, k, v = (t[first:end].transpose(0, 1)[None] for t in (query, key, value))
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)

    _replace(te.DotProductAttention, attend)
    config = SimpleNamespace(num_attention_heads=4, num_query_groups=2, kv_channels=16, apply_rope_fusion=False)
    ends = (0, 8, 12, 32)
    row = PackedRow(cu_seqlens_q=torch.tensor(ends, dtype=torch.int32), segment_ends=ends, num_padding_tokens=20)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(32, 1, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2)]
    seen: dict[str, Any] = {}
    with world(2, 1):
        alone, ring = dist.new_group([1], use_local_synchronization=True), dist.group.WORLD
        groups: Any = SimpleNamespace(hcp=[alone, alone], tp=alone)
        outputs = [
            PackedAttention(config, 1, AttnMaskType.causal, "self", kernel=kernel, pg_collection=groups)(  # pyright: ignore[reportArgumentType]
                *inputs, None, packed_seq_params=row
            )[:12]
            for kernel in ("transformer_engine", "sdpa")
        ]
        seen["difference"] = float((outputs[0] - outputs[1]).norm() / outputs[1].norm())
        groups = SimpleNamespace(hcp=[alone, ring], tp=alone)
        halves = [tensor[:16] for tensor in inputs]
        PackedAttention(config, 1, AttnMaskType.causal, "self", kernel="transformer_engine", pg_collection=groups)(  # pyright: ignore[reportArgumentType]
            *halves, None, packed_seq_params=row
        )
        seen["ring"] = {
            "is the ring": told["ring"] is ring,
            "kind": told["kind"],
            "ranks": told["ranks"],
            "ends": told["cu_seqlens_q"].tolist(),
            "padded": [told[f"cu_seqlens_{which}_padded"].tolist() for which in ("q", "kv")],
            "longest": [told["max_seqlen_q"], told["max_seqlen_kv"]],
        }
        tokens = torch.arange(32)
        theirs, _, _ = get_batch_on_this_cp_rank(row.cu_seqlens_q, tokens, tokens, tokens, cp_group=ring)
        layout = Layout(1, 1, 1, context_size=2, ring_size=2)
        order = layout.ring_order(np.diff(ends))
        own = np.flatnonzero(order // 16 == 1)
        seen["order"] = [theirs.tolist(), own[np.argsort(order[own])].tolist()]
    return seen


def main() -> None:
    """Everything."""
    replace_kernels()
    current = Fp8Config(language="current", first_bf16_layers=1, vision="blockwise", projector="mxfp8")
    again = ParallelConfig(vision_recompute="layer")
    seen = {
        **{f"one rank {family}": one_rank(family) for family in FAMILIES},
        **{f"rank {rank} of two {family}": split_over_two(family, rank) for family in FAMILIES for rank in (0, 1)},
        "fp8": fp8(current),
        "fp8, layers again": fp8(current, parallel=again),
        "fp8 delayed": fp8(Fp8Config(language="delayed")),
        "attention": attention(),
    }
    Path(sys.argv[1]).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
