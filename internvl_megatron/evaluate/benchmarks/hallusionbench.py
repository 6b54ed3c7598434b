"""HallusionBench (arXiv 2310.14566), VLMEvalKit's table: HallusionBench.tsv.

The index says which set, figure and question it is: category_subcategory_input_set_figure_question, as in VD_illusion_1_0_1_2.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import SHORT, Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.metrics.hallusion_accuracy import HallusionAccuracy, hallusion_accuracy
from internvl_megatron.evaluate.metrics.yes_no import said
from internvl_megatron.evaluate.sources.record import Record
from internvl_megatron.evaluate.sources.tsv_table import PICTURES, read_tsv


def _read(folder: Path, _options: Options) -> list[Item]:
    records = read_tsv(folder / "HallusionBench.tsv", ("index", "question", "answer", "l2-category"))
    return [_item(record) for record in records]


def _item(record: Record) -> Item:
    parts, answer = record.text("index").split("_"), record.text("answer").lower()
    if len(parts) < 6:
        raise record.error(
            "index", f"must say set, figure and question (VD_illusion_1_0_1_2), not {record.text('index')!r}"
        )
    if answer not in ("yes", "no"):
        raise record.error("answer", f"must be Yes or No, not {record.text('answer')!r}")
    kind, (group, figure, question) = record.text("l2-category"), parts[3:6]
    return Item(
        id=record.text("index"),
        where=record.where,
        question=f"{record.text('question')} Please answer yes or no. {SHORT}",
        pictures=record.images(PICTURES, needed=False),
        truth={"yes": answer == "yes", "figure": [kind, group, figure], "question": [kind, group, question]},
        labels={"l2-category": kind},
    )


def _accuracy(answers: Sequence[Answered]) -> HallusionAccuracy:
    return hallusion_accuracy(
        (tuple(one.item.truth["figure"]), tuple(one.item.truth["question"]), said(one.answer) is one.item.truth["yes"])
        for one in answers
    )


def _score(answers: Sequence[Answered], _options: Options) -> Scores:
    whole, by_category = _accuracy(answers), defaultdict(list)
    for answered in answers:
        by_category[answered.item.labels["l2-category"]].append(answered)
    parts = {"aAcc": whole.all, "fAcc": whole.figures, "qAcc": whole.questions}
    parts |= {f"l2-category/{name} aAcc": _accuracy(own).all for name, own in sorted(by_category.items())}
    return Scores(
        100 * whole.mean, "mean of aAcc, fAcc and qAcc", {name: 100 * value for name, value in parts.items()}
    )


BENCHMARK = Benchmark(name="hallusionbench", title="HallusionBench", read=_read, score=_score)
