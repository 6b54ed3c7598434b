"""MMLU (arXiv 2009.03300), the hub's cais/mmlu: all/test-*.parquet and, for worked examples, all/dev-*.parquet. Text only.

The paper evaluated text with OpenCompass and does not give the prompts; these are OpenCompass's: five worked examples of the subject.
"""

from collections import defaultdict
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import Benchmark, Item, Options
from internvl_megatron.evaluate.benchmarks.choice_prompt import LETTERS, choice_accuracy, lettered
from internvl_megatron.evaluate.sources.folder_files import matching_files
from internvl_megatron.evaluate.sources.parquet_table import read_parquet
from internvl_megatron.evaluate.sources.record import Record

_NEEDED = ("question", "subject", "choices", "answer")


def _read(folder: Path, options: Options) -> list[Item]:
    examples: dict[str, list[tuple[str, str]]] = defaultdict(list)
    num_examples = int(options["examples"])
    if num_examples:
        for record in read_parquet(matching_files(folder, "all/dev-*.parquet"), _NEEDED):
            examples[record.text("subject")].append((_question(record), _letter(record)))
    items = []
    for number, record in enumerate(read_parquet(matching_files(folder, "all/test-*.parquet"), _NEEDED)):
        subject = record.text("subject")
        if len(examples[subject]) < num_examples:
            raise record.error(
                "subject", f"{subject!r} has {len(examples[subject])} worked examples, not {num_examples}"
            )
        items.append(
            Item(
                id=str(number),
                where=record.where,
                question=_question(record),
                truth={"letter": _letter(record), "options": lettered(record.texts("choices"))},
                history=tuple(examples[subject][:num_examples]),
                labels={"subject": subject},
            )
        )
    return items


def _question(record: Record) -> str:
    subject = record.text("subject").replace("_", " ")
    choices = "\n".join(f"{letter}. {text}" for letter, text in lettered(record.texts("choices", at_least=4)).items())
    return (
        f"There is a single choice question about {subject}. Answer the question by replying A, B, C or D.\n"
        f"Question: {record.text('question')}\n{choices}\nAnswer: "
    )


def _letter(record: Record) -> str:
    answer = record.integer("answer")
    if not 0 <= answer < len(record.texts("choices")):
        raise record.error("answer", f"must be the place of a choice, not {answer}")
    return LETTERS[answer]


BENCHMARK = Benchmark(
    name="mmlu",
    title="MMLU",
    read=_read,
    score=choice_accuracy,
    max_new_tokens=64,
    options={"examples": ("5", "0")},
)
