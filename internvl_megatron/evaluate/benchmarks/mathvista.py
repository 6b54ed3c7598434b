"""MathVista (arXiv 2310.02255), the hub's AI4Math/MathVista: data/testmini-*.parquet, with pictures in `decoded_image`.

Scored by rule alone. The paper's scores are by VLMEvalKit, which has a language model read the answer out of what the model wrote
wherever the rule for options does not: they are not to be compared with these to the last point.
"""

from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.benchmarks.choice_prompt import lettered
from internvl_megatron.evaluate.benchmarks.reasoning_prompt import REASONING, conclusion, with_reasoning
from internvl_megatron.evaluate.final_answer import final_answer, normal_form
from internvl_megatron.evaluate.metrics.accuracy import percent, percent_by_label
from internvl_megatron.evaluate.metrics.chosen_option import chosen_option
from internvl_megatron.evaluate.metrics.rounded_number import is_rounded_match
from internvl_megatron.evaluate.sources.folder_files import matching_files
from internvl_megatron.evaluate.sources.parquet_table import read_parquet
from internvl_megatron.evaluate.sources.record import Record

_NEEDED = ("pid", "query", "answer", "question_type", "answer_type")


def _read(folder: Path, options: Options) -> list[Item]:
    records = read_parquet(matching_files(folder, "data/testmini-*.parquet"), _NEEDED, ("decoded_image",))
    return [_item(record, options["reasoning"]) for record in records]


def _item(record: Record, reasoning: str) -> Item:
    truth: dict[str, object] = {"answer": record.text("answer"), "type": record.text("answer_type")}
    if record.text("question_type") == "multi_choice":
        truth["options"] = lettered(record.texts("choices", at_least=2))
    elif record.has("precision"):
        truth["precision"] = record.integer("precision")
    question, metadata = record.text("query"), record.fields.get("metadata") or {}
    return Item(
        id=record.text("pid"),
        where=record.where,
        question=with_reasoning(question, is_choice=False) if reasoning == "yes" else question,
        pictures=record.images("decoded_image"),
        truth=truth,
        labels={"task": str(metadata["task"])} if metadata.get("task") else {},
    )


def _is_right(answer: str, truth: dict[str, object]) -> bool:
    """Options by VLMEvalKit's rule, their texts being the truth; numbers by value, as MathVista rounds them; others as texts."""
    options = truth.get("options")
    if isinstance(options, dict):
        letter = chosen_option(answer, options)
        return letter is not None and options[letter] == truth["answer"]
    given, wanted = final_answer(answer), str(truth["answer"])
    if truth["type"] in ("integer", "float"):
        precision = truth.get("precision", 0) if truth["type"] == "float" else 0
        assert isinstance(precision, int), "the record's precision is a whole number"
        return is_rounded_match(given, wanted, precision)
    return bool(given) and normal_form(given) == normal_form(wanted)


def _score(answers: Sequence[Answered], options: Options) -> Scores:
    right = [
        (one.item.labels, float(_is_right(conclusion(one.answer, options["reasoning"]), one.item.truth)))
        for one in answers
    ]
    return Scores(percent(value for _, value in right), "accuracy, by rule", percent_by_label(right))


BENCHMARK = Benchmark(name="mathvista", title="MathVista", read=_read, score=_score, options=REASONING)
