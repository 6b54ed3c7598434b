"""Video records: which frames are taken, how they stand in the text, and everything that is no video."""

import shutil
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.data.files import FileError
from internvl_megatron.data.images import ImageRef, decode_tiles
from internvl_megatron.data.meta import DatasetEntry
from internvl_megatron.data.positions import STRIDES
from internvl_megatron.data.records import SampleError, parse_record, render_sample
from internvl_megatron.data.row_bytes import row_to_bytes, rows_from_bytes
from internvl_megatron.data.rows import SampleSource, build_row
from internvl_megatron.data.step_rows import StepRows, assign_images
from internvl_megatron.data.stream import SampleStream
from internvl_megatron.data.video import VideoFrames, choose_frames
from tests.support.videos import frame_number, write_sound, write_video

EVEN = [k / 25 for k in range(80)]
UNEVEN = [k / 50 if k < 40 else 0.8 + (k - 40) / 5 for k in range(80)]
"""Seconds: 50 frames a second at first, then 5."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of good and bad videos, each written once."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "even.mp4", EVEN, options={"g": "12"})
    write_video(folder / "uneven.mp4", UNEVEN, options={"g": "12"})
    write_video(folder / "uneven.mkv", UNEVEN, options={"g": "12"})
    write_video(folder / "late.ts", [k + 7 for k in EVEN], options={"g": "12"})
    write_video(
        folder / "old.avi", EVEN, codec="mpeg4", options={"bf": "2", "qmin": "1", "qmax": "1"}, unit=Fraction(1, 25)
    )
    write_video(folder / "web.webm", EVEN, codec="libvpx-vp9", options={"cpu-used": "8"})
    write_video(folder / "short.mp4", EVEN[:3])
    write_sound(folder / "sound.mp4")
    whole = (folder / "even.mp4").read_bytes()
    (folder / "no_end.mp4").write_bytes(whole[: len(whole) // 2])  # the table of frames is behind them
    write_video(folder / "table_first.mp4", EVEN, options={"movflags": "faststart"})
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:3,\nfile://{folder}/even.mp4\n#EXT-X-ENDLIST\n")
    (folder / "concat.mp4").write_text("ffconcat version 1.0\nfile even.mp4\n")
    return folder


def decoded_numbers(path, count, seed, clip=None):
    ref = ImageRef(str(path), (1, 1), count, None, "a.jsonl:7", VideoFrames(seed, clip))
    tiles = decode_tiles(ref, 28, True)
    assert tiles.shape == (count, 3, 28, 28) and tiles.dtype == np.uint8
    return [frame_number(tile.mean()) for tile in tiles]


def test_one_frame_of_each_equal_segment():
    """Against segments cut with whole numbers, and all frames of a segment are as likely as each other."""
    for total, count in [(80, 8), (80, 32), (33, 32), (1000, 9), (32, 32)]:
        for seed in range(20):
            chosen = choose_frames(total, count, seed)
            assert len(chosen) == count
            for place, frame in enumerate(chosen):
                assert total * place // count <= frame < total * (place + 1) // count
    for total, count in [(1, 8), (5, 8), (7, 8)]:
        assert choose_frames(total, count, 3) == [min(place, total - 1) for place in range(count)]
    seen = Counter(choose_frames(40, 8, seed)[3] for seed in range(2000))
    assert sorted(seen) == [15, 16, 17, 18, 19]
    assert all(330 < number < 470 for number in seen.values()), "5 standard deviations around 400"


def test_without_a_seed_frames_are_those_of_upstreams_evaluations():
    """`get_index` of InternVL's README and VLMEvalKit's MVBench, which leave the last frame out; short videos have all frames."""
    for total, count in [(80, 8), (33, 32), (1000, 16), (17, 16), (9, 1)]:
        seg = float(total - 1) / count
        assert choose_frames(total, count, None) == [int(seg / 2 + np.round(seg * place)) for place in range(count)]
    assert choose_frames(3, 5, None) == [0, 1, 2, 2, 2]
    assert choose_frames(4, 4, None) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["even.mp4", "uneven.mp4", "uneven.mkv", "late.ts", "old.avi", "web.webm"])
def test_frames_are_those_chosen_whatever_the_container(videos, name):
    """Also with frames of different lengths, with B-frames, and where times do not begin at 0."""
    for seed in (0, 1):
        assert decoded_numbers(videos / name, 11, seed) == choose_frames(80, 11, seed)
    assert decoded_numbers(videos / name, 80, 5) == list(range(80))


def test_the_last_frame_is_repeated_in_a_short_video(videos):
    assert decoded_numbers(videos / "short.mp4", 8, 0) == [0, 1, 2, 2, 2, 2, 2, 2]


def test_long_stretches_between_frames_are_not_decoded(videos, monkeypatch):
    """Frames of groups of 12: with 3 of 80 wanted, at most 3 groups and a frame of the next are decoded."""
    from internvl_megatron.data import video

    seen = []
    monkeypatch.setattr(video, "_time", lambda frame, time=video._time: seen.append(frame.pts) or time(frame))
    decoded_numbers(videos / "even.mp4", 3, 1)
    assert len(set(seen)) <= 3 * 13


@pytest.mark.parametrize("name", ["even.mp4", "uneven.mp4", "uneven.mkv", "late.ts"])
@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.5, 1.25), (1.0, 2.0), (1.01, 1.99), (2.0, 99.0)])
def test_clips_are_cut_by_time(videos, name, clip):
    """From the frame on the screen at the start to the last that begins before the end."""
    times = UNEVEN if "uneven" in name else EVEN
    first = max(k for k, time in enumerate(times) if time <= clip[0] + 1e-6)
    inside = [k for k, time in enumerate(times) if k >= first and time < clip[1] - 1e-6]
    expected = [inside[place] for place in choose_frames(len(inside), 9, 4)]
    assert decoded_numbers(videos / name, 9, 4, clip) == expected


BROKEN = {
    "empty.mp4": ("video", "cannot be read"),
    "text.mp4": ("video", "cannot be read"),
    "no_end.mp4": ("video", "cannot be read"),
    "sound.mp4": ("video", "has no pictures"),
    "list.mp4": ("video", "cannot be read"),
    "concat.mp4": ("video", "cannot be read"),
    "none.mp4": ("missing", "file not found"),
}


@pytest.fixture
def render(videos, make_settings, small):
    def make(raw, augment=False, root=videos, **changes):
        settings = make_settings(**{"tokens_per_row": 2048, "tiles_per_row": 40, **changes})
        record = parse_record(raw, "a.jsonl:7", DatasetEntry("films", root, Path("a"), 1, augment, None), 4)
        return render_sample(record, settings, small, lambda image: np.random.default_rng((3, image)))

    return make


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_video_is_said_when_the_record_is_made(render, talk, name):
    with pytest.raises(SampleError, match=rf"^a\.jsonl:7: field 'video': .*{name}: {BROKEN[name][1]}") as caught:
        render({**talk("?", "x"), "video": name})
    assert caught.value.kind == BROKEN[name][0]


def test_a_clip_behind_the_end_is_said_when_the_record_is_made(render, talk):
    with pytest.raises(SampleError, match=r"field 'video': .*even\.mp4: field 'clip': starts at 9 seconds") as caught:
        render({**talk("?", "x"), "video": "even.mp4", "clip": [9, 10]})
    assert caught.value.kind == "video"


def test_large_frames_are_refused(render, talk, monkeypatch):
    monkeypatch.setattr("internvl_megatron.data.records.MAX_IMAGE_PIXELS", 64 * 48 - 1)
    with pytest.raises(SampleError, match=r"even\.mp4: frames of 64x48 are over 3071 pixels") as caught:
        render({**talk("?", "x"), "video": "even.mp4"})
    assert caught.value.kind == "pixels"


@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
def test_a_video_whose_end_is_gone_is_found_when_decoded(videos, tmp_path, share):
    whole = (videos / "table_first.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FileError, match=r"^a\.jsonl:7: field 'video': video .*cut\.mp4: ") as caught:
        decoded_numbers(tmp_path / "cut.mp4", 8, 0)
    assert caught.value.fault == "video"


def test_frames_stand_line_by_line_in_the_first_human_turn(render, talk, small):
    record = talk("what happens?", "a lot", "and then?", "more")
    record["conversations"].insert(0, {"from": "system", "value": "look"})
    sample = render({**record, "video": "even.mp4"}, system_prompt=None)
    (ref,) = sample.images
    count = ref.num_tiles
    assert 8 <= count <= 32 and ref.grid == (1, 1) and sample.num_tiles == count
    picture = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    frames = "\n".join(f"Frame-{k}: {picture}" for k in range(1, count + 1))
    text = (
        f"<|im_start|>system\nlook<|im_end|>\n<|im_start|>user\n{frames}\nwhat happens?<|im_end|>\n"
        "<|im_start|>assistant\na lot<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n"
        "<|im_start|>assistant\nmore<|im_end|>\n"
    )
    assert small.decode(sample.token_ids.tolist()) == text
    context = np.flatnonzero(sample.token_ids == small.image_context_id)
    assert context.tolist() == [start + k for start in sample.tile_starts for k in range(4)]
    assert sample.image_starts.tolist() == [context[0]]
    trained = sample.token_ids[sample.labels != -100]
    assert small.decode(trained.tolist()) == "a lot<|im_end|>more<|im_end|>"


def test_a_placeholder_says_where_the_frames_go(render, talk, small):
    sample = render({**talk("before <video>\nafter", "x"), "video": "short.mp4"})
    text = small.decode(sample.token_ids.tolist(), skip_special_tokens=False).replace("<IMG_CONTEXT>", "")
    count = sample.num_tiles
    assert "before Frame-1: <img></img>\nFrame-2: <img></img>\n" in text
    assert f"Frame-{count}: <img></img>\nafter" in text and text.count("Frame-") == count


@pytest.mark.parametrize(
    ("text", "found"), [("<video> <video>", "2 <video>"), ("<video><image>", "<image> in the human")]
)
def test_wrong_placeholders(render, talk, text, found):
    with pytest.raises(SampleError, match=found) as caught:
        render({**talk(text, "x"), "video": "short.mp4"})
    assert caught.value.kind == "placeholders"


def test_number_and_choice_of_frames_depend_on_the_seed_alone(videos, make_settings, small, talk):
    settings = make_settings(tokens_per_row=2048, tiles_per_row=40)
    entry = DatasetEntry("films", videos, Path("a"), 1, True, None)
    record = parse_record({**talk("?", "x"), "video": "even.mp4"}, "a.jsonl:7", entry, 4)

    def sample(seed):
        return render_sample(record, settings, small, lambda image: np.random.default_rng((seed, image)))

    refs = [sample(seed).images[0] for seed in range(300)]
    assert {ref.num_tiles for ref in refs} == set(range(8, 33)), "all numbers, both ends included"
    assert len({ref.video and ref.video.seed for ref in refs}) == len({ref.jpeg_seed for ref in refs}) == 300
    again = sample(5).images[0]
    assert again == refs[5]
    assert (decode_tiles(again, 28, True) == decode_tiles(refs[5], 28, True)).all()
    few = render_sample(
        record, make_settings(min_video_frames=3, max_video_frames=3), small, lambda image: np.random.default_rng(1)
    )
    assert few.num_tiles == 3


def test_every_frame_draws_a_position_step(render, talk):
    sample = render({**talk("?", "x"), "video": "even.mp4"}, v2pe="random")
    steps = [int(sample.positions[start + 1] - sample.positions[start]) for start in sample.tile_starts]
    assert len(set(steps)) > 2 and set(steps) <= set(STRIDES)


def test_every_frame_is_compressed_at_full_size_before_it_is_resized(tmp_path):
    """As InternVL's transform has it for images that are not cut; here a folder of one noisy frame."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    noise.save(tmp_path / "1.png")

    def expected(quality):
        noise.save(tmp_path / "q.jpg", quality=quality)
        resized = Image.open(tmp_path / "q.jpg").convert("RGB").resize((28, 28), Image.Resampling.BICUBIC)
        return np.asarray(resized).transpose(2, 0, 1)

    by_quality = {quality: expected(quality) for quality in range(75, 101)}
    ref = ImageRef(str(tmp_path), (1, 1), 12, 9, "", VideoFrames(0, None, ("1.png",) * 12))
    found = [{q for q, tile in by_quality.items() if (tile == made).all()} for made in decode_tiles(ref, 28, True)]
    assert all(found) and len({min(qualities) for qualities in found}) > 4, "each frame draws its own quality"


