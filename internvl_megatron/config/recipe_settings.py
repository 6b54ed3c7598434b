"""The settings of InternVL3's recipes, each with its source: the one place where both stand.

What InternVL3 itself published is little (its paper, its config.json): learning rates, batch, steps, weight decay, drop path and
tile budget of its pre-training and fine-tuning are in neither paper nor code. Those here are of the nearest published
runs, and say so: "proxy". "ours" is what this project chose. What is not named here has the schema's default.
"""

from dataclasses import dataclass
from typing import Any, Literal

from internvl_megatron.config.models import INTERNLM3_8B, INTERNVIT_6B, INTERNVL3

Stage = Literal["pretrain", "sft", "mpo", "prm"]


@dataclass(frozen=True)
class Setting:
    """A value and where it comes from."""

    value: Any
    source: str


Settings = dict[str, Setting]
"""By the field's path, as an override names it."""

PAPER = "InternVL3 paper"
PRETRAIN_SCRIPT = "proxy: InternVL3.5 pre-training script (GPT-OSS-20B)"
SFT_SCRIPT = "proxy: InternVL3.5 SFT script"
MPO_SCRIPT = "InternVL3's MPO scripts"
PRM_SCRIPT = "proxy: InternVL2.5-8B on VisualPRM400K, script of others (JinYuanLi0012/Balanced-Info-MPRM)"
BOTH_SCRIPTS = "proxy: InternVL3.5 pre-training and SFT scripts"
MPO_DEEPSPEED = "InternVL3's MPO scripts: their DeepSpeed settings"
HUGGING_FACE = "Hugging Face's default, which they do not change"
PRM_SILENT = "ours: as in InternVL's own scripts; that of the proxy leaves it to files that were not seen, or to Hugging Face's default"
NO_PACKING = "ours: InternVL packs nothing here"
RELEASED = "InternVL3 config.json and 2nd-finetune scripts"
ONE_LIST = "InternVL's DeepSpeed settings: AdamW sees one list of all parameters (read from the code, not run)"
MODEL_SOURCE = "InternVL3 paper, Tab. 1; InternVL2.5 paper, Tab. 1; config.json of released and base models"
VOCABULARY_OF_9B = "InternLM3's base model; that of InternVL3-9B was never published: set it to the tokenizer's length"
ESTIMATED = "ours: estimated to fit 80 GB, not measured"

COMMON: Settings = {
    "dtype": Setting("bf16", "InternVL's scripts: bf16 with fp32 masters"),
    "seed": Setting(42, BOTH_SCRIPTS),
    "rows_per_step": Setting(512, BOTH_SCRIPTS),
    "data.tokens_per_row": Setting(32768, f"{PAPER}, sec. 2.5: up to 32K; {BOTH_SCRIPTS}"),
    "data.tiles_per_row": Setting(96, BOTH_SCRIPTS),
    "data.min_tiles": Setting(1, RELEASED),
    "data.max_tiles": Setting(12, RELEASED),
    "data.use_thumbnail": Setting(True, RELEASED),
    "data.packing": Setting("best_fit", "ours: fuller rows; InternVL packs first_fit"),
    "data.on_bad_sample": Setting("skip", "InternVL's data sets take another sample instead"),
    "data.max_skipped_share": Setting(0.01, "ours: more than that is no accident"),
    "loss.weighting": Setting("square", f"{PAPER}, sec. 2.2"),
    "loss.normalize": Setting("step", "ours: InternVL gives every micro-step the same share"),
    "optimizer.name": Setting("adamw", BOTH_SCRIPTS),
    "optimizer.beta1": Setting(0.9, BOTH_SCRIPTS),
    "optimizer.beta2": Setting(0.999, BOTH_SCRIPTS),
    "optimizer.eps": Setting(1e-8, BOTH_SCRIPTS),
    "optimizer.schedule": Setting("cosine", BOTH_SCRIPTS),
    "optimizer.min_learning_rate": Setting(0.0, BOTH_SCRIPTS),
    "optimizer.warmup_ratio": Setting(0.03, BOTH_SCRIPTS),
    "optimizer.weight_decay": Setting(0.05, BOTH_SCRIPTS),
    "optimizer.clip_grad_norm": Setting(1.0, f"{BOTH_SCRIPTS} (Hugging Face's default)"),
    **{f"optimizer.{part}.decay": Setting("all", ONE_LIST) for part in ("vision", "projector", "language")},
    **{
        f"optimizer.{part}.learning_rate_scale": Setting(1.0, "InternVL3's and 3.5's scripts: one rate for all parts")
        for part in ("vision", "projector", "language")
    },
    "checkpoint.save_every_steps": Setting(500, "ours"),
}

