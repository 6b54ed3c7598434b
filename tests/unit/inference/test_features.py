"""Settings of generation and scoring, against transformers and against each other."""

import re

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.errors import ConfigError
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation, Limits
from tests.unit.inference import feature_ranks

pytestmark = pytest.mark.parallel


@pytest.fixture
def pictures(tmp_path):
    made = []
    for number, squares in enumerate((1, 2, 1, 1)):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28 * squares, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        made.append(str(tmp_path / f"{number}.png"))
    return made


@pytest.fixture
def prompts(pictures):
    return [Prompt("how many?"), Prompt("two or three digits?", (pictures[1],)), Prompt("seven " * 9, system="")]


def test_repetition_penalty_equals_transformers(run_ranks, prompts):
    ours, theirs = run_ranks(feature_ranks.penalised, 1, prompts, 1.6, 8)[0]
    plain, _ = run_ranks(feature_ranks.penalised, 1, prompts, 1.0, 8)[0]
    assert ours == theirs
    assert ours != plain


def test_stops_and_streams(run_ranks, prompts):
    seen = run_ranks(feature_ranks.stopped, 1, prompts, 12)[0]
    assert seen.by_id[0].end == "stop"
    for plain, cut in zip(seen.plain, seen.by_id, strict=True):
        ids = list(plain.token_ids)
        end = ids.index(seen.stop_id) + 1 if seen.stop_id in ids else len(ids)
        assert list(cut.token_ids) == ids[:end]
        assert cut.end == ("stop" if seen.stop_id in ids else plain.end)
    hit = [seen.stop_text in answer.text for answer in seen.plain]
    assert any(hit)
    for number, (plain, cut) in enumerate(zip(seen.plain, seen.by_text, strict=True)):
        assert cut.text == plain.text.split(seen.stop_text)[0].rstrip()
        assert "".join(seen.streamed.get(number, [])) == cut.text
        assert (cut.end == "stop") == hit[number]


def test_streamed_prompts_are_taken_when_there_is_room(run_ranks, prompts):
    """Two at a time and one in waiting; the answers are those of a whole call. Two replicas have prompts of their own."""
    for ranks in run_ranks(feature_ranks.one_by_one, 2, prompts, 6):
        assert {number: answer for number, answer, _ in ranks.found} == dict(enumerate(ranks.expected))
        for place, (_, _, num_taken) in enumerate(ranks.found):
            assert num_taken <= place + 2 + 1


def test_tiles_of_a_prompt_can_be_said(run_ranks, tmp_path):
    Image.fromarray(np.zeros((28, 84, 3), np.uint8)).save(tmp_path / "wide.png")
    path = str(tmp_path / "wide.png")
    counts = run_ranks(
        feature_ranks.tiles, 1, [Prompt("x", (path,)), Prompt("x", (path,) * 2), Prompt("x", (path,) * 2, max_tiles=3)]
    )[0]
    assert counts == [[4], [3, 3], [4, 4]], "thumbnails counted; two images share four tiles unless it is said"


def test_a_folder_of_frames_is_its_frames(run_ranks, tmp_path):
    folder = tmp_path / "video"
    folder.mkdir()
    paths = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        paths.append(str(folder / f"{number}.png"))
    video = Prompt("how many?", video=str(folder), num_frames=3)
    frames = Prompt("Frame-1: <image>\nFrame-2: <image>\nFrame-3: <image>\nhow many?", tuple(paths))
    one, other, answer, expected = run_ranks(feature_ranks.video_and_frames, 1, video, frames)[0]
    assert one == other
    assert answer == expected


@pytest.mark.parametrize("with_end", [False, True])
def test_scores_equal_transformers(run_ranks, prompts, with_end):
    texts = [["two", "there are three", "x"], ["seven, two and one", "two"], ["user"]]
    ranks = run_ranks(
        feature_ranks.scored, 4 if with_end else 1, *((2, 2) if with_end else (1, 1)), prompts, texts, with_end
    )
    ours, expected = ranks[0]
    assert all(other == ours for other, _ in ranks)
    for found, wanted in zip((v for own in ours for v in own), (v for own in expected for v in own), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert len({round(sum(values), 3) for own in ours for values in own}) == 6


def test_fewer_answers_are_the_first_of_more(run_ranks, prompts):
    three, five, likely = run_ranks(feature_ranks.nested, 1, prompts)[0]
    assert [own[:3] for own in five] == three
    assert [own[0] for own in five] == likely
    assert len({text for own in five for text in own}) > 8


REFUSED = [
    (
        Prompt("x " * 400),
        4,
        "prompt 2 of 2: [0-9]+ tokens .0 of images. and an answer of 4 take [0-9]+ positions, and the context has 300",
    ),
    (Prompt("x"), 300, "the context has 300"),
    (Prompt("<image> x"), 4, "prompt 2 of 2: 1 <image> in the human turns but 0 image"),
    (Prompt("x", ("a.png",), video="b.mp4"), 4, "images or a video, not both"),
    (Prompt("x", video="no.mp4"), 4, "no.mp4"),
    (Prompt("x", video="no.mp4", num_frames=0), 4, "num_frames must be at least 1"),
]


def test_refused(run_ranks):
    cases = [([Prompt("how many?"), prompt], limit) for prompt, limit, _ in REFUSED]
    for said, (_, _, message) in zip(run_ranks(feature_ranks.refused, 1, cases)[0], REFUSED, strict=True):
        assert re.search(message, said)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="stop_strings"):
        Generation(stop_strings=("a", ""))
    with pytest.raises(ConfigError, match="max_new_tokens"):
        Generation(max_new_tokens=0)
    with pytest.raises(ConfigError, match="cache_tokens"):
        Limits(cache_tokens=0)
