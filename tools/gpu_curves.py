"""Loss curves of the same training in several number formats and kernels: bf16 against fp32, FP8 against bf16.

    python -m tools.gpu_curves [--dry] [--steps N] [--output FILE]

The data can be learned but not to the end: counting sequences with some words replaced by random ones, and grey pictures whose
brightness is the first word of a counting sequence. The random words leave a loss of about one nat, so relative differences mean
something. All curves see the same rows in the same order, and new ones in each step. `--dry`: tiny models on the CPU, FP8
emulated. A curve is in the record when it ends; one that fails is named there, and those after it are trained all the same. Exit
status 1 if a curve failed, strays from its reference, or did not learn.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from internvl_megatron.config.schema import (
    DataConfig,
    Fp8Config,
    KernelConfig,
    LanguageConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    VisionConfig,
)
from internvl_megatron.data.files import write_whole
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.rows import Row, SampleSource
from internvl_megatron.data.step_rows import DecodedTiles
from internvl_megatron.device import DeviceName
from internvl_megatron.launcher import RankFailedError, launch
from internvl_megatron.ranks import RankInfo
from tools.gpu_cases import marked, model_of
from tools.gpu_training import TIMEOUT_SECONDS, use_own_cores
from tools.machine_record import is_installed, machine_record

NUM_STEPS, DRY_STEPS = 200, 8
ROWS_PER_STEP, DRY_ROWS_PER_STEP = 4, 1
MAX_REASON_CHARACTERS = 2000
MEASURED_SHARE = 0.2
"""Of the steps, the last ones, whose mean losses are compared."""
LEARNED_SHARE = 0.8
"""Of the first loss, what the mean of the last must be below; less was learned in a dry run."""
DRY_LEARNED_SHARE = 0.99

NUM_WORDS = 64
"""Of a counting sequence: word w is followed by w + step, modulo their number."""
SEQUENCE_STEPS = (1, 3, 5, 7)
RANDOM_SHARE = 0.1
NUM_BRIGHTNESSES = 16
TEXT_TOKENS = 48
QUESTION_TOKENS = 2
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Curve:
    """One training."""

    name: str
    dtype: Literal["fp32", "bf16"]
    layers: Literal["transformer_engine", "torch"] = "torch"
    fp8: Fp8Config = field(default_factory=Fp8Config)
    reference: str | None = None
    """The curve it is compared with."""
    tolerance: float = 0.01
    """Relative, of the mean of the last losses."""


CURVES = (
    Curve("fp32", "fp32"),
    Curve("bf16", "bf16", reference="fp32"),
    Curve("bf16_te", "bf16", "transformer_engine", reference="bf16"),
    Curve("fp8_delayed", "bf16", "transformer_engine", Fp8Config(language="delayed"), "bf16_te"),
    Curve(
        "fp8_current",
        "bf16",
        "transformer_engine",
        Fp8Config(language="current", vision="current", projector="current"),
        "bf16_te",
    ),
    Curve("fp8_blockwise", "bf16", "transformer_engine", Fp8Config(language="blockwise"), "bf16_te"),
)


def curves_here(is_dry: bool) -> tuple[list[Curve], dict[str, str]]:
    """Those that can be trained here, and the others with the reason."""
    if is_dry:  # the CPU has no Transformer Engine: its layers are torch's, FP8 is emulated
        mine = [replace(curve, layers="torch", fp8=replace(curve.fp8, backend="emulated")) for curve in CURVES]
        mine = [replace(curve, reference="bf16") if curve.reference == "bf16_te" else curve for curve in mine]
        return [curve for curve in mine if curve.name != "bf16_te"], {"bf16_te": "Transformer Engine needs a GPU"}
    if is_installed("transformer_engine"):
        return list(CURVES), {}
    missing = {curve.name: "Transformer Engine is not installed" for curve in CURVES if curve.layers != "torch"}
    return [curve for curve in CURVES if curve.layers == "torch"], missing


def curve_model(is_dry: bool) -> ModelConfig:
    """Small, with widths that every FP8 recipe takes."""
    if is_dry:
        return model_of("1B", is_dry)
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=256, num_layers=4, num_heads=4, ffn_hidden_size=1024, tile_pixels=112, shuffle_factor=2
        ),
        language=LanguageConfig(
            hidden_size=512,
            num_layers=4,
            num_heads=8,
            num_kv_heads=2,
            head_size=64,
            ffn_hidden_size=1536,
            vocab_size=1024,
        ),
    )


def curve_config(curve: Curve, num_steps: int, device: DeviceName, is_dry: bool) -> RunConfig:
    """A run of it."""
    return RunConfig(
        name=curve.name,
        model=curve_model(is_dry),
        data=DataConfig(meta="none", tokenizer="none", tokens_per_row=256 if is_dry else 2048),
        parallel=ParallelConfig(vision_recompute="layer"),
        kernels=KernelConfig(layers=curve.layers),
        fp8=curve.fp8,
        loss=LossConfig(weighting="token"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.1, weight_decay=0.05, beta2=0.99),
        num_steps=num_steps,
        rows_per_step=DRY_ROWS_PER_STEP if is_dry else ROWS_PER_STEP,
        dtype=curve.dtype,
        device=device,
    )


class LearnableStep:
    """Rows and tiles of one step, made from its number; has what `Step` asks of `StepRows`."""

    def __init__(self, config: RunConfig, step: int) -> None:
        rng = np.random.default_rng([config.seed, step])
        made = [learnable_row(config, rng) for _ in range(config.rows_per_step)]
        self.rows = [row for row, _ in made]
        self.slots = list(range(len(made)))
        self.image_owner = [[0] * len(row.images) for row in self.rows]
        self._tiles = DecodedTiles(
            {(number, image): tile for number, (_, tiles) in enumerate(made) for image, tile in enumerate(tiles)}
        )

    def tiles(self) -> DecodedTiles:
        """All tiles."""
        return self._tiles


def learnable_row(config: RunConfig, rng: np.random.Generator) -> tuple[Row, list[np.ndarray]]:
    """A row of texts and of pictures with their answers, in turn, and the pictures' tiles."""
    model, budget = config.model, config.data.tokens_per_row
    per_tile, side = model.vision.tokens_per_tile, model.vision.tile_pixels
    token_ids, targets = np.zeros(budget, np.int32), np.full(budget, -100, np.int32)
    lengths, image_starts, tiles, images = [], [], [], []
    at = 0
    while True:
        has_image = len(lengths) % 2 == 1
        length = QUESTION_TOKENS + per_tile + ANSWER_TOKENS if has_image else TEXT_TOKENS
        if at + length > budget:
            break
        if has_image:
            brightness = int(rng.integers(NUM_BRIGHTNESSES))
            first = at + QUESTION_TOKENS + per_tile
            answer = counting(rng, ANSWER_TOKENS, brightness, SEQUENCE_STEPS[0])
            grey = 16 * brightness + 8 + rng.integers(-4, 5, (1, 3, side, side))
            tiles.append(grey.astype(np.uint8))
            image_starts.append(at + QUESTION_TOKENS)
            images.append(ImageRef(f"grey {len(images)}", (1, 1), 1, None))
            token_ids[at : at + QUESTION_TOKENS] = NUM_WORDS
        else:
            first = at + 1
            whole = counting(rng, TEXT_TOKENS, int(rng.integers(NUM_WORDS)), int(rng.choice(SEQUENCE_STEPS)))
            token_ids[at], answer = whole[0], whole[1:]
        end = first + len(answer)
        token_ids[first:end] = targets[first - 1 : end - 1] = answer
        lengths.append(length)
        at += length
    padding = [budget - at] if at < budget else []
    row = Row(
        token_ids=token_ids,
        targets=targets,
        weights=(targets >= 0).astype(np.float32),
        positions=np.zeros(budget, np.int32),
        segment_lengths=np.array([*lengths, *padding], np.int32),
        sources=tuple(SampleSource(0, index, index) for index in range(len(lengths))),
        images=tuple(images),
        image_starts=np.array(image_starts, np.int32),
        tile_starts=np.array(image_starts, np.int32),
    )
    return marked(row, model, int(rng.integers(2**31))), tiles