def test_a_folder_of_frames(render, talk, tmp_path):
    """Numbers in names count as numbers, and other files are no frames."""
    for number in range(40):
        Image.new("RGB", (30, 20), (3 * number,) * 3).save(tmp_path / f"f{number + 1}.jpg", quality=100)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden.jpg").write_text("")
    for name in (".", "./"):
        sample = render({**talk("?", "x"), "video": name}, root=tmp_path)
        (ref,) = sample.images
        numbers = [frame_number(tile.mean()) for tile in decode_tiles(ref, 28, True)]
        assert numbers == choose_frames(40, ref.num_tiles, ref.video.seed)
    with pytest.raises(SampleError, match="frames in a folder have no times"):
        render({**talk("?", "x"), "video": ".", "clip": [0, 1]}, root=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SampleError, match=r"empty: has no \.jpg, .* files") as caught:
        render({**talk("?", "x"), "video": "empty"}, root=tmp_path)
    assert caught.value.kind == "video"
    (tmp_path / ref.video.files[2]).write_bytes(b"broken")
    with pytest.raises(FileError, match=rf"^a\.jsonl:7: field 'video': image .*{ref.video.files[2]}: cannot be read"):
        decode_tiles(ref, 28, True)


def test_frames_cut_off_a_sample_make_it_bad(render, talk):
    with pytest.raises(SampleError) as caught:
        render({**talk("?", "x"), "video": "even.mp4"}, tokens_per_row=100)
    assert caught.value.kind == "truncated image"
    with pytest.raises(SampleError, match="max_video_frames") as caught:
        render({**talk("?", "x"), "video": "even.mp4"}, tiles_per_row=7)
    assert caught.value.kind == "tiles"


