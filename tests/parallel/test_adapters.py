"""Low-rank adapters: a layer, and training under layouts, against plain PyTorch; what is frozen costs nothing and stays."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from internvl_megatron.config.schema import LoraConfig, PartConfig, RunConfig
from internvl_megatron.device import open_device
from internvl_megatron.model.adapter import Adapter, SplitInputs, SplitOutputs, is_adapter
from internvl_megatron.model.build import build_model
from internvl_megatron.model.language import language_transformer_config
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.ranks import RankInfo, joined
from tests.support.comparison import expect_close, expect_same_training
from tests.support.layouts import ADAMW, LAYOUTS, SGD, Ranks, Scenario
from tests.support.lora_reference import random_adapters, train_lora_reference
from tests.support.models import small_model
from tests.support.training import Tensors, _train, make_step, merge, replica_rows
from tests.support.vision_shards import whole_vision

pytestmark = pytest.mark.parallel

LORA = LoraConfig(language_rank=4, vision_rank=3)
FROZEN = PartConfig(trainable=False)
SCENARIOS = {
    "all": Scenario(changes={"lora": LORA, "optimizer": SGD, "num_steps": 3}),
    "adapters_alone": Scenario(
        changes={
            "lora": replace(LORA, layers="attention", scale=0.5),
            "optimizer": replace(ADAMW, projector=FROZEN),
            "num_steps": 3,
        },
        parallel_changes={"language_recompute": "full", "vision_recompute": "layer"},
    ),
    "language_mlp": Scenario(
        changes={"lora": LoraConfig(language_rank=2, layers="mlp"), "optimizer": replace(ADAMW, vision=FROZEN)}
    ),
    "6b": Scenario(family="6b", changes={"lora": LORA, "optimizer": SGD, "num_steps": 2}),
    "sharded": Scenario(
        changes={"lora": LoraConfig(language_rank=2), "optimizer": replace(ADAMW, vision=FROZEN), "num_steps": 2},
        parallel_changes={"vision_sharding": "sharded"},
    ),
}
COLOCATED = "TP2 colocated"
RANKS = LAYOUTS | {COLOCATED: Ranks(2, tensor_size=2, vision_placement="colocated")}
"""The encoder has five heads: on two ranks six, the last of zeros."""
LAYOUTS_OF = {
    "all": ["1", "TP2", "TP2+SP", "DP2", "CP2", "PP2xVPP2", "TP2+SPxPP2", COLOCATED],
    "adapters_alone": ["1", "TP2+SP", "PP2"],
    "language_mlp": ["DP2"],
    "6b": ["TP2+SP", COLOCATED],
    "sharded": ["DP2"],
}
SLOW = {
    *(("all", layout) for layout in ("TP2", "TP2+SPxPP2", "CP2", "PP2xVPP2", COLOCATED)),
    ("adapters_alone", "PP2"),
}


@pytest.fixture(scope="module")
def start(weights: dict[str, Tensors]) -> Callable[[str], Tensors]:
    """Starting parameters of a scenario, adapters among them."""

    @cache
    def of(name: str) -> Tensors:
        scenario = SCENARIOS[name]
        return weights[scenario.family] | random_adapters(small_model(scenario.family), scenario.changes["lora"])

    return of


@pytest.fixture(scope="module")
def trained(run_ranks: Callable[..., list[Any]], start: Callable[[str], Tensors]) -> Callable[[str, str], list[Any]]:
    """(scenario, layout) to what every rank saw; all scenarios of a layout in one go."""

    @cache
    def train(layout: str) -> list[dict[str, Any]]:
        names = [name for name, layouts in LAYOUTS_OF.items() if layout in layouts]
        ranks = RANKS[layout]
        # Every scenario has its own starting parameters: they go by its name.
        scenarios = {name: SCENARIOS[name] for name in names}
        return run_ranks(_train_each, ranks.num_ranks, ranks, scenarios, {name: start(name) for name in names})

    return lambda scenario, layout: [results[scenario] for results in train(layout)]


def _train_each(info: RankInfo, ranks: Ranks, scenarios: dict[str, Scenario], starts: dict[str, Tensors]) -> Any:
    torch.set_num_threads(1)
    device = open_device("cpu")
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        return {
            name: _train(scenario, scenario.config(ranks), starts[name], groups, device)
            for name, scenario in scenarios.items()
        }


CASES = [
    pytest.param(name, layout, marks=[pytest.mark.slow] if (name, layout) in SLOW else [])
    for name, layouts in LAYOUTS_OF.items()
    for layout in layouts
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_training_equals_plain_pytorch(
    trained: Callable[[str, str], list[Any]], start: Callable[[str], Tensors], name: str, layout: str
) -> None:
    ranks, scenario = RANKS[layout], SCENARIOS[name]
    wanted = train_lora_reference(scenario, ranks, start(name))
    found = trained(name, layout)
    if layout == COLOCATED:
        vision = small_model(scenario.family).vision
        for tensors in ([rank.gradients for rank in found], [rank.parameters for rank in found]):
            whole = whole_vision(tensors, ranks.vision_layout, vision)
            for shards in tensors:
                shards |= whole
    expect_same_training(found, wanted, start(name), ranks.layout)
    after = merge([rank.parameters for rank in found], ranks.layout)
    trains_projector = scenario.changes["optimizer"].projector.trainable
    for parameter, before in start(name).items():
        is_trained = is_adapter(parameter) or (trains_projector and parameter.startswith("vision.projector."))
        same = after[parameter].tobytes() == before.tobytes()
        assert same != is_trained, f"{parameter}: what is frozen keeps its bytes, and nothing else does"


LAYERS = {
    "outputs": (SplitOutputs, ColumnParallelLinear, 24, 32, 1, {"gather_output": False}),
    "two stacked": (SplitOutputs, ColumnParallelLinear, 24, 64, 2, {"gather_output": False}),
    "inputs": (SplitInputs, RowParallelLinear, 32, 24, 1, {"input_is_parallel": True}),
}
TOKENS, RANK, SCALE = 6, 3, 1.5


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", ["1", "TP2", "TP2+SP"])
def test_a_layer_equals_plain_pytorch(run_ranks: Callable[..., list[Any]], layer: str, layout: str) -> None:
    """Output, and gradients of the input and of both matrices."""
    ranks = LAYOUTS[layout]
    _, _, inputs, outputs, _, _ = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (TOKENS, 1, inputs), "weight": (outputs, inputs), "bias": (outputs,), "lora_a": (RANK, inputs),
              "lora_b": (outputs, RANK), "gradient": (TOKENS, 1, outputs)}  # fmt: skip
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    leaves = {name: given[name].clone().requires_grad_() for name in ("x", "lora_a", "lora_b")}
    low = leaves["x"] @ leaves["lora_a"].t()
    output = F.linear(leaves["x"], given["weight"], given["bias"]) + SCALE * low @ leaves["lora_b"].t()
    output.backward(given["gradient"])
    wanted = {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    for found in run_ranks(_layer, ranks.num_ranks, ranks, layer, {n: value.numpy() for n, value in given.items()}):
        expect_close(found, {name: value.numpy() for name, value in wanted.items() if value is not None}, layer)


def _layer(info: RankInfo, ranks: Ranks, name: str, arrays: Tensors) -> Tensors:
    """Output and gradients of a layer, whole, gathered without the code under test."""
    given = {key: torch.from_numpy(value) for key, value in arrays.items()}
    side, linear, inputs, outputs, stacked, settings = LAYERS[name]
    device, config = open_device("cpu"), Scenario().config(ranks)
    by_outputs, sequence = linear is ColumnParallelLinear, ranks.sequence_parallel
    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60)
        size, rank, group = groups.language.tp.size(), groups.language.tp.rank(), groups.language.tp
        layer = Adapter(RANK, SCALE, "all").beside(linear, side, "mlp")(
            inputs,
            outputs,
            config=language_transformer_config(config, torch.float32, device.kernels(config), 4),
            init_method=None,
            bias=True,
            skip_bias_add=False,
            tp_group=group,
            **({"stride": stacked} if stacked > 1 else {}),
            **settings,
        )

        def split(tensor: Tensor, axis: int) -> Tensor:
            """This rank's part; of stacked matrices, its part of each."""
            halves = tensor.chunk(stacked, axis) if axis == 0 else [tensor]
            return torch.cat([half.chunk(size, axis)[rank] for half in halves], axis)

        def whole(tensor: Tensor, axis: int) -> Tensor:
            parts = [torch.empty_like(tensor) for _ in range(size)]
            torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
            halves = [part.chunk(stacked, axis) if axis == 0 else [part] for part in parts]
            return torch.cat([torch.cat(same, axis) for same in zip(*halves, strict=True)], axis)

        values = {
            "weight": split(given["weight"], 0 if by_outputs else 1),
            "bias": split(given["bias"], 0) if by_outputs else given["bias"],
            "lora_a": given["lora_a"] if by_outputs else split(given["lora_a"], 1),
            "lora_b": split(given["lora_b"], 0) if by_outputs else given["lora_b"],
        }
        for key, parameter in layer.named_parameters():
            parameter.data.copy_(values[key].view(parameter.shape))
            parameter.requires_grad_(is_adapter(key))
        x = given["x"] if by_outputs else split(given["x"], 2)
        gradient = torch.cat([g.chunk(size, 2)[rank] for g in given["gradient"].chunk(stacked, 2)], 2)
        if not by_outputs:
            gradient = given["gradient"]
        if sequence:
            x, gradient = (x.chunk(size)[rank], gradient) if by_outputs else (x, gradient.chunk(size)[rank])
        x = x.clone().requires_grad_()
        output, bias = layer(x)
        assert bias is None
        output.backward(gradient)
        assert layer.weight.grad is None, "what is frozen has no gradient"
        for matrix in (layer.lora_a, layer.lora_b):
            if matrix.sequence_parallel:  # what Megatron Core does at the end of a step
                torch.distributed.all_reduce(matrix.grad, group=group)
        grad_x, out = x.grad, output.detach()
        assert grad_x is not None
        a, b = layer.lora_a.grad, layer.lora_b.grad.flatten(0, -2)
        if by_outputs:
            out = torch.cat([whole(half, 2) for half in out.chunk(stacked, 2)], 2)
            grad_x = _along_sequence(grad_x, size, group) if sequence else grad_x
            return _arrays(output=out, x=grad_x, lora_a=a, lora_b=whole(b, 0))
        out = _along_sequence(out, size, group) if sequence else out
        return _arrays(output=out, x=whole(grad_x, 2), lora_a=whole(a, 1), lora_b=b)


