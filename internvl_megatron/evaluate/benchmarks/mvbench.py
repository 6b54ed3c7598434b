"""MVBench (arXiv 2311.17005), the hub's OpenGVLab/MVBench: json/*.json, a list for each of 20 tasks, and the unpacked videos in video/.

16 frames a video, each a tile: the middle ones of equal parts (VLMEvalKit `mvbench.py`), of the whole video or, in five tasks, from `start` to `end`.
Episodic reasoning has folders of frames, three a second.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from internvl_megatron.errors import DataError
from internvl_megatron.evaluate.benchmarks.benchmark import Answered, Benchmark, Clip, Item, Options, Scores
from internvl_megatron.evaluate.benchmarks.choice_prompt import lettered
from internvl_megatron.evaluate.metrics.accuracy import percent, percent_by_label
from internvl_megatron.evaluate.metrics.chosen_option import chosen_option
from internvl_megatron.evaluate.sources.json_records import read_json_list
from internvl_megatron.evaluate.sources.named_file import named_file
from internvl_megatron.evaluate.sources.picture import file_picture, file_version
from internvl_megatron.evaluate.sources.record import Record

_NUM_FRAMES = 16
_FRAMES_PER_SECOND = 3
"""Of videos that are folders of frames."""
_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of objects, and the "
    "action and pose of persons. Based on your observations, select the best option that accurately addresses the question.\n"
)
_INSTRUCTION = "Only give the best option."
_CLEVRER, _PERCEPTION, _STAR = "clevrer/video_validation", "perception/videos", "star/Charades_v1_480"
VIDEO_FOLDERS = {
    "action_sequence": _STAR,
    "action_prediction": _STAR,
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": _CLEVRER,
    "object_interaction": _STAR,
    "object_shuffle": _PERCEPTION,
    "moving_direction": _CLEVRER,
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": _PERCEPTION,
    "moving_count": _CLEVRER,
    "moving_attribute": _CLEVRER,
    "state_change": _PERCEPTION,
    "fine_grained_pose": "nturgbd",
    "character_order": _PERCEPTION,
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": _CLEVRER,
}
"""Below video/, where the videos of a task are."""

_CLIPPED = ("action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning")
"""Tasks that ask of a part of the video."""


def _read(folder: Path, _options: Options) -> list[Item]:
    return [
        _item(record, f"{task}-{number}", task, folder / "video" / place)
        for task, place in VIDEO_FOLDERS.items()
        for number, record in enumerate(
            read_json_list(folder / "json" / f"{task}.json", ("video", "question", "candidates", "answer"))
        )
    ]


def _item(record: Record, name: str, task: str, root: Path) -> Item:
    candidates, answer = record.texts("candidates", at_least=2), record.text("answer")
    if answer not in candidates:
        raise record.error("answer", f"must be one of the candidates, not {answer!r}")
    options = lettered(candidates)
    path = named_file(root, record.text("video"), record, "video")
    seconds = (record.number("start"), record.number("end")) if task in _CLIPPED else None
    frames = _frames(path, seconds, record) if path.is_dir() else ()
    lines = [f"({letter}) {text}" for letter, text in options.items()]
    text = "\n".join([f"Question: {record.text('question')}", "Options:", *lines, _INSTRUCTION])
    shown = "".join(f"Frame-{number}: <image>\n" for number in range(1, len(frames) + 1))
    where = f"{record.where}: field 'video'"
    return Item(
        id=name,
        where=record.where,
        question=f"{shown}{_SYSTEM}{text}",
        pictures=tuple(file_picture(frame, where) for frame in frames),
        video=None
        if frames
        else Clip(path=str(path), version=file_version(path, where), num_frames=_NUM_FRAMES, seconds=seconds),
        truth={"letter": next(letter for letter, text in options.items() if text == answer), "options": options},
        labels={"task": task},
    )


def _frames(folder: Path, seconds: tuple[float, float] | None, record: Record) -> tuple[Path, ...]:
    """Files of the frames in the middle of equal parts; they are called 00001.jpg and so on."""
    total = sum(1 for path in folder.iterdir() if path.suffix == ".jpg")
    if not total:
        raise DataError(f"{record.where}: field 'video': {folder} has no frames (*.jpg); unpack the archives again")
    first, last = 1, total
    if seconds is not None:
        first = max(first, round(seconds[0] * _FRAMES_PER_SECOND))
        last = min(last, round(seconds[1] * _FRAMES_PER_SECOND))
    part = (last - first) / _NUM_FRAMES
    numbers = [math.floor(first + part / 2 + round(part * place)) for place in range(_NUM_FRAMES)]
    return tuple(folder / f"{max(1, number):05d}.jpg" for number in numbers)


def _is_right(answered: Answered) -> bool:
    """By the first word, (A), A or A., then by VLMEvalKit's rule for options."""
    truth, words = answered.item.truth, answered.answer.lower().split()
    letter = truth["letter"].lower()
    if words and (words[0].strip(".()") == letter or f"({letter})" in words[0]):
        return True
    return chosen_option(answered.answer, truth["options"]) == truth["letter"]


def _score(answers: Sequence[Answered], _options: Options) -> Scores:
    right = [(answered.item.labels, float(_is_right(answered))) for answered in answers]
    return Scores(percent(value for _, value in right), "accuracy", percent_by_label(right))


BENCHMARK = Benchmark(name="mvbench", title="MVBench", read=_read, score=_score, max_tiles=1)