def test_a_video_travels_between_ranks_and_is_decoded_by_one(render, talk, make_settings, data_folder, videos):
    settings = make_settings(tokens_per_row=2048, tiles_per_row=99)
    picture = data_folder.image("a.png", 60, 30)
    shutil.copy(data_folder.folder / picture, videos)
    first = render({**talk("?", "x"), "image": picture})
    film = render({**talk("?", "x"), "video": "even.mp4", "clip": [0.5, 2]})
    row = build_row([(SampleSource(0, k, k), sample) for k, sample in enumerate((first, film))], settings, 0)
    assert row.tile_starts.tolist() == [
        *first.tile_starts, *(film.tile_starts + len(first.token_ids))
    ]  # fmt: skip
    (sent,) = rows_from_bytes(row_to_bytes(0, row)).values()
    assert sent.images == row.images and sent.images[1].video == VideoFrames(film.images[0].video.seed, (0.5, 2.0))
    assert row_to_bytes(0, sent) == row_to_bytes(0, row)
    owners = assign_images([sent], 3)
    assert owners[0][0] != owners[0][1]
    ranks = [StepRows([sent], [0], settings, rank, 3).tiles() for rank in range(3)]
    (tiles,) = [rank.tiles[0, 1] for rank in ranks if (0, 1) in rank.tiles]
    assert len(tiles) == film.num_tiles
    assert (
        sent.without_samples_of_images({1}).weights[: len(first.token_ids)] == row.weights[: len(first.token_ids)]
    ).all()
    assert not sent.without_samples_of_images({1}).weights[len(first.token_ids) :].any()


