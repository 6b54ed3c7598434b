"""Loss by data set and kind of sample, gradient norms by part, strides of images: those of plain PyTorch under every layout."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from internvl_megatron.config.schema import LossConfig, RunConfig
from internvl_megatron.data.positions import STRIDES
from internvl_megatron.data.rows import Row, SampleSource
from internvl_megatron.data.video import VideoFrames
from internvl_megatron.ranks import RankInfo
from internvl_megatron.train.loss_parts import LossPart
from tests.support.layouts import ADAMW, LAYOUTS, SGD, Ranks, Scenario
from tests.support.models import huggingface_model
from tests.support.preference_reference import answer_logprobs, mixed_loss
from tests.support.reference import images_of, our_tensors, row_logits
from tests.support.rows import MemoryRows, StepData
from tests.support.training import Tensors, make_step

pytestmark = pytest.mark.parallel

NUM_DATASETS = 3
UNCLIPPED = {"optimizer": replace(SGD, clip_grad_norm=None), "num_steps": 1}
SCENARIOS = {
    "step": Scenario(changes=UNCLIPPED),
    "micro_batch": Scenario(changes={**UNCLIPPED, "loss": LossConfig(normalize="micro_batch")}),
    "adamw": Scenario(changes={"optimizer": replace(ADAMW, clip_grad_norm=None), "num_steps": 1}),
    "sharded": Scenario(changes=UNCLIPPED, parallel_changes={"vision_sharding": "sharded"}),
    "projector_only": Scenario(
        changes={
            **UNCLIPPED,
            "optimizer": replace(
                SGD,
                clip_grad_norm=None,
                vision=replace(SGD.vision, trainable=False),
                language=replace(SGD.language, trainable=False),
            ),
        }
    ),
    "bf16": Scenario(changes={**UNCLIPPED, "dtype": "bf16"}),
    "bf16 adamw": Scenario(changes={"optimizer": ADAMW, "num_steps": 1, "dtype": "bf16"}),
    "pairs": Scenario(changes={**UNCLIPPED, "loss": LossConfig(kind="mpo")}),
}
ONE_BY_ONE = {"step", "micro_batch", "adamw", "sharded", "projector_only"}
CASES = {
    "1": ["step", "adamw"],
    "DP2": ["step", "micro_batch", "adamw", "sharded", "bf16", "bf16 adamw", "pairs"],
    "CP2": ["step"],
    "PP2": ["step", "projector_only", "pairs"],
    "TP2+SPxPP2": ["adamw"],
}


@dataclass
class Seen:
    """Of one step on one rank."""

    loss: float
    by_dataset: dict[int, LossPart]
    by_kind: dict[str, LossPart]
    norms: dict[str, float]
    grad_norm: float
    strides: dict[int, int]
    held_out: tuple[float, dict[int, LossPart]]


def data_of(scenario: Scenario, config: RunConfig) -> StepData:
    """The scenario's rows, their samples (or pairs) of three data sets in turn, and the last image a video."""
    data = scenario.data(config, 0)
    rows = []
    for number, row in enumerate(data.rows):
        together = 2 if row.has_pairs else 1
        sources = [
            SampleSource((sample // together + number) % NUM_DATASETS, 0, 0) for sample in range(row.num_samples)
        ]
        images = [*row.images[:-1], *(replace(image, video=VideoFrames(0, None)) for image in row.images[-1:])]
        rows.append(replace(row, sources=tuple(sources), images=tuple(images)))
    return StepData(rows, data.tiles)


def steps(info: RankInfo, ranks: Ranks, names: list[str], weights: Tensors) -> dict[str, Seen]:
    from internvl_megatron.device import open_device
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined

    torch.set_num_threads(1)
    device, layout, seen = open_device("cpu"), ranks.layout, {}
    members = layout.replica_ranks(layout.replica(info.rank))
    with joined(info, device, 60):
        groups = make_groups(layout, device, 60, ranks.vision_layout)
        for name in names:
            config = SCENARIOS[name].config(ranks)
            step, _ = make_step(config, weights, groups, device)
            own = range(layout.replica(info.rank), config.rows_per_step, layout.data_size)
            batch: Any = MemoryRows(data_of(SCENARIOS[name], config), own, members.index(info.rank), len(members))
            judged, result = step.judge(batch), step.run(batch, 0)
            seen[name] = Seen(
                result.loss,
                result.parts.by_dataset(),
                result.parts.by_kind(),
                result.part_grad_norms,
                result.grad_norm,
                {stride: n for stride, n in zip(STRIDES, result.agreement.stride_counts.tolist(), strict=True) if n},
                (judged.loss, judged.parts.by_dataset()),
            )
    return seen


@pytest.fixture(scope="module")
def seen(run_ranks: Callable[..., list[Any]], weights: dict[str, Tensors]) -> Callable[[str], list[dict[str, Seen]]]:
    def run(layout: str) -> list[dict[str, Seen]]:
        ranks = LAYOUTS[layout]
        return run_ranks(steps, ranks.num_ranks, ranks, CASES[layout], weights["300m"])

    return cache(run)


def kind_of(row: Row, sample: int) -> str:
    """By looking at every image."""
    end = int(row.segment_lengths[: sample + 1].sum())
    start = end - int(row.segment_lengths[sample])
    own = [image for image, at in zip(row.images, row.image_starts.tolist(), strict=True) if start <= at < end]
    if any(image.video is not None for image in own):
        return "video"
    return "text" if not own else "image" if len(own) == 1 else "multi_image"


@dataclass
class Wanted:
    """By data set or kind: [share of the loss, share of the weight, samples]."""

    parts: dict[int | str, list[float]]
    norms: dict[str, float]


@cache
def plain(name: str, num_replicas: int) -> Wanted:
    """The same by transformers' model, sample by sample."""
    scenario = SCENARIOS[name]
    config = scenario.config(Ranks(1))
    data, reference = data_of(scenario, config), huggingface_model(config.model)
    weight = [float(row.weights.sum(dtype=np.float64)) for row in data.rows]
    parts: dict[int | str, list[float]] = {}
    total: Any = 0.0
    for index, row in enumerate(data.rows):
        divisor = sum(weight)
        if config.loss.normalize == "micro_batch":
            first = index // num_replicas * num_replicas
            divisor = sum(weight[first : first + num_replicas]) * len(data.rows) / num_replicas
        logits = row_logits(reference, row, images_of(data, index))
        losses = F.cross_entropy(logits, torch.from_numpy(row.targets).long(), ignore_index=-100, reduction="none")
        shares = losses * torch.from_numpy(row.weights) / divisor if divisor else losses * 0
        total = total + shares.sum()
        ends = np.cumsum(row.segment_lengths)
        for sample in range(row.num_samples):
            inside = slice(ends[sample] - row.segment_lengths[sample], ends[sample])
            figures = [shares[inside].sum().item(), row.weights[inside].sum() / divisor if divisor else 0.0, 1]
            for part in (row.sources[sample].dataset, kind_of(row, sample)):
                parts[part] = [a + b for a, b in zip(parts.get(part, [0, 0, 0]), figures, strict=True)]
    total.backward()
    gradients = our_tensors(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}, config.model
    )
    squares: dict[str, float] = dict.fromkeys(("vision", "projector", "language"), 0.0)
    for parameter, gradient in gradients.items():
        part = "projector" if parameter.startswith("vision.projector.") else parameter.split(".")[0]
        squares[part] += float((gradient.astype(np.float64) ** 2).sum())
    return Wanted(parts, {part: square**0.5 for part, square in squares.items()})


SINGLE = [(layout, name) for layout, names in CASES.items() for name in names if name in ONE_BY_ONE]


@pytest.mark.parametrize(("layout", "name"), SINGLE)
def test_parts_are_those_of_plain_pytorch(seen: Any, layout: str, name: str) -> None:
    wanted = plain(name, LAYOUTS[layout].layout.data_size)
    for rank in seen(layout):
        found: Seen = rank[name]
        for parts in (found.by_dataset, found.by_kind):
            assert sum(part.loss_share for part in parts.values()) == pytest.approx(found.loss, rel=1e-6)
            assert sum(part.weight for part in parts.values()) == pytest.approx(1, rel=1e-6)
            for key, part in parts.items():
                loss, weight, count = wanted.parts[key]
                assert part.loss_share == pytest.approx(loss, rel=1e-5)
                assert part.weight == pytest.approx(weight, rel=1e-6)
                assert part.num_samples == count
                assert part.loss == pytest.approx(loss / weight, rel=1e-5)
        assert found.by_dataset.keys() | found.by_kind.keys() == wanted.parts.keys()
        assert len(found.by_dataset) == NUM_DATASETS and len(found.by_kind) == 4, "the test has all kinds"
        loss, by_dataset = found.held_out
        assert sum(part.loss_share for part in by_dataset.values()) == pytest.approx(loss, rel=1e-6)
        assert loss == pytest.approx(found.loss, rel=1e-5), "the same rows, before the update"


@pytest.mark.parametrize(("layout", "name"), SINGLE)
def test_norms_of_parts_are_those_of_plain_pytorch(seen: Any, layout: str, name: str) -> None:
    wanted = plain(name, LAYOUTS[layout].layout.data_size).norms
    trained = ["projector"] if name == "projector_only" else ["vision", "projector", "language"]
    for rank in seen(layout):
        found: Seen = rank[name]
        assert list(found.norms) == trained
        assert found.norms == pytest.approx({part: wanted[part] for part in trained}, rel=1e-4)
        assert sum(norm**2 for norm in found.norms.values()) == pytest.approx(found.grad_norm**2, rel=1e-6)


@pytest.mark.parametrize("name", ["bf16", "bf16 adamw"])
def test_norms_of_parts_in_bf16(seen: Any, name: str) -> None:
    """Gradients are in other tensors then; a part that were mixed up with another would be far off."""
    wanted = plain("step", 2).norms
    for rank in seen("DP2"):
        assert rank[name].norms == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(("layout", "name"), [("DP2", "step"), ("PP2", "step"), ("DP2", "pairs")])
def test_strides_are_those_of_the_images(seen: Any, layout: str, name: str) -> None:
    """The tokens of a tile, four, follow one another at its stride."""
    rows = data_of(SCENARIOS[name], SCENARIOS[name].config(Ranks(1))).rows
    wanted = Counter(int(row.positions[at + 3] - row.positions[at + 2]) for row in rows for at in row.image_starts)
    assert len(wanted) > 1
    assert all(rank[name].strides == wanted for rank in seen(layout))


@pytest.mark.parametrize("layout", ["DP2", "PP2"])
def test_parts_of_pairs_are_those_of_plain_pytorch(seen: Any, layout: str) -> None:
    """At the first step policy and reference agree, and each pair has the same share of the preference losses."""
    scenario = SCENARIOS["pairs"]
    config = scenario.config(Ranks(1))
    data, model = data_of(scenario, config), huggingface_model(config.model)
    with torch.no_grad():
        total = mixed_loss(model, model, data, config, [], learns=True)[0].item()
        answers = [answer_logprobs(model, data, index) for index in range(len(data.rows))]
    num_pairs = sum(len(row) // 2 for row in answers)
    num_tokens = sum(length for row in answers for _, length in row[::2])
    same = config.mpo.preference_factor * np.log(2) + config.mpo.quality_factor * 2 * np.log(2)
    wanted: dict[int, float] = {}
    for row, found in zip(data.rows, answers, strict=True):
        for source, (chosen, _) in zip(row.sources[::2], found[::2], strict=True):
            share = same / num_pairs - config.mpo.generation_factor * chosen.item() / num_tokens
            wanted[source.dataset] = wanted.get(source.dataset, 0.0) + share
    assert sum(wanted.values()) == pytest.approx(total, rel=1e-9)
    for rank in seen(layout):
        found = rank["pairs"]
        shares = {number: part.loss_share for number, part in found.by_dataset.items()}
        assert shares == pytest.approx(wanted, rel=1e-5)
        assert sum(shares.values()) == pytest.approx(found.loss, rel=1e-6)
        assert sum(part.num_samples for part in found.by_kind.values()) == 2 * num_pairs
