"""Which layout trains a model fastest on so many GPUs of a kind: all valid ones, less those that do not fit, by predicted time.

What is searched: tensor, context and pipeline sizes, model chunks, the division of layers, whether and over how many ranks the vision
side is sharded, its window, and what is computed again. `plan()` says what is valid, `rank_bytes` what fits, `predict_step` how long
it takes. Ways that are sure to be slower than one that fits are not tried (`_Tries.fitting`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from internvl_megatron.config.overrides import with_values
from internvl_megatron.config.plan import RunPlan, plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.errors import ConfigError
from internvl_megatron.scaling.counts import layer_flops, output_layer_flops
from internvl_megatron.scaling.gpus import GpuKind
from internvl_megatron.scaling.memory import OTHER_BYTES, USED_SHARE, RankBytes, rank_bytes
from internvl_megatron.scaling.predicted_step import StepTime, Workload, predict_step

TENSOR_SIZES = (1, 2, 4, 8)
"""Within a machine: more would send through the network in every layer."""
CONTEXT_SIZES = (1, 2, 4, 8, 16)
MOST_STAGES = 20
VIRTUAL_SIZES = (1, 2, 4, 5, 8, 10)
WINDOW_ROWS = (32, 16, 8, 4, 2)
SHARD_RANKS = (8, 64)

Settings = dict[str, Any]
"""Values by the field's path, as an override names it."""


@dataclass(frozen=True)
class Choice:
    """A layout that fits."""

    settings: Settings
    config: RunConfig
    plan: RunPlan
    memory: RankBytes
    time: StepTime

    @property
    def layout(self) -> str:
        """In words."""
        return str(self.plan.layout)


@dataclass(frozen=True)
class Search:
    """What was found."""

    choices: list[Choice]
    """Of every layout (sizes and chunks) its fastest way, fastest layout first."""
    too_large: dict[str, float]
    """Bytes of the smallest way of each layout that does not fit."""
    invalid: Counter[str]
    """Tried settings that `plan()` refuses, by the field it names."""
    num_tried: int


def search(config: RunConfig, num_gpus: int, gpu: GpuKind, workload: Workload) -> Search:
    """Try all layouts.

    Args:
        config: what is trained; its own layout is not looked at.
        num_gpus: all of them are used.
        gpu: their kind.
        workload: rows.

    Raises:
        ConfigError: no layout fits; says what comes nearest.
    """
    best: dict[str, Choice] = {}
    tries = _Tries(config, num_gpus, USED_SHARE * gpu.memory_bytes)
    for sizes in layout_sizes(config, num_gpus, workload):
        for settings, candidate, made, memory in tries.fitting(sizes):
            name, time = str(made.layout), predict_step(candidate, made, workload, gpu)
            if name not in best or time.total < best[name].time.total:
                best[name] = Choice(settings, candidate, made, memory, time)
    too_large = {name: size for name, size in tries.smallest.items() if name not in best}
    if not best:
        raise ConfigError(_nothing_fits(config, num_gpus, gpu, too_large, tries.invalid))
    choices = sorted(best.values(), key=lambda choice: choice.time.total)
    return Search(choices, too_large, tries.invalid, tries.num_tried)


def judge(config: RunConfig, num_gpus: int, workload: Workload, gpu: GpuKind) -> tuple[RankBytes, StepTime]:
    """Memory and time of a configuration as it is, whether it fits or not. Raises ConfigError if it is not valid."""
    made = plan(config, num_gpus)
    return rank_bytes(config, made), predict_step(config, made, workload, gpu)


def slower_because(choice: Choice, best: Choice) -> list[tuple[str, float]]:
    """Parts of the step in which a layout loses to the best, and seconds; largest first."""
    ours, theirs = asdict(choice.time), asdict(best.time)
    losses = {part: ours[part] - theirs[part] for part in ours}
    return sorted(((part, loss) for part, loss in losses.items() if loss > 0), key=lambda item: -item[1])


def layout_sizes(config: RunConfig, num_gpus: int, workload: Workload) -> Iterator[Settings]:
    """Sizes, chunks and divisions of layers."""
    num_layers = config.model.language.num_layers
    head = _head_in_layers(config, workload)
    for tensor in TENSOR_SIZES:
        for context in CONTEXT_SIZES:
            for stages in range(1, min(MOST_STAGES, num_layers) + 1):
                if num_gpus % (tensor * context * stages):
                    continue
                for virtual in VIRTUAL_SIZES if stages > 1 else (1,):
                    sizes = {
                        "parallel.tensor_size": tensor,
                        "parallel.context_size": context,
                        "parallel.context_ring_size": 1,
                        "parallel.pipeline_size": stages,
                        "parallel.virtual_size": virtual,
                        "parallel.sequence_parallel": tensor > 1,
                    }
                    if num_layers % (stages * virtual) == 0:
                        yield sizes | {"parallel.stage_layers": None}
                    if virtual == 1 < stages:
                        yield sizes | {"parallel.stage_layers": lighter_last(num_layers, stages, head)}


