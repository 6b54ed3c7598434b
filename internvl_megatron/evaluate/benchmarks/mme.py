"""MME (arXiv 2306.13394) as it was released: a folder for each of 14 subtasks, with pictures and, for each, a text file of two lines
"question<tab>Yes" or "question<tab>No". Both lie in the folder itself, or in its images/ and questions_answers_YN/.
"""

from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.data.images import FRAME_ENDINGS
from internvl_megatron.errors import DataError
from internvl_megatron.evaluate.benchmarks.benchmark import SHORT, Answered, Benchmark, Item, Options, Scores
from internvl_megatron.evaluate.metrics.mme_score import COGNITION, PERCEPTION, mme_score
from internvl_megatron.evaluate.metrics.yes_no import said
from internvl_megatron.evaluate.sources.folder_files import matching_files
from internvl_megatron.evaluate.sources.picture import file_picture


def _read(folder: Path, _options: Options) -> list[Item]:
    return [item for subtask in (*PERCEPTION, *COGNITION) for item in _subtask(folder / subtask, subtask)]


def _subtask(folder: Path, subtask: str) -> list[Item]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; MME has one for each of its 14 subtasks")
    divided = (folder / "questions_answers_YN").is_dir()
    texts = matching_files(folder / "questions_answers_YN" if divided else folder, "*.txt")
    pictures = {
        path.stem: path for path in matching_files(folder / "images" if divided else folder, "*") if _is_image(path)
    }
    items = []
    for path in texts:
        if path.stem not in pictures:
            raise DataError(f"{path}: there is no picture of that name beside it; download the data set again")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); download the data set again") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                items.append(_item(line, f"{path}:{number}", subtask, pictures[path.stem]))
    return items


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in FRAME_ENDINGS


def _item(line: str, where: str, subtask: str, picture: Path) -> Item:
    question, _, answer = line.rpartition("\t")
    if not question or answer.strip().lower() not in ("yes", "no"):
        raise DataError(f"{where}: must be a question, a tab, and Yes or No, not {line!r}")
    return Item(
        id=f"{subtask}/{picture.stem}/{where.rpartition(':')[2]}",
        where=where,
        question=f"{question.strip()} {SHORT}",
        pictures=(file_picture(picture, where),),
        truth={"yes": answer.strip().lower() == "yes", "picture": picture.stem},
        labels={"subtask": subtask},
    )


def _score(answers: Sequence[Answered], _options: Options) -> Scores:
    found = mme_score(
        (one.item.labels["subtask"], one.item.truth["picture"], said(one.answer) is one.item.truth["yes"])
        for one in answers
    )
    parts = {"perception": found.perception, "cognition": found.cognition}
    return Scores(
        found.total, "score, perception + cognition", parts | {f"subtask/{k}": v for k, v in found.by_subtask.items()}
    )


BENCHMARK = Benchmark(name="mme", title="MME", read=_read, score=_score)