def test_videos_of_a_stream(data_folder, videos, make_settings, small, talk):
    """Good ones are there with all their frames, bad ones are counted; a row is the same when made again."""
    from internvl_megatron.data.dataset import load_datasets

    records = [{**talk("?", "x"), "video": name} for name in ("even.mp4", "uneven.mkv", *BROKEN)]
    meta = data_folder.dataset("films", records, root=str(videos))
    streams = [
        SampleStream(
            load_datasets(meta), make_settings(tokens_per_row=512, tiles_per_row=40, on_bad_sample="skip"), small, 0, 1
        )
        for _ in range(2)
    ]
    rows = [[stream.next_row() for _ in range(6)] for stream in streams]
    assert [row_to_bytes(0, row) for row in rows[0]] == [row_to_bytes(0, row) for row in rows[1]]
    assert set(streams[0].skipped) == {"video", "missing"}
    for row in rows[0]:
        context = np.flatnonzero(row.token_ids == small.image_context_id)
        assert context.tolist() == [start + k for start in row.tile_starts for k in range(4)]
        step = StepRows([row], [0], make_settings(), 0, 1).tiles()
        assert not step.failed and sum(map(len, step.tiles.values())) == row.num_tiles


def test_without_pyav_the_error_says_what_to_install(videos, tmp_path):
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from internvl_megatron.data.video import check_video\n"
        "from internvl_megatron.errors import ConfigError\n"
        "try: check_video(sys.argv[1], None, 10**6)\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(videos / "even.mp4")], capture_output=True, text=True, check=True
    )
    assert "pip install 'internvl_megatron[video]'" in done.stdout


def test_runs_without_videos_do_not_import_pyav():
    code = "import sys, internvl_megatron.data.loader; sys.exit(any(name in sys.modules for name in ('av', 'fsspec')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
