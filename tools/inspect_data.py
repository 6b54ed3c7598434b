"""Look at what training will see: rows drawn as a run draws them, as figures and as a page with some of their samples.

    python -m tools.inspect_data META --tokenizer FOLDER --output FOLDER [--recipe NAME] [--rows N] [--samples N]
                                 [section.field=value ...]

Writes index.html, which needs no network and no script, and report.json; docs/data.md says what is in them. Broken records
are left out and counted, whatever the run would do about them.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_megatron.data.decode_pool import DecodePool
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.tokenizer import load_tokenizer
from internvl_megatron.errors import ConfigError, UserError
from tools.data_settings import (
    check_can_write,
    data_parser,
    open_datasets,
    printable,
    read_config,
    write_report,
)
from tools.inspect_page import make_page
from tools.inspect_rows import choose_samples, draw_rows, make_report

PAGE_FILE, REPORT_FILE = "index.html", "report.json"
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


def as_text(report: Mapping[str, Any]) -> str:
    """The main figures, for people."""
    per_sample, fill = report["per_sample"], report["fill"]
    tokens, waited, tiles = per_sample["tokens"], per_sample["rows_waited"], report["per_image"]["tiles"]
    lines = [
        f"{report['rows']:,} rows of {report['streams']} streams, {report['samples']:,} samples, {report['tokens']:,} tokens",
        f"tokens of a sample: mean {tokens['mean']:,.1f}, median {tokens['median']:,.0f}, most {tokens['most']:,}",
        f"image tokens {report['image_token_share']:.1%}, trained on {report['supervised_token_share']:.1%}",
        f"tiles of an image: mean {tiles['mean']:.2f}, most {tiles['most']}" if tiles["count"] else "no images",
        f"rows filled: tokens {fill['tokens_mean']:.2%}, tiles {fill['tiles_mean']:.2%}",
        f"a sample waits {waited['mean']:.1f} rows, {waited['most']} at most",
    ]
    lines += [
        f"group {printable(name)}: {group['token_share']:.2%} of the tokens, asked for {group['token_share_asked']:.2%}"
        for name, group in report["groups"].items()
    ]
    lines += [
        f"data set {printable(name)}: {one['draws']:,} drawn, {one['draw_share_in_group']:.2%} of its group, asked for "
        f"{one['draw_share_in_group_asked']:.2%}; {one['token_share']:.2%} of the tokens"
        for name, one in report["datasets"].items()
    ]
    for kind, fault in report["faults"].items():
        lines.append(f"left out, {kind}: {fault['count']:,} ({fault['share_of_draws']:.2%})")
        lines += [f"  {printable(one['where'])}: {one['reason']}" for one in fault["first"]]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Draw, count, print and write. Raises `UserError`."""
    folder: Path = options.output
    config = read_config(options)
    datasets, tokenizer = open_datasets(config), load_tokenizer(config.data.tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be made ({error.strerror}); choose another") from error
    for name in (PAGE_FILE, REPORT_FILE):
        check_can_write(folder / name)
    drawn = draw_rows(config, datasets, tokenizer, options.rows)
    report = make_report(config, datasets, drawn, tokenizer.image_context_id)
    settings, shown = SampleSettings.of_run(config), choose_samples(drawn.samples, options.samples)
    data = config.data
    decoder = DecodePool(1, settings.tile_pixels, data.use_thumbnail, data.read_timeout_seconds)
    try:
        page = make_page(report, shown, datasets, settings, tokenizer, decoder)
    finally:
        decoder.close()
    print(as_text(report))
    write_report(folder / REPORT_FILE, json.dumps(report, indent=1) + "\n")
    write_report(folder / PAGE_FILE, page)
    print(f"{folder}: {PAGE_FILE}, {REPORT_FILE}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Inspect; returns the exit status: 0, or 2 if the user can mend what went wrong."""
    parser = data_parser("Look at rows as training would see them.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write index.html and report.json to")
    parser.add_argument("--rows", type=int, default=64, help="rows to draw (default: 64)")
    parser.add_argument("--samples", type=int, default=24, help="samples to show on the page (default: 24)")
    options = parser.parse_intermixed_args(arguments)
    if options.rows < 1 or options.samples < 0:
        parser.error("--rows must be at least 1, --samples at least 0")
    try:
        return run(options)
    except UserError as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("inspect_data: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
