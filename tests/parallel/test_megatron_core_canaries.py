"""What the package takes for granted of Megatron Core without a promise of its authors.

A failure here after an upgrade says which assumption broke and what it carries.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import Device
from internvl_megatron.ranks import RankInfo
from tests.support.layouts import LAYOUTS, Ranks, Scenario, run_config
from tests.support.models import small_model
from tests.support.rows import StepData, random_step

pytestmark = pytest.mark.parallel

Run = Callable[..., list[Any]]


def expect_arguments(function: Callable[..., Any], names: set[str], what_breaks: str) -> None:
    missing = names - inspect.signature(function).parameters.keys()
    assert not missing, f"{function.__qualname__} has no argument {sorted(missing)} any more: {what_breaks}"


def test_version() -> None:
    assert version("megatron-core").startswith("0.19."), "written against 0.19; read the other canaries first"


def test_gpt_model_takes_embeddings_packing_and_an_output_processor() -> None:
    from megatron.core.models.gpt import GPTModel

    expect_arguments(
        GPTModel.forward,
        {"decoder_input", "packed_seq_params", "output_processor"},
        "LanguageModel.forward puts image embeddings in, packs rows and masks the padded vocabulary through them",
    )
    expect_arguments(
        GPTModel.__init__,
        {"position_embedding_type", "pg_collection"},
        "LanguageModel brings its own rotary and groups",
    )


def test_schedules_take_groups_and_a_communicator() -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for stages in (1, 2):
        schedule = get_forward_backward_func(pp_size=stages, vp_size=None)
        expect_arguments(
            schedule, {"p2p_communicator", "pg_collection"}, "Step runs the language model in its own groups"
        )


def test_gradients_are_finished_without_token_counts_in_given_groups() -> None:
    from megatron.core.distributed import finalize_model_grads

    expect_arguments(finalize_model_grads, {"num_tokens", "pg_collection"}, "each side is reduced in its own groups")
    default = inspect.signature(finalize_model_grads).parameters["num_tokens"].default
    assert default is None, "None means 'do not divide': Step has divided by the global weight already"


def test_optimizer_parts_that_are_joined_exist() -> None:
    from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for name in ("get_grads_for_grad_norm", "get_grad_stats_parallel_group"):
        assert callable(getattr(MegatronOptimizer, name, None)), f"{name}: JointOptimizer computes the norm of a side"
    assert "chained_optimizers" in inspect.getsource(ChainedOptimizer.__init__), "a side may have several optimizers"
    for name in ("prepare_grads", "get_parameters", "step_with_ready_grads"):
        assert callable(getattr(MegatronOptimizer, name, None)), (
            f"{name}: JointOptimizer clips two optimizers by one norm"
        )
    names = list(inspect.signature(clip_grad_by_total_norm_fp32).parameters)
    assert names[:3] == ["parameters", "max_norm", "total_norm"], "JointOptimizer passes these by place"


def test_cross_entropy_takes_its_group() -> None:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    expect_arguments(
        vocab_parallel_cross_entropy, {"tp_group"}, "the loss is computed in the language model's own group"
    )


def on_one_rank(info: RankInfo, config: RunConfig, body: Callable[..., Any], *args: Any) -> Any:
    from tests.support.forward import on_one_rank as run

    return run(info, config, None, body, *args)


def seen_by_core_attention(model: Any, config: RunConfig, device: Device, data: StepData) -> dict[str, Any]:
    """What reaches the core attention and the branches of both sides in a forward pass of one row."""
    from internvl_megatron.model.attention import PackedAttention, PackedRow, TileAttention
    from internvl_megatron.model.vision import InternViTLayer, TileBatch
    from tests.support.forward import row_output

    seen: dict[str, Any] = {"packed": [], "tiles": [], "shapes": [], "branches": 0, "ropes": 0}

    def note(name: str, wanted: type) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
            seen[name].append(isinstance(named.get("packed_seq_params"), wanted))
            seen["shapes"].append((name, tuple(inputs[0].shape)))

        return hook

    for module in [*model.language[0].modules(), *model.vision.modules()]:
        if isinstance(module, PackedAttention):
            module.register_forward_pre_hook(note("packed", PackedRow), with_kwargs=True)
        if isinstance(module, TileAttention):
            module.register_forward_pre_hook(note("tiles", TileBatch), with_kwargs=True)
        if isinstance(module, InternViTLayer):
            setattr(module, "self_attn_bda", counting(module.self_attn_bda, seen))
            setattr(module, "mlp_bda", counting(module.mlp_bda, seen))
    import megatron.core.transformer.attention as core_attention

    plain = core_attention.apply_rotary_pos_emb
    core_attention.apply_rotary_pos_emb = lambda *_a, **_k: seen.update(ropes=seen["ropes"] + 1)
    with torch.no_grad():
        row_output(model, config, device, data, 0)
    core_attention.apply_rotary_pos_emb = plain
    seen["qkv_bias"] = model.vision.encoder.layers[0].self_attention.linear_qkv.bias is not None
    seen["final_norm"] = model.vision.encoder.final_layernorm is not None
    return seen


def counting(slot: Callable[..., Any], seen: dict[str, Any]) -> Callable[..., Any]:
    def call(training: bool, fused: bool) -> Any:
        seen["branches"] += 1
        return slot(training, fused)

    return call


@pytest.mark.parametrize("family", ["300m", "6b"])
def test_slots_of_a_layer(run_ranks: Run, family: str) -> None:
    model = small_model(family)
    data = random_step(model, 1, seed=0)
    (seen,) = run_ranks(on_one_rank, 1, run_config(model), seen_by_core_attention, data)
    assert seen["packed"] == [True] * 4, (
        "a subclass of PackedSeqParams no longer reaches the core attention: segments, rotary"
    )
    assert seen["tiles"] == [True] * 2, "a subclass of PackedSeqParams no longer reaches the vision layers: drop path"
    per_tile = 1 + model.vision.patches_per_side**2
    num_tiles = len(data.rows[0].tile_starts)
    assert ("packed", (64, 1, 4, 16)) in seen["shapes"], "queries of a row no longer are [tokens, 1, heads, head size]"
    assert ("tiles", (per_tile, num_tiles, 5, 8)) in seen["shapes"], (
        "queries of tiles no longer are [tokens, tiles, heads, ..]"
    )
    assert seen["branches"] == 4, "the bias-dropout-add slots are not called once per branch: LayerScale, residual"
    assert seen["ropes"] == 0, "Megatron Core rotates queries and keys itself: the rotary embedding would apply twice"
    assert seen["qkv_bias"] == (family == "300m"), "the builder that forces 'no bias' on InternViT-6B's qkv is ignored"
    assert not seen["final_norm"], "InternViT has no norm after its last block"


class UnusableGroup:
    """A process group that must not be used for anything."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AssertionError(f"the language model's tensor-parallel group was used ({name})")


