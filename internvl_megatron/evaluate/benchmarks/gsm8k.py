"""GSM8K (arXiv 2110.14168) as it was released: test.jsonl, {"question", "answer"} a line, the number behind "####". Text only.

The paper evaluated text with OpenCompass and does not give the prompts; this one is Qwen2.5's for mathematics.
"""

from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.evaluate.benchmarks.benchmark import Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.final_answer import is_match
from internvl_megatron.evaluate.metrics.accuracy import percent
from internvl_megatron.evaluate.sources.json_records import read_json_lines
from internvl_megatron.evaluate.sources.record import Record

_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def _read(folder: Path, _options: Options) -> list[Item]:
    records = read_json_lines(folder / "test.jsonl", ("question", "answer"))
    return [_item(str(number), record) for number, record in enumerate(records)]


def _item(name: str, record: Record) -> Item:
    _, mark, number = record.text("answer").rpartition("####")
    if not mark or not number.strip():
        raise record.error("answer", "must end with '#### ' and the number")
    return Item(
        id=name, where=record.where, question=f"{record.text('question')}\n{_INSTRUCTION}", truth=number.strip()
    )


def _score(answers: Sequence[Answered], _options: Options) -> Scores:
    return Scores(percent(float(is_match(one.answer, one.item.truth)) for one in answers), "accuracy")


BENCHMARK = Benchmark(name="gsm8k", title="GSM8K", read=_read, score=_score, max_new_tokens=1024)