def lighter_last(num_layers: int, num_stages: int, head: float) -> tuple[int, ...]:
    """Layers of every stage, the last with about `head` fewer to make room for the output layer."""
    last = max(1, round((num_layers + head) / num_stages - head))
    others, more = divmod(num_layers - last, num_stages - 1)
    return (*(others + (stage < more) for stage in range(num_stages - 1)), last)


def _head_in_layers(config: RunConfig, workload: Workload) -> float:
    """Work of the output layer over that of a layer."""
    language = config.model.language
    layer = layer_flops(language, config.data.tokens_per_row, round(workload.pairs_per_row))
    return output_layer_flops(language, round(workload.supervised_per_row)) / layer


class _Tries:
    """Ways to run layouts: what `plan()` and the memory say of them."""

    def __init__(self, config: RunConfig, num_gpus: int, limit_bytes: float) -> None:
        self._config, self._num_gpus, self._limit = config, num_gpus, limit_bytes
        self.num_tried = 0
        self.invalid: Counter[str] = Counter()
        self.smallest: dict[str, float] = {}
        """Bytes by layout, of ways that do not fit."""

    def fitting(self, sizes: Settings) -> Iterator[tuple[Settings, RunConfig, RunPlan, RankBytes]]:
        """Ways that fit and of which none is sure to be slower than another.

        What is computed again takes longer than what is kept, a shorter window longer than a longer one, and computing the
        language model again longer than the same of the encoder: these are tried while nothing better fits.
        """
        plain = self._planned(sizes | _WITHOUT)
        if plain is None:
            return
        windows = [None, *(size for size in WINDOW_ROWS if size < plain.rows_per_replica)]
        shard_ranks = [size for size in SHARD_RANKS if size <= self._num_gpus and self._num_gpus % size == 0]
        for ranks in (None, *shard_ranks):
            sharded = {
                "parallel.vision_sharding": "replicated" if ranks is None else "sharded",
                "parallel.vision_shard_ranks": ranks,
            }
            state = rank_bytes(with_values(self._config, sizes | _WITHOUT | sharded), plain).state
            if state + OTHER_BYTES > self._limit:
                self._note(plain, state + OTHER_BYTES)
                continue
            longest = len(windows)
            for again in ("none", "full"):
                for place, window in enumerate(windows[:longest]):
                    settings = sizes | sharded | {"parallel.vision_window_rows": window}
                    found = self._least_again(settings | {"parallel.language_recompute": again}, plain)
                    if found is None:
                        continue
                    longest = min(longest, place)
                    yield found
                    if found[0]["parallel.vision_recompute"] == "none":
                        break  # a shorter window gains nothing

    def _least_again(
        self, settings: Settings, plain: RunPlan
    ) -> tuple[Settings, RunConfig, RunPlan, RankBytes] | None:
        """The way that computes least of the encoder again and fits; None if none does."""
        for vision_again in ("none", "layer", "full"):
            self.num_tried += 1
            way = settings | {"parallel.vision_recompute": vision_again}
            candidate = with_values(self._config, way)
            memory = rank_bytes(
                candidate, plain
            )  # which looks at sizes, rows and layers in the plan, the same in all ways
            if memory.total > self._limit:
                self._note(plain, memory.total)
            elif (made := self._planned(way)) is not None:
                return way, candidate, made, memory
        return None

    def _planned(self, settings: Settings) -> RunPlan | None:
        """None if it is not valid."""
        try:
            return plan(with_values(self._config, settings), self._num_gpus)
        except ConfigError as error:
            self.invalid[_field(error)] += 1
            return None

    def _note(self, made: RunPlan, num_bytes: float) -> None:
        name = str(made.layout)
        self.smallest[name] = min(num_bytes, self.smallest.get(name, num_bytes))


_WITHOUT: Settings = {
    "parallel.vision_sharding": "replicated",
    "parallel.vision_shard_ranks": None,
    "parallel.vision_window_rows": None,
    "parallel.language_recompute": "none",
    "parallel.vision_recompute": "none",
}
"""Nothing sharded, no window, nothing computed again: if this is not valid, the sizes are not."""


def _field(error: ConfigError) -> str:
    """The field that the first problem names."""
    first = str(error).splitlines()[0].removeprefix("config: ")
    return first.split("=")[0].split(" ")[0].rstrip(":,")


def _nothing_fits(
    config: RunConfig, num_gpus: int, gpu: GpuKind, too_large: dict[str, float], invalid: Counter[str]
) -> str:
    if not too_large:
        fields = ", ".join(f"{field} ({count})" for field, count in invalid.most_common(3))
        return (
            f"no layout of {config.name} on {num_gpus} GPUs is valid; refused for {fields}: change the number of GPUs or "
            "rows_per_step"
        )
    name = min(too_large, key=lambda layout: too_large[layout])
    return (
        f"{config.name} does not fit on {num_gpus} GPUs of {gpu.memory_bytes / 1e9:.0f} GB: the smallest layout, {name}, needs "
        f"{too_large[name] / 1e9:.0f} GB on a rank; take more GPUs, or parameters that are not trained"
    )
