"""From a jsonl record to a sample, and every way a record can be wrong."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from internvl_megatron.config.schema import DataConfig
from internvl_megatron.data.images import ImageRef, decode_tiles, image_size
from internvl_megatron.data.meta import DatasetEntry
from internvl_megatron.data.positions import STRIDES
from internvl_megatron.data.records import SampleError, SampleSettings, parse_record, render_sample
from internvl_megatron.data.rows import SampleSource, build_row
from internvl_megatron.errors import DataError


@pytest.fixture
def render(data_folder, make_settings, small):
    """Render one raw record as line 7 of a file; keywords `augment`, `max_tiles` and settings."""

    def make(raw, augment=False, max_tiles=None, **changes):
        settings = make_settings(**changes)
        entry = DatasetEntry("faces", data_folder.folder, Path("a.jsonl"), 1, augment, max_tiles)
        record = parse_record(raw, "a.jsonl:7", entry, settings.data.max_tiles)
        return render_sample(record, settings, small, lambda image: np.random.default_rng((3, image)))

    return make


def test_one_image(render, data_folder, talk, small):
    name = data_folder.image("wide.png", 90, 30)
    sample = render({**talk("what?", "seven"), "image": name})
    assert sample.images == (ImageRef(str(data_folder.folder / name), (3, 1), 4, None, "a.jsonl:7"),)
    assert sample.num_tiles == 4
    start = int(sample.image_starts[0])
    assert np.flatnonzero(sample.token_ids == small.image_context_id).tolist() == list(range(start, start + 16))
    assert sample.positions.tolist() == [256 * i for i in range(len(sample.token_ids))]
    assert all(array.dtype == np.int32 for array in (sample.token_ids, sample.labels, sample.positions))


def test_text_only_and_empty_image_fields(render, talk):
    plain = render(talk("a", "b"))
    for extra in ({"image": ""}, {"image": []}, {"image": None}, {"image": None, "video": ""}):
        assert render({**talk("a", "b"), **extra}).token_ids.tolist() == plain.token_ids.tolist()
    assert plain.images == () and plain.num_tiles == 0


def test_several_images_share_the_tiles(render, data_folder, talk):
    names = [data_folder.image(f"{i}.png", 120, 30) for i in range(2)]
    record = {**talk("<image><image>?", "x"), "image": names}
    assert [image.grid for image in render(record, max_tiles=8).images] == [(4, 1), (4, 1)]
    assert [image.grid for image in render(record).images] == [(2, 1), (2, 1)]
    assert [image.grid for image in render(record, max_tiles=1).images] == [(1, 1), (1, 1)]


def test_data_set_overrides_max_tiles(render, data_folder, talk):
    record = {**talk("?", "x"), "image": data_folder.image("a.png", 120, 30)}
    assert render(record).images[0].grid == (4, 1)
    assert render(record, max_tiles=2).images[0].grid == (2, 1)


def test_random_steps_and_augmentation_are_drawn_per_image(render, data_folder, talk, make_settings):
    names = [data_folder.image(f"{i}.png", 30, 30) for i in range(9)]
    record = {**talk("<image>" * 9, "x"), "image": names}
    sample = render(record, augment=True, v2pe="random")
    steps = [int(sample.positions[s + 1] - sample.positions[s]) for s in sample.image_starts]
    assert len(set(steps)) > 2 and set(steps) <= set(STRIDES)
    assert len({image.jpeg_seed for image in sample.images}) == 9
    again = render(record, augment=True, v2pe="random")
    assert again.images == sample.images and again.positions.tolist() == sample.positions.tolist()
    fixed = render(record, v2pe="fixed", v2pe_numerator=64)
    assert {int(fixed.positions[s + 1] - fixed.positions[s]) for s in fixed.image_starts} == {64}
    assert {image.jpeg_seed for image in fixed.images} == {None}


GOOD = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        ({}, "conversation", "field 'conversations' must be a list"),
        ({"conversations": []}, "conversation", "field 'conversations' must be a list"),
        ({"conversations": ["hi"]}, "conversation", r"field 'conversations\[0\]' must be an object"),
        ({"conversations": [{"value": "a"}]}, "conversation", r"field 'conversations\[0\]\.from' must be one of"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "conversation", r"\.from' must be one of"),
        ({"conversations": [GOOD["conversations"][0], {"from": "gpt"}]}, "conversation",
         r"field 'conversations\[1\]\.value' must be a string, not NoneType"),
        ({"conversations": [{"from": "gpt", "value": "\ud800"}]}, "conversation", "half a surrogate pair"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversation", "has no 'gpt' turn"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "image": "x.png"}, "conversation", "has no 'human' turn"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "video": "x.mp4"}, "conversation", "has no 'human' turn"),
        ({"conversations": [*GOOD["conversations"], {"from": "system", "value": "s"}]}, "conversation",
         "a system turn must be the first"),
        ({"conversations": [*GOOD["conversations"], {"from": "pretrain", "value": "s"}]}, "conversation",
         "a pretrain turn must be the only turn"),
        ({"conversations": [{"from": "pretrain", "value": "a"}] * 2}, "conversation", "must be the only turn"),
        ({"conversations": [{"from": "pretrain", "value": ""}]}, "conversation", "has no text"),
        ({**GOOD, "image": 3}, "record", "field 'image' must be a path or a list"),
        ({**GOOD, "image": ["a.png", None]}, "record", "field 'image' must be a path or a list"),
        ({**GOOD, "video": ["a.mp4"]}, "record", "field 'video' must be a path"),
        ({**GOOD, "video": "a.mp4", "clip": [3, 3]}, "record", r"field 'clip' must be \[start, end\] in seconds"),
        ({**GOOD, "video": "a.mp4", "clip": [0, True]}, "record", "field 'clip'"),
        ({**GOOD, "video": "a.mp4", "clip": [0, float("inf")]}, "record", "field 'clip'"),
        ({**GOOD, "video": "a.mp4", "clip": [float("nan"), 1]}, "record", "field 'clip'"),
        ({**GOOD, "video": "a.mp4", "clip": [-1, 1]}, "record", "field 'clip'"),
        ({**GOOD, "video": "a.mp4", "clip": "0-3"}, "record", "field 'clip'"),
        ({**GOOD, "image": "none.png"}, "missing", r"field 'image': image .*none\.png: file not found"),
        ({**GOOD, "video": "none.mp4"}, "missing", r"field 'video': .*none\.mp4: file not found"),
        ({**GOOD, "video": "none/"}, "missing", r"field 'video': .*none/: folder not found"),
        ({**GOOD, "image": "a\0b.png"}, "path", "zero byte"),
        ({**GOOD, "image": "a\ud800.png"}, "path", "half a surrogate pair"),
        ({**GOOD, "image": "."}, "unreadable", "cannot be opened .*is a folder"),
        ({**GOOD, "image": "a/" * 3000}, "unreadable", "cannot be opened .*name too long"),
    ],
)  # fmt: skip
def test_bad_records_are_named(render, raw, kind, message):
    with pytest.raises(SampleError, match=rf"^a\.jsonl:7: .*{message}") as caught:
        render(raw)
    assert caught.value.kind == kind


def test_placeholders_must_match_the_images(render, data_folder, talk):
    name = data_folder.image("a.png", 30, 30)
    with pytest.raises(SampleError, match=r"^a\.jsonl:7: field 'conversations': 1 <image> .* but 2 image") as caught:
        render({**talk("<image>", "x"), "image": [name, name]})
    assert caught.value.kind == "placeholders"


def test_corrupt_header(render, data_folder, talk):
    (data_folder.folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    (data_folder.folder / "bad.txt").write_text("not an image")
    for name in ("bad.png", "bad.txt"):
        with pytest.raises(SampleError, match=rf"^a\.jsonl:7: field 'image': image .*{name}: cannot be read"):
            render({**talk("?", "x"), "image": name})


def test_images_that_would_not_fit_memory_are_refused(data_folder):
    path = data_folder.folder / "bomb.ppm"
    path.write_bytes(b"P6 100000 100000 255\n")
    with pytest.raises(DataError, match=r"bomb\.ppm: "):
        image_size(str(path))


def test_the_limit_on_pixels_is_our_own(data_folder, monkeypatch):
    path = data_folder.folder / data_folder.image("a.png", 40, 30)
    monkeypatch.setattr("internvl_megatron.data.images.MAX_IMAGE_PIXELS", 1200)
    assert image_size(str(path)) == (40, 30)
    monkeypatch.setattr("internvl_megatron.data.images.MAX_IMAGE_PIXELS", 1199)
    with pytest.raises(DataError, match=r"a\.png: 40x30 is over 1199 pixels"):
        image_size(str(path))


def test_formats_that_run_other_programs_are_not_opened(data_folder):
    path = data_folder.folder / "a.eps"
    Image.new("RGB", (20, 20)).save(path)
    with pytest.raises(DataError, match="cannot be read"):
        image_size(str(path))


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg"])
def test_truncated_body_is_found_when_decoded(data_folder, name):
    path = data_folder.folder / data_folder.image(name, 200, 100)
    path.write_bytes(path.read_bytes()[:2000])
    assert image_size(str(path)) == (200, 100)
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(.*truncated"):
        decode_tiles(ImageRef(str(path), (2, 1), 3, None), 28, True)


def odd_images(folder):
    """Images of every mode that Pillow converts in its own way, and with more frames than one."""
    rng = np.random.default_rng(4)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8), "RGBA")
    others = [Image.new("RGB", (30, 20), (k, 0, 0)) for k in range(40)]
    deep = Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    rgb.quantize(16).save(folder / "palette.png", transparency=3)
    alpha.save(folder / "alpha.png")
    alpha.save(folder / "alpha.webp", lossless=True)
    rgb.convert("LA").save(folder / "grey_alpha.png")
    rgb.convert("1").save(folder / "bits.png")
    deep.save(folder / "deep.png")
    deep.save(folder / "deep.tif")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("CMYK").save(folder / "cmyk.tif")
    rgb.save(folder / "turned.jpg", exif=turned)
    rgb.convert("P").save(folder / "frames.gif", save_all=True, append_images=[image.convert("P") for image in others])
    rgb.save(folder / "frames.webp", save_all=True, append_images=others, lossless=True)
    for name in ("frames.png", "frames.tif"):
        rgb.save(folder / name, save_all=True, append_images=others)
    return sorted(path.name for path in folder.iterdir())


def test_odd_images_are_converted_as_upstream_converts_them(tmp_path):
    """`Image.open(...).convert("RGB")` and nothing else: alpha dropped, first frame, EXIF's turn not made."""
    names = odd_images(tmp_path)
    assert len(names) == 14
    for name in names:
        with Image.open(tmp_path / name) as opened:
            expected = np.asarray(opened.convert("RGB").resize((28, 28), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert image_size(str(tmp_path / name)) == (30, 20), name
        made = decode_tiles(ImageRef(str(tmp_path / name), (1, 1), 1, None), 28, True)
        assert (made == expected).all(), name
        assert len(np.unique(made)) > (2 if "bits" not in name else 1), f"{name} is a picture"


def test_of_many_frames_only_the_first_is_read(tmp_path, monkeypatch):
    """A small file may hold frames without number."""
    odd_images(tmp_path)
    read = []
    seek = GifImageFile._seek
    monkeypatch.setattr(
        GifImageFile, "_seek", lambda self, frame, *rest: read.append(frame) or seek(self, frame, *rest)
    )
    decode_tiles(ImageRef(str(tmp_path / "frames.gif"), (1, 1), 1, None), 28, True)
    assert set(read) == {0}


def test_too_many_images_are_not_even_opened(render, talk):
    """Thousands of names in a line must not cost thousands of files."""
    with pytest.raises(SampleError, match="200000 tiles are over tiles_per_row 12") as caught:
        render({**talk("<image>" * 200000, "x"), "image": ["none.png"] * 200000})
    assert caught.value.kind == "tiles"


def test_raw_text_of_a_record(render, data_folder, small):
    """With and without an image; the last token of a sample predicts nothing, whatever follows it in the row."""
    plain = render({"conversations": [{"from": "pretrain", "value": "three digits"}]})
    assert plain.labels.tolist() == plain.token_ids.tolist() == small.encode("three digits")
    name = data_folder.image("a.png", 30, 30)
    seen = render({"conversations": [{"from": "pretrain", "value": "a <image> b"}], "image": name})
    context = [small.image_start_id, *[small.image_context_id] * 4, small.image_end_id]
    assert seen.token_ids.tolist() == [*small.encode("a "), *context, *small.encode(" b")]
    row = build_row([(SampleSource(0, k, k), s) for k, s in enumerate((plain, seen))], make_row_settings(), 0)
    length = len(plain.token_ids)
    assert row.targets[: length - 1].tolist() == plain.token_ids[1:].tolist()
    assert row.targets[length - 1] == -100 and row.weights[length - 1] == 0
    assert row.targets[length + len(seen.token_ids) - 1] == -100


def make_row_settings():
    return SampleSettings(data=DataConfig(tokens_per_row=128), tile_pixels=28, tokens_per_tile=4)


def test_typed_image_tokens_are_refused_where_they_would_be_tokens(render, data_folder, talk):
    record = {**talk("<image> and <IMG_CONTEXT>", "x"), "image": data_folder.image("a.png", 30, 30)}
    assert render(record).num_tiles == 1
    with pytest.raises(SampleError, match=r"^a\.jsonl:7: .*the text spells <IMG_CONTEXT>") as caught:
        render(record, special_tokens_in_text="as_tokens")
    assert caught.value.kind == "special tokens"
    assert render({**record, "conversations": talk("<image> and <img>", "x")["conversations"]},
                  special_tokens_in_text="as_tokens").num_tiles == 1  # fmt: skip


def test_grounding_is_text_with_tokens(render, talk, small):
    sample = render(talk("where is <ref>it</ref>?", "<box>[[1, 2, 3, 4]]</box>"))
    ids = sample.token_ids.tolist()
    assert [ids.count(small.find(name)) for name in ("<ref>", "</ref>", "<box>", "</box>", "<quad>")] == [
        1,
        1,
        1,
        1,
        0,
    ]
    trained = sample.token_ids[sample.labels != -100].tolist()
    assert trained == [small.find("<box>"), *small.encode("[[1, 2, 3, 4]]"), small.find("</box>"), small.turn_end_id]


def test_long_samples(render, talk):
    record = talk("count", "seven " * 50)
    whole = render(record)
    assert len(whole.token_ids) > 40
    cut = render(record, tokens_per_row=40, on_long_sample="truncate")
    for name in ("token_ids", "labels", "positions"):
        assert getattr(cut, name).tolist() == getattr(whole, name).tolist()[:40]
    for policy in ("stop", "skip"):
        with pytest.raises(SampleError, match=r"^a\.jsonl:7: \d+ tokens are over tokens_per_row 40") as caught:
            render(record, tokens_per_row=40, on_long_sample=policy)
        assert caught.value.kind == "long"


def test_truncation_must_leave_images_whole(render, data_folder, talk):
    record = {**talk("<image>", "seven " * 50), "image": data_folder.image("a.png", 30, 30)}
    whole = render(record)
    end = int(whole.image_starts[0]) + 4  # of the closing token
    assert len(render(record, tokens_per_row=end + 1).token_ids) == end + 1
    with pytest.raises(SampleError, match="its images would not be whole") as caught:
        render(record, tokens_per_row=end)
    assert caught.value.kind == "truncated image"


def test_too_many_tiles(render, data_folder, talk):
    record = {**talk("?", "x"), "image": data_folder.image("a.png", 120, 30)}
    assert render(record, tiles_per_row=5).num_tiles == 5
    with pytest.raises(SampleError, match=r"^a\.jsonl:7: 5 tiles are over tiles_per_row 4") as caught:
        render(record, tiles_per_row=4)
    assert caught.value.kind == "tiles"
