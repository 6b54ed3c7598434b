"""The matrix of layouts: factors, the cases that are valid, and what is trained in each.

A new layout is one more value of a factor: a line in one of the tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from internvl_megatron.config.schema import DataConfig, ModelConfig, PartConfig, RunConfig
from tests.support.layouts import SGD, Ranks, Scenario, run_config
from tests.support.models import small_model
from tests.support.pairs import Case, all_cases, covering
from tests.support.rows import StepData, Tiles, packed_row
from tests.support.scattered_rows import samples_with_images, samples_without

TENSOR: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor_size": 2},
    "TP2+SP": {"tensor_size": 2, "sequence_parallel": True},
}
CONTEXT: dict[str, dict[str, Any]] = {
    "CP1": {},
    "CP2": {"context_size": 2},
    "CP2 ring": {"context_size": 2, "context_ring_size": 2},
}
PIPELINE: dict[str, dict[str, Any]] = {"PP1": {}, "PP2": {"pipeline_size": 2}, "PP4": {"pipeline_size": 4}}
VIRTUAL: dict[str, dict[str, Any]] = {"VPP1": {}, "VPP2": {"virtual_size": 2}}
DATA = {"DP1": 1, "DP2": 2}
VISION: dict[str, dict[str, Any]] = {
    "together": {},
    "apart": {"vision_exchange_replicas": 1},
    "first stage": {"vision_placement": "first_stage"},
    "colocated": {"vision_placement": "colocated"},
    "units of 2": {"vision_tensor_size": 2},
    "sharded": {},
}
VISION_CHANGES: dict[str, dict[str, Any]] = {"sharded": {"vision_sharding": "sharded"}}
"""What of a vision layout is not in the numbers of ranks."""
RECOMPUTE = ("none", "layer", "full")
TRAINED = {"all": PartConfig(), "frozen ViT": PartConfig(trainable=False)}
OVERLAP = {"overlap": True, "no overlap": False}
FACTORS: dict[str, Sequence[str]] = {
    "tensor": [*TENSOR],
    "context": [*CONTEXT],
    "pipeline": [*PIPELINE],
    "virtual": [*VIRTUAL],
    "data": [*DATA],
    "vision": [*VISION],
    "recompute": RECOMPUTE,
    "trained": [*TRAINED],
    "overlap": [*OVERLAP],
}
MOST_RANKS = 8

TILES_OF_STEPS = (8, 24, 0, 16, 8)
"""Over all replicas. In the last step every other row has no image, so one of two replicas has none at all."""
CHUNKS_OF_STEPS = (1, 3, 0, 2, 1)
"""With an eighth of 8 tiles x number of units in a chunk; 2 in the last step where the other replica cannot help."""
SAMPLE_MULTIPLE = 4
TOKENS_PER_ROW = 80


def matrix_model(drop_path_rate: float = 0.3) -> ModelConfig:
    """Eight narrow layers."""
    model = small_model(num_layers=8, hidden_size=32, head_size=8, ffn_hidden_size=48)
    return replace(model, vision=replace(model.vision, drop_path_rate=drop_path_rate))


def ranks_of(case: Case) -> Ranks:
    """The layout of a case."""
    sizes = {
        **TENSOR[case["tensor"]],
        **CONTEXT[case["context"]],
        **PIPELINE[case["pipeline"]],
        **VIRTUAL[case["virtual"]],
    }
    replica_size = sizes.get("tensor_size", 1) * sizes.get("context_size", 1) * sizes.get("pipeline_size", 1)
    return Ranks(replica_size * DATA[case["data"]], **sizes, **VISION[case["vision"]])


def num_rows(ranks: Ranks) -> int:
    """Rows of a step over all replicas: every replica has twice as many as pipeline stages."""
    return 2 * ranks.pipeline_size * ranks.layout.data_size


def is_valid(case: Case) -> bool:
    """Whether the values go together, and say something that no other case says."""
    ranks = ranks_of(case)
    vision, replica_size = case["vision"], ranks.num_ranks // ranks.layout.data_size
    return ranks.num_ranks <= MOST_RANKS and not (
        (ranks.virtual_size > 1 and ranks.pipeline_size == 1)
        or (vision == "apart" and ranks.layout.data_size == 1)
        or (vision == "first stage" and case["recompute"] == "full")
        or (vision == "colocated" and (ranks.tensor_size == 1 or replica_size > ranks.tensor_size))
        or (vision in ("units of 2", "sharded") and ranks.num_ranks == 1)
    )


@dataclass(frozen=True)
class MatrixScenario(Scenario):
    """Five steps of the same rows under any layout."""

    num_rows: int = 2
    drop_path_rate: float = 0.3
    keeps_gradients: bool = True
    trained: str = "all"

    def config(self, ranks: Ranks) -> RunConfig:
        # Then the busiest unit has 1, 3, 0 and 2 chunks, however many units there are.
        chunk = TILES_OF_STEPS[0] // len(ranks.vision_layout.units)
        return run_config(
            matrix_model(self.drop_path_rate),
            data=DataConfig(tokens_per_row=TOKENS_PER_ROW, tiles_per_row=16, sample_multiple_tokens=SAMPLE_MULTIPLE),
            parallel=ranks.config(**{"vision_chunk_tiles": chunk, **self.parallel_changes}),
            optimizer=replace(SGD, vision=TRAINED[self.trained]),
            num_steps=len(TILES_OF_STEPS),
            rows_per_step=self.num_rows,
        )

    def data(self, config: RunConfig, step: int) -> StepData:
        return matrix_rows(self.num_rows, step)


def scenario_of(case: Case) -> MatrixScenario:
    """What is trained in a case."""
    overlap = OVERLAP[case["overlap"]]
    changes = {
        "prepare_ahead": overlap,
        "overlap_gradients": overlap,
        "overlap_parameters": overlap,
        "vision_in_bubbles": overlap,
        "vision_recompute": case["recompute"],
        **VISION_CHANGES.get(case["vision"], {}),
    }
    return MatrixScenario(parallel_changes=changes, num_rows=num_rows(ranks_of(case)), trained=case["trained"])


@cache
def matrix_rows(num_rows: int, step: int) -> StepData:
    """Rows of a step. Rows with even and with odd numbers, which are those of two replicas, have equally many tiles."""
    rng = np.random.default_rng([num_rows, step])
    model = matrix_model()
    vision = model.vision
    one_sided = step == len(TILES_OF_STEPS) - 1
    tiles_of_row = np.zeros(num_rows, dtype=np.int64)
    for side in range(1 if one_sided else 2):
        share = TILES_OF_STEPS[step] // (1 if one_sided else 2)
        for row in range(side, num_rows, 2):
            rows_left = (num_rows - row + 1) // 2
            most = share - sum(tiles_of_row[side:row:2])
            tiles_of_row[row] = (
                most if rows_left == 1 else rng.integers(max(0, most - 12 * (rows_left - 1)), min(most, 12) + 1)
            )
    rows, tiles = [], Tiles()
    for index, count in enumerate(tiles_of_row.tolist()):
        samples = [*(samples_with_images(rng, count) if count else samples_without(rng)), [int(rng.integers(4, 13))]]
        vocab_size = model.language.vocab_size
        row = packed_row(
            rng, samples, TOKENS_PER_ROW, vision.tokens_per_tile, vocab_size, sample_multiple=SAMPLE_MULTIPLE
        )
        shape = 3, vision.tile_pixels, vision.tile_pixels
        for image, reference in enumerate(row.images):
            tiles[index, image] = rng.integers(0, 256, (reference.num_tiles, *shape), dtype=np.uint8)
        rows.append(row)
    return StepData(rows, tiles)


def name_of(case: Case) -> str:
    """Values in the order of the factors, without those that are off."""
    off = {"TP1", "CP1", "PP1", "VPP1", "DP1", "none", "all"}
    return " ".join(value for value in case.values() if value not in off)


def _layout_of(case: Case) -> tuple[str, ...]:
    """All values but those of what is trained and of overlap."""
    return tuple(value for factor, value in case.items() if factor not in ("trained", "overlap"))


def _cost(case: Case) -> float:
    """Roughly what a case takes: to begin, and a row at a time."""
    return 6 + num_rows(ranks_of(case))


def default_cases() -> list[Case]:
    """Those in which every two values that go together meet."""
    return covering(valid_cases(), _cost)


@cache
def valid_cases() -> list[Case]:
    return all_cases(FACTORS, is_valid)


def more_cases() -> list[Case]:
    """Every layout, vision layout and recomputation that is not among the default ones; the other two factors take turns."""
    seen = {_layout_of(case) for case in default_cases()}
    cases: dict[tuple[str, ...], list[Case]] = {}
    for case in valid_cases():
        if _layout_of(case) not in seen:
            cases.setdefault(_layout_of(case), []).append(case)
    return [choices[number % len(choices)] for number, choices in enumerate(cases.values())]
