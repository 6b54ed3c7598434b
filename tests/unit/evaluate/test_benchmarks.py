"""Every benchmark on a few questions in the files of its data set: what is asked, what right and wrong answers score, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from internvl_megatron.errors import ConfigError, DataError
from internvl_megatron.evaluate.benchmarks.benchmark import Answered
from internvl_megatron.evaluate.benchmarks.published import OPTION_SCORES, SCORES, SIZES, published_score
from internvl_megatron.evaluate.benchmarks.registry import BENCHMARKS, chosen_options, find_benchmark
from tests.support.miniature_benchmarks import choice_rows, write_all, write_json_lines, write_tsv

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All benchmarks; tests that change something change a copy."""
    root = tmp_path_factory.mktemp("data")
    write_all(root)
    return root


def read(data, name, *settings):
    benchmark = BENCHMARKS[name]
    return benchmark.read(data / name, chosen_options(benchmark, settings))


def score(data, name, answer, *settings):
    """Scores where `answer(item)` is what is answered."""
    benchmark, options = BENCHMARKS[name], chosen_options(BENCHMARKS[name], settings)
    return benchmark.score([Answered(item, answer(item)) for item in benchmark.read(data / name, options)], options)


def right(item):
    """The known answer, as a model would give it."""
    truth = item.truth
    if isinstance(truth, bool):
        return "Yes" if truth else "No"
    if isinstance(truth, str):
        return truth
    if isinstance(truth, list):
        return (
            truth[-1]
            if isinstance(truth[-1], str)
            else truth[-1]["letter"]
            if item.id != "validation_Art_Theory_1"
            else "It is 3."
        )
    if "box" in truth:
        width, height = truth["size"]
        sides = zip(truth["box"], (width, height) * 2, strict=True)
        return f"<box>[[{', '.join(f'{1000 * side / whole:.0f}' for side, whole in sides)}]]</box>"
    if "yes" in truth:
        return "Yes" if truth["yes"] else "No"
    return f"({truth['letter']})" if "letter" in truth else truth["answer"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_answers_have_the_whole_score_and_empty_ones_none(data, name):
    whole = {"mme": 2800, "ocrbench": 3, "textvqa": 100}.get(name, 100)
    assert score(data, name, right).main == pytest.approx(whole)
    assert score(data, name, lambda item: "").main == 0
    assert all(item.where.startswith(str(data / name)) for item in read(data, name))


def test_names_and_options():
    assert len(BENCHMARKS) == 22
    with pytest.raises(ConfigError, match="benchmark 'x' is not known"):
        find_benchmark("x")
    with pytest.raises(ConfigError, match=r"ai2d has no such option; it has ai2d\.mask"):
        chosen_options(BENCHMARKS["ai2d"], ["ai2d.x=no"])
    assert chosen_options(BENCHMARKS["ai2d"], ["ai2d.mask=no", "chartqa.tolerance_of=answer"]) == {"mask": "no"}


def test_published_scores():
    assert {*SCORES} <= {*BENCHMARKS} and all(
        len(own) == len(SIZES) for own in [*SCORES.values(), *OPTION_SCORES.values()]
    )
    for benchmark, option, value in OPTION_SCORES:
        assert value in BENCHMARKS[benchmark].options[option]
    assert published_score("ai2d", {"mask": "yes"}, "8B") == 85.2
    assert published_score("ai2d", {"mask": "no"}, "8B") == 92.6
    assert published_score("mmlu", {}, "9B") is None and published_score("gsm8k", {}, "8B") is None
    assert published_score("mme", {}, None) is None


def test_tiles_of_each_image(data):
    """Table of spec 7.2; 64 of all images together."""
    most = {"mmmu": 12, "chartqa": 12, "docvqa": 18, "infovqa": 24, "ocrbench": 24, "mvbench": 1}
    for name, benchmark in BENCHMARKS.items():
        item = read(data, name)[0]
        alone = replace(item, pictures=item.pictures[:1])
        assert benchmark.tiles_per_image(alone) == most.get(name, 6)
    several = replace(read(data, "blink")[0], pictures=read(data, "blink")[0].pictures * 8)
    assert (len(several.pictures), BENCHMARKS["blink"].tiles_per_image(several)) == (16, 4)
    assert BENCHMARKS["blink"].tiles_per_image(replace(several, pictures=several.pictures * 8)) == 1


@pytest.mark.parametrize(
    ("name", "place", "expected"),
    [
        ("mmstar", 1, f'which "one"\nis it, 2?\nA. two\nB. three digits\nC. nine\n{LETTER}'),
        ("mmbench", 2, f'look\nwhich "one"\nis it, 1?\nA. three digits\nB. two\n{LETTER}'),
        ("scienceqa", 0, f"look\nwhich?\nA. two\nB. three\n{LETTER}"),
        ("mmmu", 0, f"<Image-1> and <Image-2>: which?\nA. two\nB. three's\n{LETTER}"),
        ("mmmu", 1, "how many in \n?\nAnswer the question directly."),
        ("mmmu", 2, f"which?\nA. <Image-1>\nB. <Image-2>\n{LETTER}"),
        ("mathvista", 1, "which?\n(A) two\n(B) three"),
        ("mathvision", 0, "how many?\nChoices: (A) 2 (B) 3"),
        ("chartqa", 0, f"how many, 2?\n{SHORT}"),
        ("docvqa", 0, f"how many?\n{SHORT}"),
        ("textvqa", 0, f"what?\n{SHORT}"),
        ("ocrbench", 0, f"what is written?\n{SHORT}"),
        ("mme", 0, f"Is it two? Please answer yes or no. {SHORT}"),
        ("hallusionbench", 0, f"are there two? Please answer yes or no. {SHORT}"),
        ("pope", 0, f"Is there a dog in the image? {SHORT}"),
        (
            "refcoco",
            0,
            "Please provide the bounding box coordinate of the region this sentence describes: <ref>the left digit</ref>",
        ),
        ("gsm8k", 0, "what is 1 and 2?\nPlease reason step by step, and put your final answer within \\boxed{}."),
    ],
)
def test_what_is_asked(data, name, place, expected):
    assert read(data, name)[place].question == expected


def test_other_ways_to_ask(data):
    assert read(data, "mmbench", "mmbench.table=dev_cn")[0].question.endswith("\n请直接回答选项字母。")
    assert read(data, "pope", "pope.suffix=none")[0].question == "Is there a dog in the image?"
    assert len(read(data, "ai2d", "ai2d.mask=no")) == 3
    assert [len(item.pictures) for item in read(data, "scienceqa", "scienceqa.questions=all")] == [1, 0, 1]
    reasoned = read(data, "mmmu", "mmmu.reasoning=yes")[0].question
    assert LETTER not in reasoned and "\\boxed{$LETTER}'" in reasoned
    assert "\\boxed{$FINAL_ANSWER}'" in read(data, "mathvista", "mathvista.reasoning=yes")[0].question
    answer = score(data, "mmmu", lambda item: f"A or B?\nAnswer: \\boxed{{{right(item)}}}", "mmmu.reasoning=yes")
    assert answer.main == pytest.approx(100)
    examples = read(data, "mmlu")[0].history
    assert [answer for _, answer in examples] == list("ABCDA")
    assert examples[0][0].startswith("There is a single choice question about abstract algebra.")
    assert read(data, "mmlu", "mmlu.examples=0")[0].history == ()


def test_pictures_are_made_as_files(data, tmp_path):
    """Of MMMU the first is twice as large, bilinear; pictures of tables are as they were."""
    one, other = read(data, "mmmu")[0].pictures
    large, plain = Image.open(one.as_file(tmp_path, "a")), Image.open(other.as_file(tmp_path, "b"))
    assert (large.size, plain.size) == ((80, 56), (40, 28))
    small = Image.open(replace(one, enlargement=1).as_file(tmp_path, "c")).convert("RGB")
    assert large.tobytes() == small.resize((80, 56), Image.Resampling.BILINEAR).tobytes()


def test_mixed_scores(data):
    """Each by hand: some questions right, as their metric counts them."""
    assert score(data, "mmbench", lambda item: right(item) if item.id != "1000002" else "C").main == 50
    assert (
        score(data, "mmbench", lambda item: right(item) if item.id != "1000002" else "C").parts[
            "accuracy without rotations"
        ]
        == 100
    )
    chart = score(
        data, "chartqa", lambda item: {"2": "2.08", "three": "3", "5.5%": "0.055", "2004": "1990"}[item.truth]
    )
    assert chart.main == 75 and dict(chart.parts) == {"human": 50, "augmented": 100}
    assert score(data, "textvqa", lambda item: "two").main == 100, "four of ten say so: of nine others at least three"
    mme = score(data, "mme", lambda item: "Yes")
    assert mme.main == 14 * 50 and mme.parts["perception"] == 500, "half of the questions, no picture as a whole"
    hallusion = score(data, "hallusionbench", lambda item: "No")
    assert hallusion.main == pytest.approx(100 * (2 / 3 + 2 / 3 + 1 / 2) / 3), "a question over two figures"
    pope = score(data, "pope", lambda item: "Yes")
    assert pope.main == pytest.approx(100 * 2 * 0.5 / 1.5) and pope.parts["recall"] == 100
    boxes = score(
        data, "refcoco", lambda item: right(item) if item.labels["split"] == "refcoco_val" else "[[0, 0, 9, 9]]"
    )
    assert boxes.main == pytest.approx(100 / 8) and boxes.parts["split/refcoco_val"] == 100
    bare = score(data, "refcoco", lambda item: right(item).strip("<box>[]/"), "refcoco.brackets=optional")
    assert bare.main == 100 and score(data, "refcoco", lambda item: right(item).strip("<box>[]/")).main == 0
    assert score(data, "docvqa", lambda item: "tw" if item.id == "0" else "two").main == pytest.approx(
        100 * (2 / 3 + 1) / 2
    )
    assert score(
        data, "mathvista", lambda item: {"1.2": "about \\boxed{1.24}", "three": "B", "2": "2.6"}[item.truth["answer"]]
    ).main == pytest.approx(200 / 3)
    assert score(data, "mathvision", lambda item: "so it is\nAnswer: \\boxed{12.0}").main == 50
    assert (
        score(data, "mvbench", lambda item: "B. three").main == 100
        and score(data, "mvbench", lambda item: "(A) three").main == 0
    )
    assert score(data, "ocrbench", lambda item: "it is 2").main == 3


def test_frames_of_videos(data):
    items = {item.labels["task"]: item for item in read(data, "mvbench")}
    clip = items["action_sequence"].video
    assert clip is not None and (clip.num_frames, clip.seconds) == (16, (0.4, 2.0))
    assert items["state_change"].video.seconds is None  # pyright: ignore[reportOptionalMemberAccess]
    frames = items["episodic_reasoning"]
    # From 0.4 to 2 seconds at three a second: frames 1 to 6; the middle of each sixteenth.
    assert [int(picture.path[-9:-4]) for picture in frames.pictures if picture.path] == [
        int(1 + 5 / 32 + round(5 / 16 * place)) for place in range(16)
    ]
    assert (
        frames.question.startswith("Frame-1: <image>\nFrame-2: <image>\n") and frames.question.count("<image>") == 16
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mmbench", lambda folder: write_tsv(folder / "MMBench_DEV_EN.tsv", choice_rows(1, index=1_000_007)), "rotates question 7, which is not"),
        ("mmbench", lambda folder: write_tsv(folder / "MMBench_DEV_EN.tsv", choice_rows(1, index="x")), "MMBench_DEV_EN.tsv:2: field 'index': must be a whole"),
        ("hallusionbench", lambda folder: replace_in(folder / "HallusionBench.tsv", "VD_illusion_1_0_0_0", "7"), "tsv:2: field 'index': must say set"),
        ("hallusionbench", lambda folder: replace_in(folder / "HallusionBench.tsv", "Yes", "1"), "tsv:2: field 'answer': must be Yes or No"),
        ("mme", lambda folder: shutil.rmtree(folder / "OCR"), "OCR: no such folder; MME has one for each"),
        ("mme", lambda folder: (folder / "count/0001.txt").write_text("Is it?\tYes\nIs it? Yes\n"), "count/0001.txt:2: must be a question, a tab"),
        ("mme", lambda folder: (folder / "count/0002.txt").write_text("Is it?\tYes\n"), "count/0002.txt: there is no picture of that name"),
        ("pope", lambda folder: write_json_lines(folder / "coco_pope_random.json", [{"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "x", "label": "maybe"}]), "random.json:1: field 'label': must be yes or no"),
        ("pope", lambda folder: (folder / "val2014/COCO_val2014_1.jpg").unlink(), "field 'image': .*COCO_val2014_1.jpg: No such file"),
        ("refcoco", lambda folder: replace_in(folder / "refcoco_val.jsonl", "20.5", '"x"'), "refcoco_val.jsonl:1: field 'bbox': must be four numbers"),
        ("refcoco", lambda folder: replace_in(folder / "refcoco_val.jsonl", "coco/train2014", "../data/refcoco"), "refcoco_val.jsonl:1: field 'image'"),
        ("gsm8k", lambda folder: write_json_lines(folder / "test.jsonl", [{"question": "x", "answer": "7"}]), "test.jsonl:1: field 'answer': must end with"),
        ("mvbench", lambda folder: replace_in(folder / "json/state_change.json", "1.mp4", "2.mp4"), "state_change.json: record 1: field 'video'.*2.mp4"),
        ("mvbench", lambda folder: replace_in(folder / "json/state_change.json", '"answer": "three"', '"answer": "four"'), "must be one of the candidates"),
        ("docvqa", lambda folder: replace_in(folder / "val_v1.0_withQT.json", '"answers"', '"answer"'), "record 1: field 'answers': is not there"),
        ("chartqa", lambda folder: (folder / "test/test_human.json").unlink(), "test_human.json: No such file"),
        ("ocrbench", lambda folder: shutil.rmtree(folder / "data"), "test-\\*.parquet: no such files; docs/evaluation.md"),
        ("mmmu", lambda folder: shutil.copy(folder.parent / "ocrbench/data/test-00000-of-00001.parquet", folder / "Art/validation-00000-of-00001.parquet"), "has no column 'id'"),
    ],
)  # fmt: skip
def test_wrong_files(data, tmp_path, name, change, message):
    for needed in {name, "ocrbench"}:
        shutil.copytree(data / needed, tmp_path / needed)
    change(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read(tmp_path, name)


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_labels_and_parts_are_json(data):
    for name in BENCHMARKS:
        json.dumps([[item.truth, dict(item.labels)] for item in read(data, name)])
        json.dumps(dict(score(data, name, right).parts))