def counting(rng: np.random.Generator, length: int, first: int, step: int) -> np.ndarray:
    """int32 [length]: first, first + step .. modulo the number of words, some of them random instead."""
    words = (first + step * np.arange(length)) % NUM_WORDS
    is_random = rng.random(length) < RANDOM_SHARE
    return np.where(is_random, rng.integers(0, NUM_WORDS, length), words).astype(np.int32)


class Record:
    """What is known, in a file from the beginning on: several processes add to it, one after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def begin(cls, path: Path, is_dry: bool, left_out: dict[str, str]) -> "Record":
        """With nothing in it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        record = cls(path)
        head = {"name": "gpu_curves", **machine_record(), "is_dry": is_dry, "left_out": left_out}
        record._write({**head, "failures": {}, "verdicts": [], "losses": {}})
        return record

    def read(self) -> dict[str, Any]:
        """All of it."""
        return json.loads(self._path.read_text())

    @property
    def losses(self) -> dict[str, list[float]]:
        """Of every step, by curve."""
        return self.read()["losses"]

    def add_losses(self, name: str, losses: list[float]) -> None:
        """A curve has ended: judge all there are."""
        record = self.read()
        record["losses"][name] = losses
        is_dry = record["is_dry"]
        verdicts = judge(record["losses"], curves_here(is_dry)[0], DRY_LEARNED_SHARE if is_dry else LEARNED_SHARE)
        self._write({**record, "verdicts": [vars(verdict) for verdict in verdicts]})

    def add_failure(self, name: str, reason: str) -> None:
        """A curve came to nothing."""
        record = self.read()
        record["failures"][name] = reason
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        write_whole(self._path, json.dumps(record, indent=1) + "\n")