STAGES: dict[Stage, Settings] = {
    "pretrain": {
        "num_steps": Setting(11921, f"{PAPER}, sec. 2.2: about 200 B tokens, over 512 rows of 32768 (proxies)"),
        "optimizer.learning_rate": Setting(2e-5, PRETRAIN_SCRIPT),
        "data.v2pe": Setting("random", f"{PAPER}, sec. 2.1: drawn per image"),
        "data.group_weights": Setting(("language=1", "multimodal=3"), f"{PAPER}, sec. 2.2"),
        **{
            f"optimizer.{part}.trainable": Setting(True, f"{PAPER}, sec. 2.2: one stage, everything trained")
            for part in ("vision", "projector", "language")
        },
    },
    "sft": {
        "num_steps": Setting(8000, SFT_SCRIPT),
        "optimizer.learning_rate": Setting(8e-5, SFT_SCRIPT),
        "data.v2pe": Setting("fixed", "InternVL's released fine-tuning code has ordinary positions"),
        "data.v2pe_numerator": Setting(256, f"{PAPER}, sec. 3.14: its scores are with a step of 1"),
        **{f"optimizer.{part}.trainable": Setting(True, SFT_SCRIPT) for part in ("vision", "projector", "language")},
    },
    "mpo": {
        "num_steps": Setting(1172, f"{MPO_SCRIPT}: one epoch of MMPR-v1.2's 300,000 pairs, 256 a step"),
        "rows_per_step": Setting(64, f"ours: about 4 pairs a row make the 256 pairs a step of {MPO_SCRIPT}"),
        "data.tokens_per_row": Setting(24576, f"{MPO_SCRIPT}: 12288 tokens for each answer of a pair"),
        "data.tiles_per_row": Setting(48, "ours: the images of a full row, which are encoded once a pair"),
        "data.v2pe": Setting("fixed", "InternVL's released fine-tuning code has ordinary positions"),
        "data.v2pe_numerator": Setting(256, f"{PAPER}, sec. 3.14: its scores are with a step of 1"),
        "loss.kind": Setting("mpo", f"{PAPER}, sec. 2.3"),
        "loss.weighting": Setting("token", f"{MPO_SCRIPT}: a mean over tokens"),
        "loss.normalize": Setting("step", "ours: InternVL gives every GPU's pair the same share"),
        "mpo.preference_factor": Setting(0.8, MPO_SCRIPT),
        "mpo.quality_factor": Setting(0.2, MPO_SCRIPT),
        "mpo.generation_factor": Setting(1.0, MPO_SCRIPT),
        "mpo.beta": Setting(
            0.1, "ours: the default of TRL, which InternVL's MPO trainer is built on; its scripts do not set it"
        ),
        "mpo.shift": Setting("with_step", f"{MPO_SCRIPT}, through TRL's BCO"),
        "optimizer.learning_rate": Setting(2e-7, MPO_SCRIPT),
        "optimizer.warmup_ratio": Setting(0.03, MPO_SCRIPT),
        "optimizer.weight_decay": Setting(0.05, MPO_SCRIPT),
        "optimizer.schedule": Setting("cosine", MPO_SCRIPT),
        "optimizer.min_learning_rate": Setting(0.0, f"{MPO_SCRIPT}: {HUGGING_FACE}"),
        "optimizer.name": Setting("adamw", MPO_DEEPSPEED),
        "optimizer.beta1": Setting(0.9, MPO_DEEPSPEED),
        "optimizer.beta2": Setting(0.999, MPO_DEEPSPEED),
        "optimizer.eps": Setting(1e-8, MPO_DEEPSPEED),
        "optimizer.clip_grad_norm": Setting(1.0, f'{MPO_DEEPSPEED} ("auto": {HUGGING_FACE})'),
        "seed": Setting(42, f"{MPO_SCRIPT}: {HUGGING_FACE}"),
        "data.packing": Setting("best_fit", NO_PACKING),
        **{f"optimizer.{part}.trainable": Setting(True, MPO_SCRIPT) for part in ("vision", "projector", "language")},
        "checkpoint.save_every_steps": Setting(100, "ours"),
    },
    "prm": {
        "num_steps": Setting(782, f"{PRM_SCRIPT}: one epoch of 400,000 solutions, 512 a step"),
        "rows_per_step": Setting(64, "ours: about 8 solutions a row make the proxy's 512 a step"),
        "data.tokens_per_row": Setting(16384, "ours: the proxy has no packing, and solutions of up to 8192 tokens"),
        "data.tiles_per_row": Setting(48, "ours: the images of a full row"),
        "data.max_tiles": Setting(6, PRM_SCRIPT),
        "data.v2pe": Setting("fixed", "InternVL's released fine-tuning code has ordinary positions"),
        "data.v2pe_numerator": Setting(256, f"{PAPER}, sec. 3.14: its scores are with a step of 1"),
        "optimizer.learning_rate": Setting(1e-5, PRM_SCRIPT),
        "optimizer.warmup_ratio": Setting(0.05, PRM_SCRIPT),
        "optimizer.weight_decay": Setting(0.05, PRM_SCRIPT),
        "optimizer.schedule": Setting("cosine", PRM_SCRIPT),
        "optimizer.min_learning_rate": Setting(0.0, PRM_SILENT),
        "optimizer.name": Setting("adamw", PRM_SILENT),
        "optimizer.beta1": Setting(0.9, PRM_SILENT),
        "optimizer.beta2": Setting(0.999, PRM_SILENT),
        "optimizer.eps": Setting(1e-8, PRM_SILENT),
        "optimizer.clip_grad_norm": Setting(1.0, PRM_SILENT),
        "seed": Setting(42, PRM_SILENT),
        "data.packing": Setting("best_fit", NO_PACKING),
        **{
            f"optimizer.{part}.trainable": Setting(True, "ours: as in SFT; the proxy freezes the encoder")
            for part in ("vision", "projector", "language")
        },
        "checkpoint.save_every_steps": Setting(100, "ours"),
    },
}