@contextmanager
def poisoned_parallel_state() -> Iterator[list[str]]:
    """Make every getter of Megatron Core's global groups raise, wherever it has been imported to.

    Every parallel linear asks for the `gtp` groups, whatever groups it was given; they are left alone. A row-parallel
    linear asks for the tensor-parallel group as well, without using it: that getter's answer raises on use.
    """
    from megatron.core import parallel_state

    def poison(name: str) -> Callable[..., Any]:
        def getter(*_args: object, **_kwargs: object) -> UnusableGroup:
            if name == "get_tensor_model_parallel_group":
                return UnusableGroup()
            raise AssertionError(f"parallel_state.{name} was asked: those are the language model's groups")

        return getter

    names = [
        name
        for name, value in vars(parallel_state).items()
        if inspect.isfunction(value) and value.__module__ == parallel_state.__name__
        if name.startswith(("get_", "is_pipeline", "is_rank")) and "gtp" not in name
    ]
    getters = {getattr(parallel_state, name): name for name in names}
    places = [
        (module, attribute, value)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("megatron.")
        for attribute, value in list(vars(module).items())
        if inspect.isfunction(value) and value in getters
    ]
    for module, attribute, value in places:
        setattr(module, attribute, poison(getters[value]))
    try:
        yield names
    finally:
        for module, attribute, value in places:
            setattr(module, attribute, value)


def vision_side_with_poison(info: RankInfo, ranks: Ranks, scenario: Scenario) -> tuple[int, bool, float]:
    """A step whose vision side is built, runs forward and backward, is reduced and described to a checkpoint without the
    global getters."""
    from megatron.core import parallel_state

    from internvl_megatron.checkpoint import vision_state
    from internvl_megatron.device import open_device
    from internvl_megatron.model import build
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.window_encoder import ChunkPasses
    from tests.support.training import make_step, replica_rows

    torch.set_num_threads(1)
    device = open_device("cpu")
    config = scenario.config(ranks)

    def poison(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with poisoned_parallel_state():
                return function(*args, **kwargs)

        setattr(owner, name, call)

    with joined(info, device, 60):
        groups = make_groups(ranks.layout, device, 60, ranks.vision_layout)
        poison(build, "_vision")
        step, _ = make_step(config, None, groups, device)
        poison(step, "_images")
        poison(ChunkPasses, "forward")  # in the pauses of the pipeline too
        poison(ChunkPasses, "backward")
        poison(step.vision, "reduce")
        with poisoned_parallel_state() as names:
            try:
                dist.barrier(parallel_state.get_tensor_model_parallel_group())  # pyright: ignore[reportArgumentType]
                works = False
            except AssertionError:
                works = True
            vision_state.model_state(step.model, groups)
        outcome = step.run(replica_rows(scenario, config, 0, groups.layout, groups.rank), 0)  # pyright: ignore[reportArgumentType]
        return len(names), works, outcome.loss


@pytest.mark.parametrize("layout", [pytest.param("TP2xPP2", marks=pytest.mark.slow), "TP2+SPxPP2"])
@pytest.mark.parametrize(
    "parallel",
    [{}, {"vision_sharding": "sharded"}, {"vision_recompute": "layer"}, {"vision_tensor_size": 2}],
    ids=str,
)
def test_the_vision_side_never_asks_for_the_language_models_groups(
    run_ranks: Run, layout: str, parallel: dict[str, Any]
) -> None:
    ranks = replace(LAYOUTS[layout], vision_tensor_size=parallel.get("vision_tensor_size", 1))
    scenario = Scenario(family="6b", parallel_changes=parallel)
    for num_getters, works, loss in run_ranks(vision_side_with_poison, 4, ranks, scenario):
        assert num_getters > 40, "the poison covers Megatron Core's getters"
        assert works, "a poisoned getter raises"
        assert loss > 0
