"""ScienceQA (arXiv 2209.09513), the hub's derek-thomas/ScienceQA: data/test-*.parquet. By default those questions that have a picture
(SQA-IMG), as papers on multimodal models give it.
"""

from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import Benchmark, Item, Options
from internvl_megatron.evaluate.benchmarks.choice_prompt import LETTERS, choice_accuracy, choice_prompt, lettered
from internvl_megatron.evaluate.sources.folder_files import matching_files
from internvl_megatron.evaluate.sources.parquet_table import read_parquet
from internvl_megatron.evaluate.sources.record import Record


def _read(folder: Path, options: Options) -> list[Item]:
    records = read_parquet(
        matching_files(folder, "data/test-*.parquet"), ("question", "choices", "answer"), ("image",)
    )
    wanted = [
        (number, record)
        for number, record in enumerate(records)
        if options["questions"] == "all" or record.images("image", needed=False)
    ]
    return [_item(number, record) for number, record in wanted]


def _item(number: int, record: Record) -> Item:
    choices, answer = lettered(record.texts("choices", at_least=2)), record.integer("answer")
    if not 0 <= answer < len(choices):
        raise record.error("answer", f"must be the place of one of {len(choices)} choices, not {answer}")
    hint = record.text("hint") if record.has("hint") and record.text("hint") else None
    return Item(
        id=str(number),
        where=record.where,
        question=choice_prompt(record.text("question"), choices, hint),
        pictures=record.images("image", needed=False),
        truth={"letter": LETTERS[answer], "options": choices},
        labels=record.labels("subject"),
    )


BENCHMARK = Benchmark(
    name="scienceqa",
    title="ScienceQA",
    read=_read,
    score=choice_accuracy,
    options={"questions": ("with_picture", "all")},
)
