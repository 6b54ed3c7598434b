"""The vision side split over 1, 2 and 4 tensor-parallel ranks equals transformers' vision tower and plain PyTorch.

The small model has 5 heads: 6 on two ranks, and 8 on four, where the last rank has none but those of zeros. With 4 heads
there is no padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from internvl_megatron.config.schema import ModelConfig, OptimizerConfig, PartConfig
from internvl_megatron.errors import CheckpointError
from internvl_megatron.ranks import RankInfo
from tests.parallel.scenarios import SCENARIOS
from tests.support.comparison import expect_close, expect_equal, expect_same_training
from tests.support.layouts import Ranks, run_config
from tests.support.models import huggingface_model, small_model
from tests.support.reference import gradients_of, normalized, our_tensors
from tests.support.training import Tensors, train_scenarios
from tests.support.training import Trained as TrainedModel
from tests.support.vision_shards import whole_vision

pytestmark = pytest.mark.parallel

EVEN = "6b, 4 heads"
SIZES = [1, 2, 4]
CASES = [
    ("300m", 2),
    ("6b", 4),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("300m", 1), ("300m", 4), ("6b", 1), ("6b", 2), (EVEN, 2))
    ),
]
"""Family and tensor-parallel size."""
NUM_TILES, SAVED_AT, STEPS = 8, 2, 4
OUTPUT_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-5
BF16_TOLERANCE = 0.05
"""Of the embeddings' norm."""

_FROZEN = PartConfig(trainable=False)
SGD = OptimizerConfig(
    name="sgd", learning_rate=0.1, weight_decay=0.1, warmup_ratio=0.0, schedule="constant", language=_FROZEN
)
# A large eps: where a gradient is rounding noise, Adam would otherwise turn it into whole steps.
ADAMW = replace(SGD, name="adamw", learning_rate=0.01, eps=1e-3)
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}

Run = Callable[..., list[Any]]
Plain = Callable[[str, str], "Seen"]


@dataclass
class Seen:
    """What one rank saw, or all of them together."""

    output: np.ndarray = field(default_factory=lambda: np.empty(0))
    """Image embeddings of the first step, of this rank's tiles."""
    gradients: Tensors = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    parameters: Tensors = field(default_factory=dict)


def model_of(family: str) -> ModelConfig:
    """With as little of a language model as there can be."""
    if family != EVEN:
        return small_model(family, num_layers=1)
    model = small_model("6b", num_layers=1)
    return replace(model, vision=replace(model.vision, num_heads=4))


def ranks_of(tensor_size: int) -> Ranks:
    return Ranks(4, vision_tensor_size=tensor_size)


