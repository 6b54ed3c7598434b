"""The command that shows what training will see: its figures are those of the rows, its page says which tokens are trained on."""

import json
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.recipes import find_recipe
from internvl_megatron.data.dataset import load_datasets
from internvl_megatron.data.mixture import Mixture, dataset_groups
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.rows import SampleSource
from internvl_megatron.data.seeds import Purpose, generator
from internvl_megatron.data.stream import SampleStream, render_source
from internvl_megatron.data.token_texts import token_texts
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.data.tokenizer_build import train_small_tokenizer
from tests.support.sentencepiece_folder import write_folder
from tests.support.videos import write_video
from tools.inspect_data import main
from tools.inspect_rows import spread

OVERRIDES = ("data.tokens_per_row=300", "data.tiles_per_row=12", "rows_per_step=3", "data.packing_pool_samples=8")
HOSTILE = "<script>alert('&amp;')</script> \x1b[31m \u202e </span><img src=x onerror=\"alert(1)\"> 東🙂"
NUM_ROWS = 20
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(["how many are there in the picture? three, two"], vocab_size=320).save_pretrained(folder)
    return str(folder)


def talk(asked, answer):
    return {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}


def write_meta(folder, records, **entries):
    meta = {}
    for name, lines in records.items():
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / f"{name}.jsonl").write_text("".join(text + "\n" for text in texts))
        meta[name] = {"root": "", "annotation": f"{name}.jsonl", "data_augment": False, "repeat_time": 1}
        meta[name] |= entries.get(name, {})
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


@pytest.fixture
def mixed(tmp_path):
    """60 texts, some broken, and 40 records with one to three pictures."""
    rng = np.random.default_rng(3)
    for number, (width, height) in enumerate([(30, 30), (60, 30), (30, 90), (64, 64)]):
        pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    texts: list[object] = [talk("how many?", "three " * int(rng.integers(1, 30))) for _ in range(60)]
    texts[5] = "{broken"
    texts[17] = {**talk("how many?", "two"), "image": "lost.png"}
    pictures = []
    for number in range(40):
        names = [f"{name}.png" for name in rng.integers(0, 4, size=1 + number % 3)]
        pictures.append({**talk("<image>" * len(names) + f"how many {number}?", "two"), "image": names})
    records = {"texts": texts, "pictures": pictures}
    return write_meta(tmp_path, records, texts={"group": "language"}, pictures={"group": "multimodal"})


