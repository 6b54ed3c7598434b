"""Samples of a step as they are shown: what is trained on is marked, pictures are those of the files."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from internvl_megatron.watching.boards import TENSORBOARD_FOLDER, TensorBoard
from internvl_megatron.watching.shown_samples import MOST_SAMPLES, shown_samples

TEXTS = ["how many are there?", "*three* <b> & ⟦more⟧"]


@pytest.fixture
def row(tmp_path):
    """A row of a question about two pictures, one lost, and of texts; the settings and the tokenizer."""
    colours = np.zeros((28, 56, 3), dtype=np.uint8)
    colours[:, :28], colours[:, 28:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(colours).save(tmp_path / "wide.png")
    Image.fromarray(colours).save(tmp_path / "lost.png")
    talk = [{"from": "human", "value": "<image>\n<image>\nhow many?"}, {"from": "gpt", "value": "two pictures"}]
    words = [{"from": "human", "value": TEXTS[0]}, {"from": "gpt", "value": TEXTS[1]}]
    (tmp_path / "pictures.jsonl").write_text(json.dumps({"image": ["wide.png", "lost.png"], "conversations": talk}))
    (tmp_path / "texts.jsonl").write_text("\n".join([json.dumps({"conversations": words})] * 3))
    entry = {"root": "", "data_augment": False, "repeat_time": 1}
    names = ("pictures", "texts")
    (tmp_path / "meta.json").write_text(json.dumps({n: {**entry, "annotation": f"{n}.jsonl"} for n in names}))
    train_small_tokenizer(["how many pictures? two three more"], vocab_size=320).save_pretrained(tmp_path / "tokens")
    overrides = [f"data.meta={tmp_path / 'meta.json'}", "data.tokens_per_row=500", "data.tiles_per_row=100"]
    config = apply_overrides(find_recipe("demo_digits"), overrides)
    settings, tokenizer = SampleSettings.of_run(config), load_tokenizer(str(tmp_path / "tokens"))
    stream = SampleStream(load_datasets(tmp_path / "meta.json"), settings, tokenizer, 0, 1)
    rows = (stream.next_row() for _ in range(100))
    made = next(row for row in rows if len({source.dataset for source in row.sources[:MOST_SAMPLES]}) == 2)
    assert made.num_samples > MOST_SAMPLES
    (tmp_path / "lost.png").unlink()
    return made, settings, tokenizer


def test_what_is_trained_on_is_marked_and_pictures_are_those_of_the_files(row):
    made, settings, tokenizer = row
    shown = shown_samples(made, ["pictures", "texts"], settings, tokenizer)
    assert len(shown) == MOST_SAMPLES
    names = [one.text.split(",")[0] for one in shown]
    assert set(names) == {"pictures", "texts"}
    for number, (name, one) in enumerate(zip(names, shown, strict=True)):
        facts, _, text = one.text.partition("\n\n")
        first, end = made.sample_bounds[number : number + 2]
        num_trained = int((made.targets[first:end] != -100).sum())
        assert f"{end - first} tokens, {num_trained} trained on, weight {num_trained**0.5:.4g}" in facts
        answer = TEXTS[1] if name == "texts" else "two pictures"
        assert text.endswith(f"⟦{answer}<|im_end|>⟧\n")
        assert text.index("how many") < text.index("⟦"), "the question is not trained on"
        if name == "texts":
            assert not one.pictures
            continue
        assert "lost.png" in facts, "says what is wrong"
        counts = [int(count) for count in re.findall(r"\[(\d+) image tokens\]", text)]
        assert counts == [made.images[0].num_tiles * settings.tokens_per_tile] * 2, "both are of the same size"
        (picture,) = one.pictures
        left, right = picture[:, : picture.shape[1] // 3], picture[:, -picture.shape[1] // 3 :]
        assert left[..., 0].mean() > 200 > 50 > left[..., 2].mean()
        assert right[..., 2].mean() > 200 > 50 > right[..., 0].mean()


def test_tensorboard_has_them(row, tmp_path):
    made, settings, tokenizer = row
    shown = shown_samples(made, ["pictures", "texts"], settings, tokenizer)
    board = TensorBoard(tmp_path, 0)
    board.show_samples(7, shown)
    board.close()
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    for number, one in enumerate(shown):
        (event,) = events.Tensors(f"samples/{number}/text/text_summary")
        (stored,) = event.tensor_proto.string_val
        assert event.step == 7
        assert [line.removeprefix("    ") for line in stored.decode().split("\n")] == one.text.splitlines()
        assert all(line.startswith("    ") for line in stored.decode().split("\n")), "all of it is code"
        for place, picture in enumerate(one.pictures):
            (image,) = events.Images(f"samples/{number}/picture_{place}")
            assert (image.height, image.width) == picture.shape[:2]
