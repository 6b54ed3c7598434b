"""Published training runs of Megatron on Llama models: what the cost model is calibrated with.

Read on 2026-11-28 from the files named in `source` at the commit named there. Rows whose layout is not stated as numbers (8B
fine-tuning: "PP=41") and those of trainers that shard the language model's parameters (FSDP, MaxText, torchtitan) are left out:
this model has no time for them.
"""

from dataclasses import dataclass, replace
from typing import Literal

from internvl_megatron.config.schema import LanguageConfig
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.scaling.gpus import GPUS, GpuKind
from internvl_megatron.scaling.language_time import Habits, LanguageRun

LLAMA: dict[str, LanguageConfig] = {
    name: LanguageConfig(
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_size=128,
        ffn_hidden_size=ffn,
        vocab_size=128256,
        qkv_bias=False,
    )
    for name, num_layers, hidden, num_heads, ffn in (
        ("8B", 32, 4096, 32, 14336),
        ("70B", 80, 8192, 64, 28672),
        ("405B", 126, 16384, 128, 53248),
        ("405B, 7 layers", 7, 16384, 128, 53248),
        ("405B, 21 layers", 21, 16384, 128, 53248),
        ("405B, 42 layers", 42, 16384, 128, 53248),
    )
}
"""Meta's config.json of Llama 3 and 3.1; the 405B with fewer layers is dgxc's "proxy"."""

NEMO = Habits(tensor_hidden_share=0.75, context="ring", gradient_bytes=2, all_positions=True)
"""NVIDIA's recipes: `tp_comm_overlap` on, ring attention, gradients summed in bf16. The share is assumed."""

NEMO_LORA = replace(NEMO, tensor_hidden_share=0.0)
"""The same with adapters: the recipe switches `tp_comm_overlap` off (NVIDIA/NeMo, nemo/collections/llm/recipes/llama3_70b.py,
`finetune_performance_optimizations`)."""

DGXC = "NVIDIA/dgxc-benchmarking 8f5cbb37 (tag v25.02, NeMo 24.12)"
BRIDGE = "NVIDIA-NeMo/Megatron-Bridge 0a25f911, docs/performance-summary-archive.md"

Kind = Literal["pretrain", "sft", "lora"]