def _arrays(**tensors: Tensor) -> Tensors:
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def _along_sequence(part: Tensor, size: int, group: Any) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def test_fresh_adapters_change_nothing_and_are_the_same_under_every_layout(
    run_ranks: Callable[..., list[Any]],
) -> None:
    config = SCENARIOS["all"].config(LAYOUTS["1"])
    (alone,) = run_ranks(_fresh, 1, LAYOUTS["1"], config)
    for layout in ("TP2", "PP2xVPP2"):
        ranks = LAYOUTS[layout]
        shards = run_ranks(_fresh, ranks.num_ranks, ranks, replace(config, parallel=ranks.config()))
        for name, value in merge(shards, ranks.layout).items():
            np.testing.assert_array_equal(value, alone[name], err_msg=name)
    assert len(alone) == 2 * 4 * (2 + 4), "two matrices beside each of four linear layers in 2 + 4 layers"
    for name, value in alone.items():
        if name.endswith("lora_b"):
            assert not value.any(), name
        else:  # uniform: mean 0, variance bound^2 / 3
            bound = value.shape[1] ** -0.5
            assert 0.9 * bound < np.abs(value).max() <= bound
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.2)
            assert abs(value.mean()) < 0.2 * bound
    same = {name: value.tobytes() for name, value in alone.items() if name.endswith("lora_a")}
    assert len({*same.values()}) == len(same), "every adapter has values of its own"


