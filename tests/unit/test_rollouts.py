"""Files of questions and of answers: what is wrong is said, and a file that was cut off goes on where it was whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.errors import ConfigError, DataError
from internvl_megatron.inference.prompt import Prompt
from tools.rollouts import Job, Part, open_journal, read_answers, read_questions, seeded

GOOD: dict[str, Any] = {"id": "a", "image": "one.png", "question": "<image>\nhow many?", "answer": "3"}
SETTINGS = {"seed": 0, "temperature": 0.7}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_questions_are_read(tmp_path: Path) -> None:
    several = {"image": ["a.png", "b.png"], "question": "which?", "response": "the first"}
    path = write(tmp_path / "q.jsonl", GOOD, several, {"id": 7, "question": "why?"})
    one, two, three = read_questions(path, tmp_path / "images")
    assert one.prompt == Prompt(GOOD["question"], (str(tmp_path / "images" / "one.png"),))
    assert (one.id, one.truth, one.response, one.text_without_images) == ("a", "3", None, "how many?")
    assert (two.id, two.truth, two.response, len(two.paths)) == ("2", None, "the first", 2)
    assert (three.id, three.paths, three.image) == ("7", (), None)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**GOOD, "question": ""}, "field 'question': must be a string"),
        ({**GOOD, "answer": 3}, "field 'answer': must be a string"),
        ({**GOOD, "response": " "}, "field 'response': must be a string"),
        ({**GOOD, "id": None}, "field 'id': must be"),
        ({**GOOD, "id": True}, "field 'id': must be"),
        ({**GOOD, "image": {"a": 1}}, "field 'image': must be"),
        ({**GOOD, "image": ["a.png", "b.png"]}, "has 1 <image>, but field 'image' has 2"),
        ({**GOOD, "id": "first"}, "'first' is taken by"),
        ("[1]", "must be one object"),
    ],
)
def test_wrong_questions_name_the_field(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "q.jsonl", {**GOOD, "id": "first"}, record)
    with pytest.raises(DataError, match=r"q\.jsonl:2: ") as raised:
        read_questions(path, tmp_path)
    assert message in str(raised.value)


def test_no_questions_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such questions file"):
        read_questions(tmp_path / "none.jsonl", tmp_path)


def test_a_cut_off_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    with open_journal(path, SETTINGS) as journal:
        journal.add("a", ["x\ny", "é\udc00"])
        journal.add("b", [])
    whole = path.read_bytes()
    for cut in range(0, len(whole), 3):
        path.write_bytes(whole[:cut])
        with open_journal(path, SETTINGS) as journal:
            missing = [identity for identity in ("a", "b") if identity not in journal.done]
            for identity in missing:
                journal.add(identity, ["x\ny", "é\udc00"] if identity == "a" else [])
        assert path.read_bytes() == whole
    assert read_answers(path) == {"a": ["x\ny", "é\udc00"], "b": []}


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open_journal(path, SETTINGS):
        pass
    with (
        pytest.raises(ConfigError, match=r"temperature was 0\.7, is 1"),
        open_journal(path, {**SETTINGS, "temperature": 1}),
    ):
        pass


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with (
        open_journal(path, SETTINGS),
        pytest.raises(ConfigError, match="another process"),
        open_journal(path, SETTINGS),
    ):
        pass


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"answers": []}, "field 'id'"),
        ({"id": "a", "answers": "x"}, "field 'answers'"),
        ({"id": "a", "answers": [1]}, "field 'answers'"),
        ({"id": "first", "answers": []}, "is there twice"),
    ],
)
def test_wrong_answers_name_the_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"id": "first", "answers": ["x"]}, line)
    with pytest.raises(DataError, match=r"a\.jsonl:2: ") as raised:
        read_answers(path)
    assert message in str(raised.value)


def test_draws_depend_on_the_question_alone() -> None:
    one, two = (Job(name, "", (Prompt("x"), Prompt("y")), 3) for name in ("one", "two"))
    seeds = [prompt.seed for job in (one, two) for prompt in seeded(job)]
    assert len(set(seeds)) == 12 and None not in seeds
    assert [prompt.question for prompt in seeded(one)] == ["x"] * 3 + ["y"] * 3
    more = Job("one", "elsewhere", (Prompt("x"),), 5)
    assert [prompt.seed for prompt in seeded(more)][:3] == seeds[:3]


@pytest.mark.parametrize("text", ["8/8", "1", "-1/2", "a/b", "0/0"])
def test_wrong_parts(text: str) -> None:
    with pytest.raises(ConfigError, match="must be I/N"):
        Part.parse(text)


def test_parts() -> None:
    assert Part.parse("3/8") == Part(3, 8)


@pytest.mark.parametrize(
    ("content", "error"), [(b"not json\n", DataError), (b'{"id": "a", "answers": []}\n', ConfigError)]
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes, error: type[Exception]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(error, match=r"a\.jsonl"), open_journal(path, SETTINGS):
        pass
    assert path.read_bytes() == content
