"""A few questions of every benchmark, in the files of its public data set."""

import base64
import csv
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from internvl_megatron.evaluate.benchmarks.mvbench import VIDEO_FOLDERS
from tests.support.videos import write_video


def picture_bytes(seed: int, width: int = 40, height: int = 28) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def picture_text(seed: int) -> str:
    """The same in base64."""
    return base64.b64encode(picture_bytes(seed)).decode()


def write_picture(path: Path, seed: int) -> None:
    """Write one, the folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes(seed))


def write_tsv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As pandas writes tables: quotes where they are needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], rows_per_group: int = 2) -> None:
    """As the hub's files are: row groups, pictures as {"bytes", "path"}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=rows_per_group)


def write_json(path: Path, content: Any) -> None:
    """JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_json_lines(path: Path, records: Sequence[Any]) -> None:
    """An object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def hub_picture(seed: int) -> dict[str, Any]:
    """A cell of a column of pictures."""
    return {"bytes": picture_bytes(seed), "path": f"{seed}.png"}


def choice_rows(count: int, **more: Any) -> list[dict[str, Any]]:
    """Rows of one of VLMEvalKit's tables."""
    return [
        {
            "index": number,
            "question": f'which "one"\nis it, {number}?',
            "A": "two",
            "B": "three digits",
            "C": "" if number % 2 else "nine",
            "answer": "AB"[number % 2],
            "category": f"kind {number % 2}",
            "image": picture_text(number),
        }
        | more
        for number in range(1, count + 1)
    ]


def write_all(root: Path) -> None:
    """Every benchmark, in a folder of its name."""
    _write_choice_tables(root)
    _write_parquet_files(root)
    _write_document_files(root)
    _write_yes_no_files(root)
    _write_boxes_and_videos(root)
    write_json_lines(
        root / "gsm8k/test.jsonl",
        [{"question": f"what is {n} and 2?", "answer": f"It is\n#### {n + 2}"} for n in (1, 2)],
    )


def _write_choice_tables(root: Path) -> None:
    write_tsv(root / "mmstar/MMStar.tsv", choice_rows(3, l2_category="fine"))
    write_tsv(root / "realworldqa/RealWorldQA.tsv", choice_rows(2))
    write_tsv(root / "seed2plus/SEEDBench2_Plus.tsv", choice_rows(2))
    write_tsv(root / "ai2d/AI2D_TEST.tsv", choice_rows(2))
    write_tsv(root / "ai2d/AI2D_TEST_NO_MASK.tsv", choice_rows(3))
    several = [row | {"image": str([picture_text(7), picture_text(row["index"])])} for row in choice_rows(2)]
    write_tsv(root / "blink/BLINK.tsv", several)
    plain = choice_rows(2, hint="look", **{"l2-category": "LR"})
    rotated = [
        row
        | {
            "index": row["index"] + 1_000_000,
            "A": row["B"],
            "B": row["A"],
            "answer": "BA"[row["index"] % 2],
            "image": row["index"],
        }
        for row in plain
    ]
    write_tsv(root / "mmbench/MMBench_DEV_EN.tsv", plain + rotated)
    write_tsv(root / "mmbench/MMBench_DEV_CN.tsv", [row | {"question": "有几个数字?"} for row in plain])
    kinds = [("VD_illusion_1_0_0_0", "Yes"), ("VD_illusion_1_0_1_0", "No"), ("VS_chart_0_1_0_0", "No")]
    write_tsv(
        root / "hallusionbench/HallusionBench.tsv",
        [
            {
                "index": index,
                "category": index[:2],
                "l2-category": index.split("_")[1],
                "question": "are there two?",
                "answer": answer,
                "image": picture_text(number) if number else "",
            }
            for number, (index, answer) in enumerate(kinds)
        ],
    )
    math = [
        {
            "index": 1,
            "question": "how many?\nChoices: (A) 2 (B) 3",
            "answer": "B",
            "choices": "['2', '3']",
            "category": "algebra",
        },
        {"index": 2, "question": "how many in all?", "answer": "12", "choices": "[]", "category": "counting"},
    ]
    write_tsv(root / "mathvision/MathVision.tsv", [row | {"image": picture_text(row["index"])} for row in math])


