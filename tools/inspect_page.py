"""Figures and samples as one HTML page: no script, no network, nothing of the data but text and small pictures."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from internvl_megatron.data.dataset import Dataset
from internvl_megatron.data.decode_pool import DecodePool
from internvl_megatron.data.files import FileError
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.positions import UNITS_PER_POSITION
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.token_texts import token_texts
from internvl_megatron.data.tokenizer import Tokenizer
from tools.inspect_rows import DrawnSample

SHOWN_PIXELS = 112
"""Longest side of a tile on the page."""
SMALL_PIXELS = 64
"""Tiles up to here are kept as they are."""
PART_OF_CHARACTER = "\u00b7"
"""Stands for a token whose character is shown with the token before."""
MOST_TOKENS, MOST_TILES = 4096, 60
"""Of a sample on the page."""

_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>%s</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin-top: 2em } .note { color: #666 }
table { border-collapse: collapse } td, th { border-bottom: 1px solid #ddd; padding: .2em .8em; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bars { display: inline-block; margin: 0 1.5em 1em 0; vertical-align: top } .bars rect { fill: #5b8cc0 }
.sample { border: 1px solid #ccc; border-radius: 6px; margin: 1em 0; padding: .8em 1em }
.text { font: 13px/1.7 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap }
.t { box-shadow: inset 1px 0 #0002; unicode-bidi: isolate } .t:hover { outline: 1px solid #333 }
.u { color: #8a8a8a } .s { background: #c9ecd0; color: #0b3d17 }
.chip { background: #dfe6f5; border-radius: 9px; color: #33508c; padding: 0 .6em }
figure { display: inline-block; margin: .5em 1.5em .5em 0; vertical-align: top } figcaption { color: #666; font-size: 12px }
.tiles { display: inline-grid; gap: 2px; vertical-align: top } .thumbnail { margin-left: 12px; vertical-align: top }
img { display: block; min-width: 56px } .bad { color: #a11 }
</style></head><body>
"""


def make_page(
    report: Mapping[str, Any],
    shown: Sequence[DrawnSample],
    datasets: Sequence[Dataset],
    settings: SampleSettings,
    tokenizer: Tokenizer,
    decoder: DecodePool,
) -> str:
    """The page of a report and of some samples, whose images are decoded."""
    title = escape(f"Rows of {report['meta']}")
    parts = [_HEAD % title, f"<h1>{title}</h1>", *_overview(report), *_mixture(report), *_faults(report)]
    parts.append("<h2>Spread</h2>")
    for section in ("per_sample", "per_image", "per_video", "per_row"):
        for name, values in report[section].items():
            parts.append(bars(f"{name.replace('_', ' ')} {section.replace('_', ' ')}", values))
    parts.append(
        f"<h2>Samples</h2><p class='note'>{len(shown)} of {report['samples']:,}. <span class='s'>Trained on</span>, "
        "<span class='u'>not trained on</span>; what a token is shows when the pointer is over it.</p>"
    )
    for sample in shown:
        parts += _sample(sample, datasets[sample.source.dataset], settings, tokenizer, decoder)
    return "\n".join([*parts, "</body></html>", ""])


