"""OCRBench (arXiv 2305.07895), the hub's echo840/OCRBench: data/test-*.parquet. The score is the number of right answers, of 1000."""

from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import SHORT, Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.metrics.contained_text import contains_any
from internvl_megatron.evaluate.sources.folder_files import matching_files
from internvl_megatron.evaluate.sources.parquet_table import read_parquet

_FORMULAS = "Handwritten Mathematical Expression Recognition"


def _read(folder: Path, _options: Options) -> list[Item]:
    records = read_parquet(
        matching_files(folder, "data/test-*.parquet"), ("question", "question_type", "answer"), ("image",)
    )
    return [
        Item(
            id=str(number),
            where=record.where,
            question=f"{record.text('question')}\n{SHORT}",
            pictures=record.images("image"),
            truth=record.texts("answer"),
            labels={"question_type": record.text("question_type")},
        )
        for number, record in enumerate(records)
    ]


def _score(answers: Sequence[Answered], _options: Options) -> Scores:
    parts: dict[str, float] = {}
    for answered in answers:
        kind = answered.item.labels["question_type"]
        is_right = contains_any(answered.answer, answered.item.truth, ignore_blanks=kind == _FORMULAS)
        parts[kind] = parts.get(kind, 0) + is_right
    return Scores(
        sum(parts.values()), "right answers", {f"question_type/{kind}": parts[kind] for kind in sorted(parts)}
    )


BENCHMARK = Benchmark(name="ocrbench", title="OCRBench", read=_read, score=_score, max_tiles=24)