def _fresh(info: RankInfo, ranks: Ranks, config: RunConfig) -> Tensors:
    device = open_device("cpu")
    with joined(info, device, 60):
        model = build_model(
            config, make_groups(ranks.layout, device, 60, ranks.vision_layout), device, initialize=False
        )
        return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if is_adapter(n)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_of_training_is_that_of_what_is_trained(run_ranks: Callable[..., list[Any]], dtype: str) -> None:
    """Bytes of gradient buffers and optimizer state, before and after a step, of both sides."""
    scenario = SCENARIOS["adapters_alone"]
    scenario = replace(scenario, changes=scenario.changes | {"dtype": dtype})
    (found,) = run_ranks(_memory, 1, scenario)
    assert 0 < found["trained"] < 0.2 * found["all"]
    assert 4 * found["trained"] <= found["gradients"] < 4.1 * found["trained"], "buffers are padded a little"
    # Adam's two means, and in bf16 the fp32 weights.
    assert found["state"] == (8 if dtype == "fp32" else 12) * found["trained"]


def _memory(info: RankInfo, scenario: Scenario) -> dict[str, int]:
    ranks, device = LAYOUTS["1"], open_device("cpu")
    config = scenario.config(ranks)
    with joined(info, device, 60):
        step, model = make_step(config, None, make_groups(Layout(1, 1, 1), device, 60), device)
        step.run(replica_rows(scenario, config, 0, ranks.layout, 0), 0)  # pyright: ignore[reportArgumentType]
        wrapped: list[Any] = [step.vision.module, *step.language]
        buffers = [buffer for module in wrapped for buffer in module.buffers + module.expert_parallel_buffers]
        pieces = [b.grad_data.nbytes for b in buffers]
        parts = [p for side in step.optimizer.sides for p in getattr(side, "chained_optimizers", [side])]
        inner = [part.optimizer for part in parts]
        state = [t for optimizer in inner for s in optimizer.state.values() for t in s.values() if t.dim() > 0]
        own = [p for optimizer in inner for group in optimizer.param_groups for p in group["params"]]
        if config.dtype == "bf16":
            state += own
        frozen = [parameter for parameter in model.named_parameters() if not parameter[1].requires_grad]
        assert all(p.grad is None and not hasattr(p, "main_grad") for _, p in frozen), "frozen ones have no place"
        trained = sum(p.numel() for _, p in model.named_parameters() if p.requires_grad)
        everything = sum(p.numel() for _, p in model.named_parameters())
        return {
            "trained": trained,
            "all": everything,
            "gradients": sum(pieces),
            "state": sum(t.nbytes for t in state),
        }