def train_curves(configs: Sequence[RunConfig], record: Record, device: DeviceName) -> None:
    """Train one after the other, as many as possible in a process: to start one takes longer than a curve. After one that fails, which
    may have spoiled its process, the others get a new one."""
    left = list(configs)
    while left:
        try:
            launch(curves_rank, 1, left, record, device=device)
            return
        except RankFailedError as error:
            done = record.losses
            left = [config for config in left if config.name not in done]
            if not left:
                raise
            failed = left.pop(0)
            record.add_failure(failed.name, str(error)[-MAX_REASON_CHARACTERS:])
            print(f"FAILED: {failed.name}: {error}", flush=True)


def curves_rank(info: RankInfo, configs: Sequence[RunConfig], record: Record) -> None:
    """Body of the rank: put the loss of every step of each run into the record."""
    from internvl_megatron.config.plan import plan
    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.model.build import build_model
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.ranks import joined
    from internvl_megatron.train.step import Step

    configure_logging(info.rank)
    use_own_cores()
    device = open_device(configs[0].device, info.local_rank)
    with joined(info, device, TIMEOUT_SECONDS):
        for config in configs:
            groups = make_groups(plan(config, info.world_size).layout, device, TIMEOUT_SECONDS)
            step = Step(config, build_model(config, groups, device), groups, device)
            batches: list[Any] = [LearnableStep(config, number) for number in range(config.num_steps)]
            losses = [step.run(batch, number).loss for number, batch in enumerate(batches)]
            record.add_losses(config.name, losses)
            print(f"{config.name}: {losses[0]:.4f} to {losses[-1]:.4f} in {config.num_steps} steps", flush=True)


@dataclass(frozen=True)
class Verdict:
    """How a curve ended."""

    name: str
    first_loss: float
    last_loss: float
    """Mean over the last steps."""
    reference: str | None
    difference: float
    """From the reference, relative; 0 without one."""
    passed: bool


def judge(losses: dict[str, list[float]], curves: Sequence[Curve], learned_share: float) -> list[Verdict]:
    """Every curve beside its reference; a reference that failed to run fails those that are compared with it."""
    count = max(1, round(MEASURED_SHARE * max(map(len, losses.values()))))
    last = {name: float(np.mean(values[-count:])) for name, values in losses.items()}
    verdicts = []
    for curve in curves:
        if curve.name not in losses:
            continue
        mine, difference = last[curve.name], 0.0
        if curve.reference is not None:
            theirs = last.get(curve.reference, float("nan"))
            difference = abs(mine - theirs) / theirs
        has_learned = mine <= learned_share * losses[curve.name][0]
        passed = has_learned and difference <= curve.tolerance  # a NaN is no pass
        verdicts.append(Verdict(curve.name, losses[curve.name][0], mine, curve.reference, difference, passed))
    return verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all curves, compare, write the record after each."""
    parser = argparse.ArgumentParser(description="Loss curves in several number formats.")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU, FP8 emulated")
    parser.add_argument("--steps", type=int, help=f"of each curve; default {NUM_STEPS}, dry {DRY_STEPS}")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    num_steps = options.steps or (DRY_STEPS if options.dry else NUM_STEPS)
    device: DeviceName = "cpu" if options.dry else "cuda"
    curves, left_out = curves_here(options.dry)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", flush=True)
    with tempfile.TemporaryDirectory(prefix="curves-") as folder:
        record = Record.begin(options.output or Path(folder) / "record.json", options.dry, left_out)
        train_curves([curve_config(curve, num_steps, device, options.dry) for curve in curves], record, device)
        found = record.read()
    verdicts = [Verdict(**verdict) for verdict in found["verdicts"]]
    print(table(verdicts))
    return int(bool(found["failures"]) or not all(verdict.passed for verdict in verdicts))


def table(verdicts: Sequence[Verdict]) -> str:
    """As Markdown."""
    lines = ["| curve | first loss | last loss | against | difference | |", "| --- " * 6 + "|"]
    for verdict in verdicts:
        outcome = "passed" if verdict.passed else "FAILED"
        difference = f"{verdict.difference:.2%}" if verdict.reference else ""
        lines.append(
            f"| {verdict.name} | {verdict.first_loss:.4f} | {verdict.last_loss:.4f} | {verdict.reference or ''} | "
            f"{difference} | {outcome} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
