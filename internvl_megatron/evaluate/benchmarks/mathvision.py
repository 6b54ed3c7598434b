"""MathVision (arXiv 2402.14804), VLMEvalKit's tables: MathVision.tsv (3040 questions) and MathVision_MINI.tsv (304).

Scored by rule alone: options by VLMEvalKit's, other answers by value (`final_answer.py`), where VLMEvalKit has a language model read
the answer out of what the model wrote.
"""

from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.benchmarks.choice_prompt import lettered
from internvl_megatron.evaluate.benchmarks.reasoning_prompt import REASONING, conclusion, with_reasoning
from internvl_megatron.evaluate.final_answer import is_match
from internvl_megatron.evaluate.metrics.accuracy import percent, percent_by_label
from internvl_megatron.evaluate.metrics.chosen_option import chosen_option
from internvl_megatron.evaluate.sources.record import Record
from internvl_megatron.evaluate.sources.tsv_table import PICTURES, read_tsv

_TABLES = {"all": "MathVision.tsv", "mini": "MathVision_MINI.tsv"}


def _read(folder: Path, options: Options) -> list[Item]:
    records = read_tsv(folder / _TABLES[options["table"]], ("index", PICTURES, "question", "answer", "choices"))
    return [_item(record, options["reasoning"]) for record in records]


def _item(record: Record, reasoning: str) -> Item:
    question = record.text("question")
    return Item(
        id=record.text("index"),
        where=record.where,
        question=with_reasoning(question, is_choice=False) if reasoning == "yes" else question,
        pictures=record.images(PICTURES),
        truth={"answer": record.text("answer"), "options": lettered(record.texts("choices", at_least=0))},
        labels=record.labels("category"),
    )


def _is_right(answer: str, answered: Answered) -> bool:
    truth, options = answered.item.truth["answer"], answered.item.truth["options"]
    return chosen_option(answer, options) == truth if options else is_match(answer, truth)


def _score(answers: Sequence[Answered], options: Options) -> Scores:
    right = [(one.item.labels, float(_is_right(conclusion(one.answer, options["reasoning"]), one))) for one in answers]
    return Scores(percent(value for _, value in right), "accuracy, by rule", percent_by_label(right))


BENCHMARK = Benchmark(
    name="mathvision",
    title="MathVision",
    read=_read,
    score=_score,
    options={**REASONING, "table": tuple(_TABLES)},
)