def tiles_and_gradients(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tiles uint8 [t, 3, H, W], and a gradient of their embeddings [steps, t, K, D] by step: the loss is their product."""
    rng = np.random.default_rng(3)
    vision, width = model.vision, model.language.hidden_size
    tiles = rng.integers(0, 256, (NUM_TILES, 3, vision.tile_pixels, vision.tile_pixels), dtype=np.uint8)
    return tiles, rng.standard_normal((STEPS, NUM_TILES, vision.tokens_per_tile, width)).astype(np.float32)


class EncoderAlone:
    """The vision side on one rank, trained without a language model."""

    def __init__(self, info: RankInfo, ranks: Ranks, model: ModelConfig) -> None:
        from internvl_megatron.device import open_device
        from internvl_megatron.parallel.groups import make_groups

        self.device = open_device("cpu")
        self.groups = make_groups(ranks.layout, self.device, 60, ranks.vision_layout)
        parallel = ranks.config(overlap_gradients=False, overlap_parameters=False)
        self.config = run_config(model, parallel=parallel, num_steps=STEPS)
        unit = self.groups.vision_layout.unit_of_rank[info.rank]
        self.mine = slice(unit, None, len(self.groups.vision_layout.units))
        self.tiles, self.gradients = (torch.from_numpy(array) for array in tiles_and_gradients(model))

    def start(self, optimizer: str, weights: Tensors | None, dtype: Literal["fp32", "bf16"] = "fp32") -> None:
        """Begin again, with the given full weights or fresh ones."""
        from tests.support.training import make_step

        config = replace(self.config, optimizer=OPTIMIZERS[optimizer], dtype=dtype)
        self.step, self.model = make_step(config, weights, self.groups, self.device)

    def train(self, steps: range, seen: Seen) -> None:
        """Encode this unit's tiles, sum the gradients of all units, and update."""
        vision = self.step.vision
        for number in steps:
            vision.clear()
            self.step.optimizer.zero_grad()
            output = vision(self.tiles[self.mine], None)
            with vision.backward_pass(is_last=True):
                output.backward(self.gradients[number][self.mine].to(output.dtype))
            vision.reduce()
            if number == 0:
                seen.output = output.detach().float().numpy()
                seen.gradients = self.shards(lambda parameter: parameter.main_grad)
            self.step.optimizer.set_learning_rate(number)
            seen.norms.append(self.step.optimizer.clip_and_step().grad_norm)
        seen.parameters = self.shards(lambda parameter: parameter)

    def shards(self, of: Callable[[Any], torch.Tensor]) -> Tensors:
        """This rank's shards of parameters, or of what belongs to them."""
        named = [(name, p) for name, p in self.model.named_parameters() if name.startswith("vision.")]
        return {name: of(parameter).detach().float().clone().numpy() for name, parameter in named}

    def save(self, root: Path) -> None:
        from internvl_megatron.checkpoint import folders, save_load

        marker = folders.CheckpointInfo(SAVED_AT, 1, 1, "test", optimizer_state=True)
        save_load.save(root, marker, self.model, self.step.optimizer, self.groups, None, keep_last=1)

    def load(self, root: Path) -> None:
        from internvl_megatron.checkpoint import folders, save_load

        save_load.load(folders.finished(root)[-1], self.model, self.step.optimizer, self.groups)


def on_every_rank(info: RankInfo, body: Callable[..., Any], *args: Any) -> Any:
    """`body(info, *args)` in a world of all ranks."""
    from internvl_megatron.device import open_device
    from internvl_megatron.ranks import joined

    torch.set_num_threads(1)
    with joined(info, open_device("cpu"), 60):
        return body(info, *args)


def train(info: RankInfo, ranks: Ranks, model: ModelConfig, weights: Tensors, root: Path) -> dict[str, Seen]:
    """Four steps with each optimizer from the same weights, AdamW with a checkpoint in the middle, and two in bf16; and fresh
    weights."""
    side = EncoderAlone(info, ranks, model)
    found = {name: Seen() for name in (*OPTIMIZERS, "bf16", "fresh")}
    for name in OPTIMIZERS:
        side.start(name, weights)
        side.train(range(SAVED_AT), found[name])
        if name == "adamw":
            side.save(root)
        side.train(range(SAVED_AT, STEPS), found[name])
    side.start("adamw", weights, "bf16")
    side.train(range(SAVED_AT), found["bf16"])
    side.start("sgd", None)
    side.train(range(0), found["fresh"])
    return found


def go_on(info: RankInfo, ranks: Ranks, model: ModelConfig, root: Path, again: Path) -> Seen:
    """The steps after a checkpoint, from fresh parameters; before them it is written again."""
    side, seen = EncoderAlone(info, ranks, model), Seen()
    side.start("adamw", None)
    side.load(root)
    side.save(again)
    side.train(range(SAVED_AT, STEPS), seen)
    return seen


def refusals(info: RankInfo, ranks: Ranks, model: ModelConfig, larger: ModelConfig, root: Path) -> tuple[str, str]:
    """What is said about a whole tensor that has padded heads, and about the model's checkpoint in a larger one."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    from internvl_megatron.checkpoint import vision_state

    side = EncoderAlone(info, ranks, model)
    side.start("adamw", None)
    name, parameter = next((n, p) for n, p in side.model.named_parameters() if n.endswith("q_norm.weight"))
    state = vision_state.model_state(side.model, side.groups)
    apply_factories(state)
    assert not any(getattr(entry, "allow_shape_mismatch", False) for entry in nested_values(state))
    with pytest.raises(CheckpointError) as padded:
        side.model.load_full(name, parameter, torch.zeros(len(parameter) * ranks.vision_tensor_size))
    side.config = replace(side.config, model=larger)
    side.start("adamw", None)
    with pytest.raises(CheckpointError) as checkpoint:
        side.load(root)
    return str(padded.value), str(checkpoint.value)


def whole(shards: list[Tensors], ranks: Ranks, family: str) -> Tensors:
    """Tensors of the vision side from all ranks' shards."""
    return whole_vision(shards, ranks.vision_layout, model_of(family).vision)


@cache
def starting_weights(family: str) -> Tensors:
    model = model_of(family)
    return our_tensors(huggingface_model(model).state_dict(), model)


def change(trained: Tensors, family: str) -> Tensors:
    """What training has changed of the vision side."""
    return {name: tensor - starting_weights(family)[name] for name, tensor in trained.items()}


def vision_only(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("vision.")}


def plain_pytorch(family: str, optimizer: str) -> Seen:
    """The same training in one process by transformers' modules and torch's optimizer."""
    model = model_of(family)
    config, seen, reference = OPTIMIZERS[optimizer], Seen(), huggingface_model(model)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_("language_model" not in name and "lm_head" not in name)
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    plain = torch.optim.SGD(trained, **options)
    if optimizer == "adamw":
        plain = torch.optim.AdamW(trained, **options, betas=(config.beta1, config.beta2), eps=config.eps)
    tiles, gradients = tiles_and_gradients(model)
    for number in range(STEPS):
        plain.zero_grad()
        output = reference.model.get_image_features(normalized(tiles)).pooler_output
        output.backward(torch.from_numpy(gradients[number]))
        if number == 0:
            seen.output = output.detach().numpy()
            seen.gradients = vision_only(our_tensors(gradients_of(reference), model))
        seen.norms.append(torch.nn.utils.clip_grad_norm_(trained, config.clip_grad_norm or 0.0).item())
        plain.step()
    seen.parameters = vision_only(our_tensors(reference.state_dict(), model))
    return seen


@pytest.fixture(scope="module")
def plain() -> Callable[[str, str], Seen]:
    """(family, optimizer) to what plain PyTorch in one process makes of it."""
    return cache(plain_pytorch)


Trained = Callable[[str, int], tuple[list[dict[str, Seen]], Path]]


@pytest.fixture(scope="module")
def trained(run_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """(family, tensor-parallel size) to what every rank saw, and the checkpoints' folder."""

    @cache
    def run(family: str, tensor_size: int) -> tuple[list[dict[str, Seen]], Path]:
        root = tmp_path_factory.mktemp(f"{family}-{tensor_size}")
        ranks = ranks_of(tensor_size)
        return run_ranks(on_every_rank, 4, train, ranks, model_of(family), starting_weights(family), root), root

    return run


@pytest.mark.parametrize(("family", "tensor_size"), CASES)
def test_outputs_and_gradients(trained: Trained, plain: Plain, family: str, tensor_size: int) -> None:
    ranks, wanted = ranks_of(tensor_size), plain(family, "sgd")
    found = [seen["sgd"] for seen in trained(family, tensor_size)[0]]
    units = ranks.vision_layout.units
    for number, unit in enumerate(units):
        for rank in unit:
            np.testing.assert_allclose(
                found[rank].output, wanted.output[number :: len(units)], rtol=0, atol=OUTPUT_TOLERANCE
            )
    expect_close(whole([seen.gradients for seen in found], ranks, family), wanted.gradients, "gradients")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("family", "tensor_size"), CASES)
def test_updates_and_gradient_norms(
    trained: Trained, plain: Plain, family: str, tensor_size: int, optimizer: str
) -> None:
    """Four steps with weight decay, clipped by a norm that counts every parameter once."""
    ranks, wanted = ranks_of(tensor_size), plain(family, optimizer)
    found = [seen[optimizer] for seen in trained(family, tensor_size)[0]]
    for seen in found:
        np.testing.assert_allclose(seen.norms, wanted.norms, rtol=NORM_TOLERANCE)
    parameters = whole([seen.parameters for seen in found], ranks, family)
    expect_close(change(parameters, family), change(wanted.parameters, family), "change of the parameters")


@pytest.mark.parametrize(("family", "tensor_size"), CASES)
def test_bf16(trained: Trained, plain: Plain, family: str, tensor_size: int) -> None:
    """Padding stays zero and copies stay equal, as `whole` checks; the embeddings are those of fp32, roughly."""
    ranks, wanted = ranks_of(tensor_size), plain(family, "adamw").output
    found = [seen["bf16"] for seen in trained(family, tensor_size)[0]]
    whole([seen.parameters for seen in found], ranks, family)
    units = ranks.vision_layout.units
    output = np.empty_like(wanted)
    for number, unit in enumerate(units):
        output[number :: len(units)] = found[unit[0]].output
    assert np.linalg.norm(output - wanted) < BF16_TOLERANCE * np.linalg.norm(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["300m", "6b"])
def test_fresh_parameters_do_not_depend_on_the_split(trained: Trained, family: str) -> None:
    made = [
        whole([seen["fresh"].parameters for seen in trained(family, size)[0]], ranks_of(size), family)
        for size in SIZES
    ]
    for other in made[1:]:
        expect_equal(other, made[0])


@pytest.mark.parametrize(
    ("family", "source", "target"),
    [
        ("6b", 4, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("6b", 1, 2), ("6b", 2, 4), ("300m", 4, 2), (EVEN, 2, 4))
        ),
    ],
)
def test_checkpoints_fit_every_split(
    run_ranks: Run, trained: Trained, plain: Plain, tmp_path: Path, family: str, source: int, target: int
) -> None:
    """Weights and Adam's moments: two more steps equal an uninterrupted run, and what was loaded is saved the same."""
    _, root = trained(family, source)
    ranks, wanted = ranks_of(target), plain(family, "adamw")
    found = run_ranks(on_every_rank, 4, go_on, ranks, model_of(family), root, tmp_path)
    for seen in found:
        np.testing.assert_allclose(seen.norms, wanted.norms[SAVED_AT:], rtol=NORM_TOLERANCE)
    parameters = whole([seen.parameters for seen in found], ranks, family)
    expect_close(change(parameters, family), change(wanted.parameters, family), "change of the parameters")
    expect_same_file(root, tmp_path)