MPO_OF_LARGE: Settings = {
    "num_steps": Setting(400, f"{MPO_SCRIPT}: the best checkpoint of 38B and 78B, out of one epoch"),
    "optimizer.schedule_steps": Setting(
        586, f"{MPO_SCRIPT}: the rate falls over one epoch of MMPR-v1.2's 300,000 pairs, 512 a step"
    ),
    "rows_per_step": Setting(128, f"ours: about 4 pairs a row make the 512 pairs a step of {MPO_SCRIPT}"),
    "data.tokens_per_row": Setting(16384, f"{MPO_SCRIPT}: 8192 tokens for each answer of a pair"),
    "data.tiles_per_row": Setting(32, "ours: the images of a full row, which are encoded once a pair"),
}
"""What is different for 38B and 78B."""

_LARGE_ENCODER = "proxy: InternVL2.5 paper, Tab. 3 (6B encoder); InternVL3.5 SFT script (38B, 241B)"
DROP_PATH: dict[Stage, dict[str, Setting]] = {
    "pretrain": {
        **dict.fromkeys(("1B", "2B", "8B", "9B", "14B"), Setting(0.1, PRETRAIN_SCRIPT)),
        **dict.fromkeys(("38B", "78B"), Setting(0.4, _LARGE_ENCODER)),
    },
    "sft": {
        **dict.fromkeys(("1B", "2B"), Setting(0.0, f"{SFT_SCRIPT} (1B-4B)")),
        **dict.fromkeys(("8B", "9B", "14B"), Setting(0.1, f"{SFT_SCRIPT} (8B-30B)")),
        **dict.fromkeys(("38B", "78B"), Setting(0.4, _LARGE_ENCODER)),
    },
    "mpo": {
        **dict.fromkeys(("1B", "2B", "8B", "9B", "14B"), Setting(0.1, MPO_SCRIPT)),
        **dict.fromkeys(("38B", "78B"), Setting(0.4, MPO_SCRIPT)),
    },
    "prm": {
        **dict.fromkeys(("1B", "2B"), Setting(0.0, "ours: as in SFT")),
        **dict.fromkeys(("8B", "9B", "14B"), Setting(0.1, "ours: as in SFT")),
        **dict.fromkeys(("38B", "78B"), Setting(0.4, "ours: as in SFT")),
    },
}
"""Stochastic depth of the vision encoder."""

LEARNING_RATE_OF_78B = Setting(2e-5, "proxy: InternVL3.5 SFT script (241B); InternVL2.5 paper, Tab. 3 (26B-78B)")


