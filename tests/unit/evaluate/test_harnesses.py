"""Requests of lmms-eval and VLMEvalKit as the engine takes them, and the engine behind VLMEvalKit's interface."""

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.errors import ConfigError, DataError
from internvl_megatron.evaluate import lmms_eval_requests, vlmevalkit_model
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.run import generate_rank
from internvl_megatron.inference.settings import Generation, Sampling
from tests.support.random_chat import write_random_chat
from tests.unit.evaluate import harness_ranks


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Generation(1024)),
        ({"max_new_tokens": 5, "do_sample": False, "temperature": 0.7, "top_p": 0}, Generation(5)),
        ({"until": "\n\n", "temperature": 0, "top_p": None}, Generation(1024, stop_strings=("\n\n",))),
        ({"do_sample": True, "top_p": 0.5}, Generation(1024, sampling=Sampling(1.0, top_p=0.5))),
        ({"temperature": 0.5, "image_aspect_ratio": "pad"}, Generation(1024, sampling=Sampling(0.5))),
    ],
)
def test_generation_settings(options, expected):
    assert lmms_eval_requests.as_generation(options) == expected


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"temperature": "hot"}, {"max_new_tokens": 0}, {"until": [""]}])
def test_wrong_generation_settings_are_refused(options):
    with pytest.raises(ConfigError):
        lmms_eval_requests.as_generation(options)


@pytest.mark.parametrize(
    ("context", "question"),
    [("one <image> or <image>?", "one <image> or <image>?"), ("both?", "<image> <image>\nboth?")],
)
def test_pictures_of_a_context(context, question, tmp_path):
    pictures = [Image.new("RGBA", (5, 4), color) for color in ("red", "blue")]
    prompt = lmms_eval_requests.as_prompt(context, pictures, tmp_path, "here", 40, 8)
    assert (prompt.question, prompt.max_tiles) == (question, 32)
    for path, picture in zip(prompt.images, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(picture)[..., :3])


def test_visuals_that_are_none(tmp_path):
    assert lmms_eval_requests.as_prompt("what?", ["a.mp4"], tmp_path, "here", 12, 8).video == "a.mp4"
    with pytest.raises(DataError, match="here: visual 1 of 1 is a dict"):
        lmms_eval_requests.as_prompt("what?", [{"array": []}], tmp_path, "here", 12, 8)


def test_messages_of_vlmevalkit():
    picture, text = {"type": "image", "value": "a.png"}, {"type": "text", "value": "which?"}
    one = vlmevalkit_model.as_prompt([text, picture], "OCRBench")
    assert (one.question, one.images, one.max_tiles) == ("<image>\nwhich?", ("a.png",), 24)
    two = vlmevalkit_model.as_prompt([picture, picture, text], None)
    assert two.question == "Image-1: <image>\nImage-2: <image>\nwhich?"
    between = vlmevalkit_model.as_prompt([picture, text, picture], None)
    assert between.question == "Image-1: <image>\nImage-2: <image>\n<Image-1>which?<Image-2>"
    with pytest.raises(DataError, match="'video'"):
        vlmevalkit_model.as_prompt([{"type": "video", "value": "a.mp4"}], "MVBench")


@pytest.mark.parallel
def test_vlmevalkit_gets_the_engines_answers(tmp_path, run_ranks):
    write_random_chat(tmp_path / "hf", seed=1)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    messages = [
        [{"type": "text", "value": "how many?"}],
        [{"type": "image", "value": path}, {"type": "text", "value": "which?"}],
    ]
    prompts = [Prompt("how many?"), Prompt("<image>\nwhich?", (path,), max_tiles=6)]
    found = run_ranks(harness_ranks.vlmevalkit_answers, 1, tmp_path / "hf", messages)[0]
    assert found == run_ranks(generate_rank, 1, tmp_path / "hf", prompts, Generation(6), "cpu")[0]
    assert len(set(found)) == 2