def test_what_does_not_fit_is_refused(run_ranks: Run, trained: Trained) -> None:
    """Two ranks hold as many rows of six heads as of five. No tensor may have another shape in a file than in the model."""
    model = model_of("6b")
    larger = replace(model, vision=replace(model.vision, hidden_size=48, num_heads=6))
    arguments = ranks_of(2), model, larger, trained("6b", 2)[1]
    for padded, checkpoint in run_ranks(on_every_rank, 4, refusals, *arguments):
        assert "q_norm.weight: the weights have shape (48,), the model (40,)" in padded
        assert "cannot be loaded into this model" in checkpoint


WHOLE_MODEL = {
    "units in a stage": (Ranks(4, tensor_size=2, pipeline_size=2, vision_tensor_size=2), ["6b", "recompute_less"]),
    "units over replicas": (Ranks(4, tensor_size=2, vision_tensor_size=4), ["overlapped_window"]),
    "first stage": (
        Ranks(4, tensor_size=2, pipeline_size=2, vision_placement="first_stage", vision_tensor_size=2),
        ["adamw"],
    ),
    "colocated": (Ranks(4, tensor_size=2, sequence_parallel=True, vision_placement="colocated"), ["adamw"]),
}
"""Layouts, and what is trained under them."""
SLOW_WHOLE_MODEL = ["units in a stage", "first stage", "colocated"]