def escape(text: str) -> str:
    """Text for HTML; control characters, which it cannot have, as their pictures."""
    pictures = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
    return html.escape(text.translate(pictures))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; text is escaped, numbers are right-aligned."""

    def cell(value: Any) -> str:
        return f"<td>{escape(value)}</td>" if isinstance(value, str) else f"<td class='n'>{value:,}</td>"

    lines = ["<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _overview(report: Mapping[str, Any]) -> list[str]:
    fill = report["fill"]
    figures = [
        ("rows", f"{report['rows']:,} of {report['streams']} streams"),
        ("samples", f"{report['samples']:,}"),
        ("tokens", f"{report['tokens']:,}, of them {report['image_token_share']:.1%} image tokens"),
        ("trained on", f"{report['supervised_token_share']:.1%} of the tokens"),
        ("rows filled, tokens", f"{fill['tokens_mean']:.2%} on average, least {fill['tokens_least']:.2%}"),
        ("rows filled, tiles", f"{fill['tiles_mean']:.2%} on average, most {fill['tiles_most']:.2%}"),
    ]
    return [_table(["", ""], figures)]


def _mixture(report: Mapping[str, Any]) -> list[str]:
    parts = ["<h2>Mixture</h2>"]
    if report["groups"]:
        rows = [
            (name, f"{group['token_share']:.2%}", f"{group['token_share_asked']:.2%}")
            for name, group in report["groups"].items()
        ]
        parts.append(_table(["group", "tokens", "asked for"], rows))
    rows = [
        (
            name,
            one["group"],
            one["draws"],
            f"{one['draw_share_in_group']:.2%}",
            f"{one['draw_share_in_group_asked']:.2%}",
            one["samples"],
            one["tokens"],
            f"{one['token_share']:.2%}",
        )
        for name, one in report["datasets"].items()
    ]
    head = ["data set", "group", "drawn", "share in its group", "asked for", "in rows", "tokens", "share"]
    return [*parts, _table(head, rows)]


def _faults(report: Mapping[str, Any]) -> list[str]:
    rows = [
        (kind, fault["count"], f"{one['where']}: {one['reason']}")
        for kind, fault in report["faults"].items()
        for one in fault["first"]
    ]
    return ["<h2>Left out</h2>", _table(["kind", "records", "the first few"], rows) if rows else "<p>Nothing.</p>"]


def bars(title: str, values: Mapping[str, Any]) -> str:
    """A histogram as SVG; nothing if there are no values."""
    if not values["count"]:
        return ""
    edges, counts = values["histogram"]["edges"], values["histogram"]["counts"]
    width, height = 240, 80
    step, tallest = width / len(counts), max(counts)
    rects = "".join(
        f"<rect x='{bar * step:.1f}' y='{height - height * count / tallest:.1f}' width='{max(1.0, step - 1):.1f}' "
        f"height='{height * count / tallest:.1f}'><title>{edges[bar]} to {edges[bar + 1] - 1}: {count}</title></rect>"
        for bar, count in enumerate(counts)
    )
    return (
        f"<div class='bars'><b>{escape(title)}</b><br>mean {values['mean']:,.1f}, median {values['median']:,.0f}, "
        f"90 % up to {values['ninth_decile']:,.0f}<br>"
        f"<svg width='{width}' height='{height + 16}' role='img'>{rects}"
        f"<text x='0' y='{height + 13}' font-size='11'>{values['least']:,}</text>"
        f"<text x='{width}' y='{height + 13}' font-size='11' text-anchor='end'>{values['most']:,}</text></svg></div>"
    )


def _sample(
    sample: DrawnSample, dataset: Dataset, settings: SampleSettings, tokenizer: Tokenizer, decoder: DecodePool
) -> list[str]:
    """A sample: where it is from, its text token by token, its pictures."""
    where = dataset.where(sample.source.record)
    trained = int(np.count_nonzero(sample.is_trained))
    facts = (
        f"step {sample.step}, row {sample.slot}; {len(sample.token_ids):,} tokens, {trained:,} trained on; positions 0 to "
        f"{position(sample.positions[-1])}; waited {sample.rows_waited} rows; pass {sample.source.pass_number}"
    )
    parts = [
        f"<div class='sample'><b>{escape(dataset.entry.name)}</b> {escape(where)}<br><span class='note'>{facts}</span>",
        f"<div class='text'>{''.join(token_spans(sample, tokenizer))}</div>",
    ]
    num_left = MOST_TILES
    for image in sample.images:
        if num_left <= 0:
            parts.append("<p class='note'>More images are not shown.</p>")
            break
        parts.append(_figure(image, settings, decoder, num_left))
        num_left -= image.num_tiles
    return [*parts, "</div>"]


def position(numerator: int) -> str:
    """A position in units of 1/256 as a number."""
    return f"{int(numerator) / UNITS_PER_POSITION:.10g}"


def token_spans(sample: DrawnSample, tokenizer: Tokenizer) -> Iterator[str]:
    """The tokens, one element each, but for the context tokens of an image, which are one."""
    ids = sample.token_ids[:MOST_TOKENS].tolist()
    texts = token_texts(ids, tokenizer)
    at = 0
    while at < len(ids):
        end = at + 1
        if ids[at] == tokenizer.image_context_id:
            while end < len(ids) and ids[end] == ids[at]:
                end += 1
            span = f"positions {position(sample.positions[at])} to {position(sample.positions[end - 1])}"
            yield f"<span class='chip' title='{span}'>IMG_CONTEXT x {end - at}</span>"
        else:
            kind = "s" if sample.is_trained[at] else "u"
            facts = f"id {ids[at]}, position {position(sample.positions[at])}, weight {sample.weights[at]:.4g}"
            text = escape(texts[at] or PART_OF_CHARACTER).replace("\n", "\u21b5\n")
            yield f"<span class='t {kind}' title='{facts}'>{text}</span>"
        at = end
    if len(sample.token_ids) > len(ids):
        yield f"<span class='chip'>{len(sample.token_ids) - len(ids):,} more tokens</span>"


def _figure(image: ImageRef, settings: SampleSettings, decoder: DecodePool, most_tiles: int) -> str:
    """The tiles of an image in their grid, the thumbnail beside it; the frames of a video in a line."""
    name = escape(image.path)
    try:
        tiles = decoder.submit(image).result()
    except FileError as error:
        return f"<p class='bad'>{escape(str(error))}</p>"
    columns, num_in_grid = image.grid[0], image.grid[0] * image.grid[1]
    if image.kind == "video":
        columns, num_in_grid = min(8, len(tiles)), len(tiles)
    shown = tiles[: min(num_in_grid, most_tiles)]
    grid = "".join(f"<img alt='' src='{data_uri(tile)}'>" for tile in shown)
    thumbnails = "".join(f"<img alt='' class='thumbnail' src='{data_uri(tile)}'>" for tile in tiles[num_in_grid:])
    caption = f"{len(tiles)} frames" if image.kind == "video" else f"{image.grid[0]} x {image.grid[1]} tiles"
    caption += " and a thumbnail" if thumbnails else ""
    return (
        f"<figure><div style='display:flex'><div class='tiles' style='grid-template-columns:repeat({columns},auto)'>{grid}"
        f"</div>{thumbnails}</div><figcaption>{name}<br>{caption} of {settings.tile_pixels} pixels</figcaption></figure>"
    )


def data_uri(tile: np.ndarray) -> str:
    """A tile, uint8 [3, height, width], as a small picture inside the page."""
    picture, buffer = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0))), io.BytesIO()
    kind = "png" if max(picture.size) <= SMALL_PIXELS else "jpeg"
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    picture.save(buffer, format=kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