def _write_parquet_files(root: Path) -> None:
    subjects = [
        ("Art", "<image 1> and <image 2>: which?", "['two', \"three's\"]", "B", "multiple-choice"),
        ("Art_Theory", "how many in <image 1>?", "[]", "['24/7', '3']", "open"),
        ("Math", "which?", "['<image 1>', '<image 2>']", "A", "multiple-choice"),
    ]
    for number, (subject, question, options, answer, kind) in enumerate(subjects):
        row = {
            "id": f"validation_{subject}_1",
            "question": question,
            "options": options,
            "answer": answer,
            "question_type": kind,
        }
        images = {f"image_{place}": hub_picture(number + place) if place < 3 else None for place in range(1, 8)}
        images["image_2"] = None if subject == "Art_Theory" else images["image_2"]
        kind_of_picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table(
            {name: [value] for name, value in row.items()}
            | {name: pa.array([value], kind_of_picture) for name, value in images.items()}
        )
        path = root / f"mmmu/{subject}/validation-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table, path)
    vista = [
        {"query": "how many?", "answer": "1.2", "question_type": "free_form", "answer_type": "float", "precision": 1.0, "choices": None},
        {"query": "which?\n(A) two\n(B) three", "answer": "three", "question_type": "multi_choice", "answer_type": "text", "precision": None, "choices": ["two", "three"]},
        {"query": "how many?", "answer": "2", "question_type": "free_form", "answer_type": "integer", "precision": None, "choices": None},
    ]  # fmt: skip
    write_parquet(
        root / "mathvista/data/testmini-00000-of-00001-725687bf7a18d64b.parquet",
        [
            row
            | {
                "pid": str(n),
                "image": f"images/{n}.jpg",
                "decoded_image": hub_picture(n),
                "metadata": {"task": "figure"},
            }
            for n, row in enumerate(vista)
        ],
    )
    ocr = [
        {
            "dataset": "x",
            "question": "what is written?",
            "question_type": kind,
            "answer": ["two", "2"],
            "image": hub_picture(n),
        }
        for n, kind in enumerate(
            ["Regular Text Recognition", "Handwritten Mathematical Expression Recognition", "Doc-oriented VQA"]
        )
    ]
    write_parquet(root / "ocrbench/data/test-00000-of-00001.parquet", ocr)
    science = [
        {"image": hub_picture(n) if n != 1 else None, "question": "which?", "choices": ["two", "three"], "answer": n % 2, "hint": "" if n else "look", "subject": "natural science"}
        for n in range(3)
    ]  # fmt: skip
    write_parquet(root / "scienceqa/data/test-00000-of-00001-f0e719df791966ff.parquet", science)
    for split, count in (("test", 2), ("dev", 5)):
        questions = [
            {"question": f"{split} {n}?", "subject": "abstract_algebra", "choices": list("wxyz"), "answer": n % 4}
            for n in range(count)
        ]
        write_parquet(root / f"mmlu/all/{split}-00000-of-00001.parquet", questions)


def _write_document_files(root: Path) -> None:
    for name, file, field, folder in (
        ("docvqa", "val_v1.0_withQT.json", "image", "documents"),
        ("infovqa", "infographicsVQA_val_v1.0_withQT.json", "image_local_name", "infographicsvqa_images"),
    ):
        shown = "documents/1.png" if name == "docvqa" else "1.png"
        write_picture(root / name / folder / "1.png", 1)
        label = {"question_types": ["layout"]} if name == "docvqa" else {"answer_type": ["single span", "number"]}
        questions = [
            {"questionId": n, "question": "how many?", field: shown, "answers": ["two", "2"], **label}
            for n in range(2)
        ]
        write_json(root / name / file, {"dataset_name": name, "data": questions})
    for kind, labels in (("human", ["2", "three"]), ("augmented", ["5.5%", "2004"])):
        write_json(
            root / f"chartqa/test/test_{kind}.json",
            [{"imgname": "1.png", "query": f"how many, {label}?", "label": label} for label in labels],
        )
    write_picture(root / "chartqa/test/png/1.png", 2)
    write_picture(root / "textvqa/train_images/0a1.jpg", 3)
    questions = [
        {"question_id": n, "question": "what?", "image_id": "0a1", "answers": ["two"] * 4 + ["2"] * 6}
        for n in range(2)
    ]
    write_json(root / "textvqa/TextVQA_0.5.1_val.json", {"data": questions})


def _write_yes_no_files(root: Path) -> None:
    subtasks = (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
        "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
    )  # fmt: skip
    for number, subtask in enumerate(subtasks):
        divided = subtask in ("celebrity", "posters")
        folder = root / "mme" / subtask
        write_picture((folder / "images" if divided else folder) / "0001.png", number)
        texts = folder / "questions_answers_YN" if divided else folder
        texts.mkdir(parents=True, exist_ok=True)
        (texts / "0001.txt").write_text(
            "Is it two? Please answer yes or no.\tYes\nIs it three? Please answer yes or no.\tNo\n"
        )
    for setting in ("random", "popular", "adversarial"):
        records = [
            {
                "question_id": n,
                "image": "COCO_val2014_1.jpg",
                "text": "Is there a dog in the image?",
                "label": "yes" if n else "no",
            }
            for n in range(2)
        ]
        write_json_lines(root / f"pope/coco_pope_{setting}.json", records)
    write_picture(root / "pope/val2014/COCO_val2014_1.jpg", 4)


def _write_boxes_and_videos(root: Path) -> None:
    for split in (
        "refcoco_val",
        "refcoco_testA",
        "refcoco_testB",
        "refcoco+_val",
        "refcoco+_testA",
        "refcoco+_testB",
        "refcocog_val",
        "refcocog_test",
    ):
        record = {
            "image": "coco/train2014/1.jpg",
            "sent": "the left digit",
            "bbox": [4, 2, 20.5, 28],
            "width": 40,
            "height": 28,
        }
        write_json_lines(root / f"refcoco/{split}.jsonl", [record])
    write_picture(root / "refcoco/coco/train2014/1.jpg", 5)
    question = {"video": "1.mp4", "question": "how many?", "candidates": ["two", "three"], "answer": "three"}
    clipped = (
        "action_sequence",
        "action_prediction",
        "object_interaction",
        "action_localization",
        "episodic_reasoning",
    )
    made = root / "made.mp4"
    write_video(made, [k / 10 for k in range(30)])
    for task, place in VIDEO_FOLDERS.items():
        folder = root / "mvbench/video" / place
        asked = question | {"question": f"how many of {task}?"}
        clip = {"start": 0.4, "end": 2.0} if task in clipped else {}
        if task == "episodic_reasoning":
            for number in range(1, 9):
                write_picture(folder / f"show/{number:05d}.jpg", number)
            write_json(root / f"mvbench/json/{task}.json", [asked | {"video": "show"} | clip])
            continue
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, folder / "1.mp4")
        write_json(root / f"mvbench/json/{task}.json", [asked | clip])