@pytest.mark.parametrize(
    "layout",
    ["units over replicas", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_WHOLE_MODEL)],
)
def test_training_with_the_language_model(
    run_ranks: Run, reference: Callable[[str, str], TrainedModel], weights: dict[str, Tensors], layout: str
) -> None:
    ranks, names = WHOLE_MODEL[layout]
    as_many_replicas = "TP2xPP2" if ranks.layout.data_size == 1 else "TP2xDP2"
    scenarios = {name: SCENARIOS[name] for name in names}
    results = run_ranks(train_scenarios, 4, ranks, scenarios, weights)
    for name, scenario in scenarios.items():
        found = [result[name] for result in results]
        for tensors in ([rank.gradients for rank in found], [rank.parameters for rank in found]):
            encoder = whole(tensors, ranks, scenario.family) if tensors[0] else {}
            for shards in tensors:
                shards |= encoder
        wanted = reference(as_many_replicas, name)
        expect_same_training(found, wanted, weights[scenario.family], ranks.layout)


def expect_same_file(one: Path, other: Path) -> None:
    """The vision side of two checkpoints, moments too, is the same to the last bit and has real heads only; so the converters,
    which know of no others, can read it."""
    from checkpoint_convert.distributed_checkpoint import DistributedCheckpoint
    from internvl_megatron.checkpoint import folders

    found, wanted = read_tensors(other), read_tensors(one)
    assert found.keys() == wanted.keys()
    assert {name.split(".vision.")[0] for name in wanted if name.startswith("vision_optimizer.")} == {
        f"vision_optimizer.optimizer.state.{state}" for state in ("param", "exp_avg", "exp_avg_sq")
    }
    expect_equal(found, wanted)
    assert wanted["vision.encoder.layers.1.self_attention.linear_qkv.weight"].shape == (3 * 40, 40)
    converted = DistributedCheckpoint(folders.finished(one)[-1])
    expect_equal(
        {name: converted.read(name).numpy() for name in converted.names if name.startswith("vision.")},
        vision_only(wanted),
    )


def read_tensors(root: Path) -> Tensors:
    """The vision side's tensors of the newest checkpoint, read by torch alone."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as load_with_torch

    from internvl_megatron.checkpoint import folders

    reader = FileSystemReader(folders.finished(root)[-1])
    tensors = {
        name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith("vision")
    }
    load_with_torch(tensors, storage_reader=reader, no_dist=True)
    return {name: tensor.numpy() for name, tensor in tensors.items()}