def run_inspect(meta, tokenizer_folder, *arguments, rows=NUM_ROWS):
    """The report and the page."""
    output = meta.parent / "look"
    common = [str(meta), "--recipe", "demo_digits", "--tokenizer", tokenizer_folder, "--output", str(output)]
    assert main([*common, "--rows", str(rows), *OVERRIDES, *arguments]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["index.html", "report.json"]
    return json.loads((output / "report.json").read_text()), (output / "index.html").read_text(encoding="utf-8")


def training(meta, tokenizer_folder, *overrides):
    """What a run that leaves out broken records is made of."""
    common = ("data.on_bad_sample=skip", "data.max_skipped_share=null")
    config = apply_overrides(find_recipe("demo_digits"), (*OVERRIDES, *common, *overrides))
    return config, load_datasets(meta), load_tokenizer(tokenizer_folder), SampleSettings.of_run(config)


def draws_of(datasets, config, index, counts):
    """What a stream draws, as long as there is one group only: the n-th of `counts` is how many draws precede row n's end."""
    lengths = [dataset.length for dataset in datasets]
    groups = dataset_groups([dataset.entry for dataset in datasets], None)
    mixture = Mixture(lengths, groups, config.data.seed, index, config.rows_per_step)
    made_for = {}
    for row, count in enumerate(counts):
        while len(made_for) < count:
            draw = mixture.draw()
            record, number = datasets[draw.dataset].sample(config.data.seed, draw.epoch, draw.place)
            made_for[SampleSource(draw.dataset, record, number)] = row
    return made_for


def test_figures_are_those_of_the_rows(mixed, tokenizer_folder, capsys):
    report, _ = run_inspect(mixed, tokenizer_folder)
    printed = capsys.readouterr().out
    config, datasets, tokenizer, settings = training(mixed, tokenizer_folder)
    streams = [SampleStream(datasets, settings, tokenizer, slot, 3) for slot in range(2)]
    rows, num_drawn = [], [[], []]
    for number in range(NUM_ROWS):
        rows.append(streams[number % 2].next_row())
        num_drawn[number % 2].append(sum(streams[number % 2].state_dict()["taken"]))
    assert report["rows"] == NUM_ROWS and report["streams"] == 2, "20 rows are more than one stream's share of 16"

    lengths, trained, images, waited = [], [], [], []
    made_for = [draws_of(datasets, config, slot, num_drawn[slot]) for slot in range(2)]
    tokens, samples, image_tokens = Counter(), Counter(), 0
    for number, row in enumerate(rows):
        at = 0
        for source, length in zip(row.sources, row.segment_lengths, strict=False):
            lengths.append(int(length))
            trained.append(int((row.targets[at : at + length] != -100).sum()))
            images.append(int(((row.image_starts >= at) & (row.image_starts < at + length)).sum()))
            image_tokens += int((row.token_ids[at : at + length] == tokenizer.image_context_id).sum())
            waited.append(number // 2 - made_for[number % 2][source])
            name = datasets[source.dataset].entry.name
            tokens[name] += int(length)
            samples[name] += 1
            at += length
    assert report["samples"] == len(lengths) and report["tokens"] == sum(lengths)
    assert report["image_token_share"] == pytest.approx(image_tokens / sum(lengths))
    assert report["supervised_token_share"] == pytest.approx(sum(trained) / sum(lengths))
    expected = {"tokens": lengths, "supervised_tokens": trained, "images": images, "rows_waited": waited}
    for name, values in expected.items():
        found = report["per_sample"][name]
        assert (found["count"], found["least"], found["most"]) == (len(values), min(values), max(values))
        assert found["mean"] == pytest.approx(np.mean(values)) and found["median"] == np.median(values)
        assert sum(found["histogram"]["counts"]) == len(values)
    assert max(waited) > 1 and min(waited) == 0
    tiles = [image.num_tiles for row in rows for image in row.images]
    assert report["per_image"]["tiles"]["mean"] == pytest.approx(np.mean(tiles))
    assert report["per_image"]["tiles"]["count"] == len(tiles) and report["per_video"]["frames"] == {"count": 0}
    assert report["fill"]["tokens_mean"] == pytest.approx(sum(lengths) / NUM_ROWS / 300)
    assert report["fill"]["tokens_least"] == pytest.approx(min(row.num_tokens for row in rows) / 300)
    assert report["fill"]["tiles_mean"] == pytest.approx(sum(tiles) / NUM_ROWS / 12)
    assert report["fill"]["tiles_most"] == pytest.approx(max(row.num_tiles for row in rows) / 12)

    draws = Counter(datasets[source.dataset].entry.name for made in made_for for source in made)
    for name, asked in (("texts", 0.6), ("pictures", 0.4)):
        found = report["datasets"][name]
        assert (found["draws"], found["samples"], found["tokens"]) == (draws[name], samples[name], tokens[name])
        assert found["draw_share_in_group"] == pytest.approx(draws[name] / draws.total())
        assert found["draw_share_in_group_asked"] == pytest.approx(asked)
        assert found["token_share"] == pytest.approx(tokens[name] / tokens.total())
    assert report["groups"] == {}

    skipped = Counter()
    for stream in streams:
        skipped.update(stream.skipped)
    faults = report["faults"]
    assert {kind: fault["count"] for kind, fault in faults.items()} == skipped and set(skipped) == {"json", "missing"}
    assert {one["where"] for one in faults["json"]["first"]} == {f"{mixed.parent}/texts.jsonl:6"}
    assert {one["where"] for one in faults["missing"]["first"]} == {f"{mixed.parent}/texts.jsonl:18"}
    assert f"{len(lengths):,} samples" in printed and "left out, json" in printed


def test_groups_beside_what_they_should_have(mixed, tokenizer_folder):
    weights = "data.group_weights=language=1,multimodal=3"
    report, page = run_inspect(mixed, tokenizer_folder, weights)
    groups = report["groups"]
    assert {name: group["token_share_asked"] for name, group in groups.items()} == {
        "language": 0.25,
        "multimodal": 0.75,
    }
    texts = report["datasets"]["texts"]
    assert groups["language"]["token_share"] == pytest.approx(texts["tokens"] / report["tokens"])
    assert texts["draw_share_in_group_asked"] == texts["draw_share_in_group"] == 1.0
    assert "multimodal" in page


class PageReader(HTMLParser):
    """Checks that elements are nested and collects the samples' tokens."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], Counter(), "", set()
        self.samples = []
        """Of each sample: (class, title, text) of its tokens and chips."""
        self.pictures = Counter()
        self.feed(page)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags[tag] += 1
        self.attributes |= values.keys()
        if tag not in VOID:
            self.open.append(tag)
        if values.get("class") == "sample":
            self.samples.append([])
        if tag == "span" and "title" in values:
            self.samples[-1].append([values["class"], values["title"], ""])
        if tag == "img":
            assert str(values["src"]).startswith("data:image/")
            self.pictures[len(self.samples) - 1] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "span" and self.samples and self.samples[-1]:
            self.samples[-1][-1][2] += data


def test_coloured_are_the_tokens_that_are_trained_on(mixed, tokenizer_folder):
    _, page = run_inspect(mixed, tokenizer_folder, "--samples", "12", "loss.weighting=square")
    read = PageReader(page)
    assert len(read.samples) == 12
    config, datasets, tokenizer, settings = training(mixed, tokenizer_folder)
    streams = [SampleStream(datasets, settings, tokenizer, slot, 3) for slot in range(2)]
    rows = [streams[number % 2].next_row() for number in range(NUM_ROWS)]
    in_order = [[source for row in rows for source in row.sources if source.dataset == number] for number in range(2)]
    shown = [source for pair in zip(*in_order, strict=False) for source in pair][:12]  # data sets take turns
    for number, (tokens, source) in enumerate(zip(read.samples, shown, strict=True)):
        dataset = datasets[source.dataset]

        def rng(image, key=dataset.key, source=source):
            return generator(config.data.seed, Purpose.IMAGE, key, source.record, source.pass_number, image)

        sample = render_source(dataset, source.record, settings, tokenizer, rng)
        trained = int((sample.labels != -100).sum())
        expected, chips = [], 0
        for place, token in enumerate(sample.token_ids.tolist()):
            if token == tokenizer.image_context_id:
                chips += sample.token_ids[place - 1] != token
                continue
            coloured = sample.labels[place] != -100
            weight = trained**-0.5 if coloured else 0
            facts = f"id {token}, position {sample.positions[place] / 256:.10g}, weight {weight:.4g}"
            expected.append(("t s" if coloured else "t u", facts))
        assert [(kind, title) for kind, title, _ in tokens if kind != "chip"] == expected
        folded = [text for kind, _, text in tokens if kind == "chip"]
        assert len(folded) == chips == len(sample.images)
        assert folded == [f"IMG_CONTEXT x {4 * image.num_tiles}" for image in sample.images]
        answer = "".join(text for kind, _, text in tokens if kind == "t s")
        assert answer.endswith("<|im_end|>") and answer[:3] in ("thr", "two")
        assert read.pictures[number] == sample.num_tiles
        assert f"{dataset.file.where(source.record)}" in read.text


def test_text_of_the_data_is_only_text(tmp_path, tokenizer_folder):
    record = {**talk(HOSTILE, HOSTILE), "image": "<b>.png"}
    Image.fromarray(np.zeros((60, 90, 3), dtype=np.uint8)).save(tmp_path / "<b>.png")
    good = [record, record, talk("how many?", HOSTILE)] * 4
    broken = {"conversations": [{"from": HOSTILE, "value": "a"}]}
    meta = write_meta(tmp_path, {"<script>": [*good, *[broken] * 6]})
    report, page = run_inspect(meta, tokenizer_folder, "--samples", "6", "data.tokens_per_row=600", rows=6)
    read = PageReader(page)
    assert set(read.tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "table", "tr", "th", "td", "div", "p", "span", "b", "br",
        "svg", "rect", "text", "figure", "figcaption", "img",
    }  # fmt: skip
    assert not {name for name in read.attributes if name.startswith("on") or name in ("href", "srcset")}
    assert "http" not in page.replace("http-equiv", ""), "nothing is fetched"
    assert "\x1b" not in page
    shown = HOSTILE.replace("\x1b", "\u241b")
    for tokens in read.samples:
        answer = "".join(text for kind, _, text in tokens if kind == "t s").replace("\u00b7", "")
        assert answer == shown + "<|im_end|>"
    assert report["datasets"].keys() == {"<script>"} and report["faults"].keys() == {"conversation"}


def test_frames_of_a_video_are_shown(tmp_path, tokenizer_folder):
    write_video(tmp_path / "film.mp4", [k / 25 for k in range(30)])
    meta = write_meta(tmp_path, {"a": [{**talk("<video>what happens?", "two"), "video": "film.mp4"}] * 4})
    frames = ("data.min_video_frames=3", "data.max_video_frames=5")
    report, page = run_inspect(meta, tokenizer_folder, "--samples", "3", *frames, rows=3)
    read = PageReader(page)
    found = report["per_video"]["frames"]
    assert 3 <= found["least"] <= found["most"] <= 5 and report["per_image"]["tiles"] == {"count": 0}
    for number, tokens in enumerate(read.samples):
        chips = [text for kind, _, text in tokens if kind == "chip"]
        assert chips == ["IMG_CONTEXT x 4"] * read.pictures[number] and 3 <= len(chips) <= 5
        assert f"{len(chips)} frames" in read.text


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, tokenizer_folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    meta = write_meta(tmp_path, {"a": [{**talk("how many?", "two"), "image": "a.png"}] * 4})
    _, page = run_inspect(meta, tokenizer_folder, "--samples", "2", rows=3)
    read = PageReader(page)
    assert read.tags["img"] == 0 and read.text.count("a.png: cannot be read") == 2


def test_padding_of_samples_is_left_out(mixed, tokenizer_folder):
    report, page = run_inspect(mixed, tokenizer_folder, "data.sample_multiple_tokens=20")
    _, datasets, tokenizer, settings = training(mixed, tokenizer_folder, "data.sample_multiple_tokens=20")
    streams = [SampleStream(datasets, settings, tokenizer, slot, 3) for slot in range(2)]
    lengths = []
    for number in range(NUM_ROWS):
        for source in streams[number % 2].next_row().sources:
            rng = lambda image: np.random.default_rng(image)  # noqa: E731
            lengths.append(
                len(render_source(datasets[source.dataset], source.record, settings, tokenizer, rng).token_ids)
            )
    assert report["tokens"] == sum(lengths) and report["per_sample"]["tokens"]["most"] == max(lengths)
    PageReader(page)


def test_spread_of_numbers():
    assert spread([]) == {"count": 0}
    found = spread([3, 3, 4, 9])
    assert found["histogram"]["edges"] == list(range(3, 11))
    assert found["histogram"]["counts"] == [2, 1, 0, 0, 0, 0, 1]
    assert (found["mean"], found["median"], found["least"], found["most"]) == (4.75, 3.5, 3, 9)
    values = np.random.default_rng(1).integers(-50, 4000, size=500).tolist()
    found = spread(values)
    edges = found["histogram"]["edges"]
    assert found["histogram"]["counts"] == [
        sum(low <= value < high for value in values) for low, high in pairwise(edges)
    ]
    assert len(edges) <= 21 and len({high - low for low, high in pairwise(edges)}) == 1


def test_texts_of_tokens(tokenizer_folder, tmp_path):
    write_folder(tmp_path / "prefixed", "control", add_dummy_prefix=True)
    write_folder(tmp_path / "plain", "user_defined", add_dummy_prefix=False)
    tokenizer = load_tokenizer(tokenizer_folder)
    for one in (tokenizer, load_tokenizer(tmp_path / "prefixed"), load_tokenizer(tmp_path / "plain")):
        for text in ("how many are there?", "two  spaces, ä 東🙂👩‍👩‍👧‍👦 e\u0301", HOSTILE):
            ids = one.encode(text)
            texts = token_texts(ids, one)
            assert len(texts) == len(ids)
            assert "".join(texts) in (text, unicodedata.normalize("NFC", text))
    broken = tokenizer.encode("東")[:2]
    assert len(token_texts(broken, tokenizer)) == len(broken), "a character that is cut off"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.max_tile=3"], "data.max_tiles"),
        (["--recipe", "demo_digit"], "demo_digits"),
        (["--tokenizer", "none/here"], "none/here: no such folder"),
        (["rows_per_step=4000"], "too few for 4000 streams"),
    ],
)
def test_wrong_arguments(tmp_path, tokenizer_folder, capsys, change, message):
    meta = write_meta(tmp_path, {"a": [talk("how many?", "two")] * 3})
    common = [
        str(meta),
        "--recipe",
        "demo_digits",
        "--tokenizer",
        tokenizer_folder,
        "--output",
        str(tmp_path / "look"),
    ]
    assert main([*common, *change]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("look/*"))


def test_a_folder_that_cannot_be_written(tmp_path, tokenizer_folder, capsys):
    meta = write_meta(tmp_path, {"a": [talk("how many?", "two")] * 3})
    common = [str(meta), "--recipe", "demo_digits", "--tokenizer", tokenizer_folder]
    assert main([*common, "--output", str(meta)]) == 2
    assert "cannot be made" in capsys.readouterr().err
    (tmp_path / "look" / "index.html").mkdir(parents=True)
    assert main([*common, "--output", str(tmp_path / "look")]) == 2
    assert "index.html: is a folder" in capsys.readouterr().err
    for arguments in (
        [*common],
        [*common, "--output", "x", "--rows", "0"],
        [*common, "--output", "x", "--samples", "-1"],
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