@dataclass(frozen=True)
class PublishedRun:
    """One row of a published table."""

    line: str
    """Release line: rows of one line were made with the same software."""
    model: str
    kind: Kind
    precision: Literal["bf16", "fp8"]
    layout: Layout
    rows_per_step: int
    tokens_per_row: int
    step_seconds: float
    source: str
    gpu: GpuKind = GPUS["h100-80g"]

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.rows_per_step * self.tokens_per_row / self.step_seconds / self.layout.world_size

    @property
    def group(self) -> str:
        """Rows that differ in the number of GPUs only."""
        return f"{self.model} {self.kind}"

    @property
    def habits(self) -> Habits:
        """Of the recipe it was made with."""
        return NEMO_LORA if self.kind == "lora" else NEMO

    @property
    def run(self) -> LanguageRun:
        """As the cost model wants it. Rows are one sample each; data sets of fine-tuning are not known."""
        language, layout = LLAMA[self.model], self.layout
        num_stages = layout.pipeline_size * layout.virtual_size
        more = language.num_layers % num_stages
        # Where layers do not go around, the ends have one less.
        layers = [language.num_layers // num_stages + (more > 0)] * num_stages
        for place in range(sum(layers) - language.num_layers):
            layers[place // 2 if place % 2 else -1 - place // 2] -= 1
        return LanguageRun(
            language=language,
            layout=layout,
            stage_layers=tuple(layers),
            rows_per_replica=self.rows_per_step // layout.data_size,
            tokens_per_row=self.tokens_per_row,
            pairs_per_row=self.tokens_per_row**2,
            supervised_per_row=self.tokens_per_row,
            sequence_parallel=layout.tensor_size > 1,
            trainable=self.kind != "lora",
        )


def _dgxc() -> list[PublishedRun]:
    runs = []

    def add(
        model: str, kind: Kind, layout: Layout, tokens: int, rows: int, seconds: dict[Literal["bf16", "fp8"], float]
    ) -> None:
        file = "llama3.1/README" if kind == "pretrain" else "llama3/finetuning/README"
        source = f"{DGXC}: {file}_{model.split(',')[0].lower()}.md"
        runs.extend(
            PublishedRun("dgxc 25.02", model, kind, precision, layout, rows, tokens, taken, source)
            for precision, taken in seconds.items()
        )

    for scale, bf16, fp8 in (
        (1, 12.78, 9.44), (2, 12.99, 9.47), (4, 13.00, 9.60), (8, 13.00, 9.64), (16, 13.16, 9.73),
    ):  # fmt: skip
        add("8B", "pretrain", Layout(1, 1, 4 * scale, 2), 8192, 128 * scale, {"bf16": bf16, "fp8": fp8})
    for scale, bf16, fp8 in (
        (1, 14.61, 10.46), (2, 14.70, 10.52), (4, 14.72, 10.75), (8, 14.80, 10.76), (16, 14.86, 10.83), (32, 14.84, 10.99),
    ):  # fmt: skip
        add("70B", "pretrain", Layout(4, 4, 2 * scale, 2, 5), 8192, 128 * scale, {"bf16": bf16, "fp8": fp8})
    for scale, bf16, fp8 in ((1, 17.5, 11.0), (2, 17.6, 11.1), (4, 17.7, 11.2)):
        add("405B", "pretrain", Layout(8, 9, 4 * scale, 2, 7), 8192, 252 * scale, {"bf16": bf16, "fp8": fp8})
    for model, layout, rows, bf16, fp8 in (
        ("405B, 7 layers", Layout(8, 1, 2, 2), 126, 9.0, 5.75),
        ("405B, 21 layers", Layout(8, 3, 2, 2, 7), 126, 8.87, 5.63),
        ("405B, 42 layers", Layout(8, 3, 4, 2, 7), 252, 17.3, 10.8),
    ):
        add(model, "pretrain", layout, 8192, rows, {"bf16": bf16, "fp8": fp8})
    add("70B", "sft", Layout(4, 4, 2, 1, 5), 4096, 32, {"bf16": 3.36, "fp8": 2.26})
    for scale, bf16, fp8 in ((1, 9.118, 6.5), (2, 9.4, 6.7), (4, 9.77, 7.6)):
        add("70B", "lora", Layout(2, 4, scale, 1, 20), 4096, 32 * scale, {"bf16": bf16, "fp8": fp8})
    return runs


def _bridge() -> list[PublishedRun]:
    """Tables of tokens per second and GPU, all in FP8 with current scaling."""
    runs = []
    llama_70b, llama_405b = Layout(4, 8, 2, 1, 5), Layout(8, 8, 8, 2, 8)
    for line, model, layout, rows, speed, gpu in (
        ("Bridge 25.09", "70B", llama_70b, 128, 1619, "h100-80g"),
        ("Bridge 25.09", "405B", llama_405b, 512, 302, "h100-80g"),
        ("Bridge 25.11", "70B", llama_70b, 128, 1602, "h100-80g"),
        ("Bridge 25.11", "405B", llama_405b, 512, 292, "h100-80g"),
        ("Bridge 25.11", "405B", Layout(4, 8, 2, 2, 8), 64, 661, "b200-180g"),
        ("Bridge 26.02", "70B", llama_70b, 256, 1621, "h100-80g"),
        ("Bridge 26.02", "405B", llama_405b, 1536, 311, "h100-80g"),
    ):
        seconds = rows * 8192 / speed / layout.world_size
        runs.append(PublishedRun(line, model, "pretrain", "fp8", layout, rows, 8192, seconds, BRIDGE, GPUS[gpu]))
    return runs


SURVEYED = {
    ("70B pretrain", 64), ("70B pretrain", 2048), ("70B sft", 32), ("70B lora", 8), ("405B pretrain", 576),
}  # fmt: skip
"""Rows of dgxc 25.02 that this project's survey of peers names, (model and kind, GPUs): the calibration's targets are about these."""

PUBLISHED = [*_dgxc(), *_bridge()]
"""All rows."""