@dataclass(frozen=True)
class GpuLayout:
    """How a size is spread over a number of GPUs and more; data parallelism is what is left."""

    tensor_size: int = 1
    pipeline_size: int = 1
    language_recompute: Literal["none", "full"] = "none"
    vision_shard_ranks: int | None = None


LAYOUTS: dict[str, dict[int, GpuLayout]] = {
    "1B": {8: GpuLayout()},
    "2B": {8: GpuLayout(2)},
    "8B": {8: GpuLayout(4)},
    "9B": {8: GpuLayout(2, language_recompute="full"), 64: GpuLayout(4)},
    "14B": {8: GpuLayout(4, language_recompute="full"), 64: GpuLayout(8)},
    "38B": {16: GpuLayout(8, 2, "full"), 64: GpuLayout(8, 2, "full", 8)},
    "78B": {32: GpuLayout(8, 4, "full"), 64: GpuLayout(8, 4, "full", 8)},
}
"""By size and the fewest GPUs of 80 GB it is for. The first is the fewest that the recipe runs on at all."""

_OF_FULL_ROWS: dict[str, dict[int, int]] = {"38B": {16: 8, 32: 16}, "78B": {32: 16, 256: 32}}
PIPELINE_WINDOWS: dict[Stage, dict[str, dict[int, int]]] = {
    "pretrain": _OF_FULL_ROWS,
    "sft": _OF_FULL_ROWS,
    "mpo": {"38B": {16: 32, 32: 64}, "78B": {32: 64}},
    "prm": {"38B": {16: 16, 32: 32}, "78B": {32: 32}},
}
"""Rows of a window where there are pipeline stages, by size and the fewest GPUs. Every window fills and empties the pipeline, so
it is as long as memory allows: the largest power of two that is estimated to fit, or more rows than a replica has."""
ONE_STAGE_WINDOW = 4
"""Of the other sizes: without stages a longer window is predicted to gain less than 1 %."""
LONGEST_WINDOW = "ours: the longest estimated to fit 80 GB, not measured"


def recipe_settings(stage: Stage, size: str, num_ranks: int | None = None) -> Settings:
    """All settings of a stage at a released size, on so many GPUs; None = the fewest."""
    settings = COMMON | STAGES[stage] | _layout(size, num_ranks) | _window(stage, size, num_ranks)
    settings["model.vision.drop_path_rate"] = DROP_PATH[stage][size]
    if (stage, size) == ("sft", "78B"):
        settings["optimizer.learning_rate"] = LEARNING_RATE_OF_78B
    if stage == "mpo" and size in ("38B", "78B"):
        settings |= MPO_OF_LARGE
    if size == "9B":
        settings["model.language.vocab_size"] = Setting(INTERNLM3_8B.vocab_size, VOCABULARY_OF_9B)
    return settings


def _entry[Value](table: dict[int, Value], num_ranks: int | None) -> Value:
    """Of entries by the fewest GPUs they are for the last that is for so few; None = the first."""
    fitting = [fewest for fewest in table if num_ranks is not None and fewest <= num_ranks]
    return table[max(fitting, default=min(table))]


def _window(stage: Stage, size: str, num_ranks: int | None) -> Settings:
    windows = PIPELINE_WINDOWS[stage].get(size)
    if windows is None:
        return {"parallel.vision_window_rows": Setting(ONE_STAGE_WINDOW, ESTIMATED)}
    return {"parallel.vision_window_rows": Setting(_entry(windows, num_ranks), LONGEST_WINDOW)}


def _layout(size: str, num_ranks: int | None) -> Settings:
    chosen = _entry(LAYOUTS[size], num_ranks)
    is_large = INTERNVL3[size].vision.hidden_size == INTERNVIT_6B.hidden_size
    values = {
        "tensor_size": chosen.tensor_size,
        "pipeline_size": chosen.pipeline_size,
        "sequence_parallel": chosen.tensor_size > 1,
        "language_recompute": chosen.language_recompute,
        # The 6B encoder's parameters, gradients and Adam state are 18 bytes for each of 5.5 billion otherwise, and a tile's
        # activations 5 GB (300M: 0.9 GB).
        "vision_sharding": "sharded" if is_large else "replicated",
        "vision_shard_ranks": chosen.vision_shard_ranks,
        "vision_recompute": "layer" if is_large else "full",
        "vision_chunk_tiles": 4 if is_large else 16,
    }
    return {f"parallel.{name}": Setting(value, ESTIMATED) for name, value in values.items()}
