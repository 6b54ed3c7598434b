"""Check all records of a meta file as training would read them, in several processes: a report by data set and kind of fault.

    python -m tools.check_data META --tokenizer FOLDER [--recipe NAME] [--workers N] [--decode] [--limit N]
                               [--output report.json] [section.field=value ...]

Exit status: 0 all records are good, 1 some are not, 2 wrong arguments or a meta file that cannot be used. Written are only
the report and missing indices. docs/data.md says what is counted, docs/records.md which kinds of faults there are.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.dataset import Dataset
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.errors import UserError
from tools.check_records import Chunk, Kind, Tally
from tools.check_workers import Job, check_chunks
from tools.data_settings import (
    check_can_write,
    data_parser,
    open_datasets,
    printable,
    read_config,
    write_report,
)

CHUNK_RECORDS = 64
EXIT_GOOD, EXIT_FAULTS, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


def chunks_of(datasets: Sequence[Dataset], limit: int | None) -> Iterator[Chunk]:
    """The records in use of all data sets, the first `limit` of each."""
    for number, dataset in enumerate(datasets):
        count = num_checked(dataset, limit)
        for start in range(0, count, CHUNK_RECORDS):
            yield Chunk(number, start, min(count, start + CHUNK_RECORDS))


def num_checked(dataset: Dataset, limit: int | None) -> int:
    """Records of a data set that are checked."""
    return dataset.num_records if limit is None else min(dataset.num_records, limit)


def check(
    datasets: Sequence[Dataset], config: RunConfig, num_workers: int, decode: bool, limit: int | None = None
) -> list[Tally]:
    """What is found in each data set; progress goes to standard error.

    Raises:
        UserError: what concerns every record, like a missing program.
    """
    job = Job(datasets, SampleSettings.of_run(config), config.data.tokenizer, decode)
    tallies = [Tally() for _ in datasets]
    total = sum(num_checked(dataset, limit) for dataset in datasets)
    with (
        closing(
            check_chunks(chunks_of(datasets, limit), job, num_workers)
        ) as results,  # ends its processes, whatever happens
        tqdm(total=total, unit=" records", unit_scale=True, disable=None) as progress,
    ):
        for chunk, found in results:
            tallies[chunk.dataset].merge(found)
            progress.update(found.num_records)
            progress.set_postfix(faulty=sum(tally.num_faulty for tally in tallies), refresh=False)
    return tallies


def meta_notices(datasets: Sequence[Dataset]) -> list[str]:
    """What is odd about a meta file though it can be used."""
    by_file: dict[str, list[str]] = {}
    for dataset in datasets:
        by_file.setdefault(os.path.realpath(dataset.entry.annotation), []).append(dataset.entry.name)
    return [
        f"{path}: is the annotation of {' and '.join(map(repr, names))}: its records are used {len(names)} times"
        for path, names in by_file.items()
        if len(names) > 1
    ]


def make_report(
    config: RunConfig, datasets: Sequence[Dataset], tallies: Sequence[Tally], decode: bool, limit: int | None
) -> dict[str, Any]:
    """The report as JSON; `docs/data.md` has its fields."""
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    return {
        "meta": config.data.meta,
        "tokenizer": config.data.tokenizer,
        "decoded": decode,
        "limit": limit,
        "meta_notices": meta_notices(datasets),
        **_counts(total),
        "faults": {name: kind.count for name, kind in sorted(total.faults.items())},
        "notices": {name: kind.count for name, kind in sorted(total.notices.items())},
        "datasets": {
            dataset.entry.name: {
                "annotation": str(dataset.entry.annotation),
                "not_checked": dataset.num_in_all - tally.num_records,
                **_counts(tally),
                "faults": _kinds(tally.faults, tally.num_records),
                "notices": _kinds(tally.notices, tally.num_records),
            }
            for dataset, tally in zip(datasets, tallies, strict=True)
        },
    }


def _counts(tally: Tally) -> dict[str, int]:
    return {"records": tally.num_records, "good": tally.num_good, "faulty": tally.num_faulty}


def _kinds(kinds: Mapping[str, Kind], num_records: int) -> dict[str, Any]:
    return {
        name: {
            "count": kind.count,
            "share": kind.count / num_records,
            "first": [{"where": where, "reason": reason} for _, where, reason in kind.first],
        }
        for name, kind in sorted(kinds.items())
    }


def as_text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    names = {name: printable(name, 60) for name in report["datasets"]}
    width = max(map(len, ["data set", "total", *names.values()]))
    lines = [f"{'data set':{width}} {'records':>12} {'good':>12} {'faulty':>10} {'share':>8}  kinds"]
    for name, counts in [*report["datasets"].items(), ("total", report)]:
        share = counts["faulty"] / counts["records"] if counts["records"] else 0.0
        lines.append(
            f"{names.get(name, name):{width}} {counts['records']:>12,} {counts['good']:>12,} {counts['faulty']:>10,} "
            f"{share:>8.2%}  {', '.join(counts['faults'])}"
        )
    for what, mark in (("faults", "fault"), ("notices", "notice")):
        for name, counts in report["datasets"].items():
            for kind, found in counts[what].items():
                lines += ["", f"{mark}: {kind}: {found['count']:,} of {names[name]} ({found['share']:.2%})"]
                lines += [f"  {printable(one['where'])}: {one['reason']}" for one in found["first"]]
                more = found["count"] - len(found["first"])
                lines += [f"  and {more:,} more"] if more else []
    if report["meta_notices"]:
        lines += ["", *(f"notice: {printable(text)}" for text in report["meta_notices"])]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = data_parser("Check all records of a meta file as training would read them.")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--decode", action="store_true", help="decode images and videos, not only read their headers")
    parser.add_argument("--limit", type=int, help="check so many records of each data set, the first; default: all")
    parser.add_argument("--output", type=Path, help="JSON file to write the report to as well")
    return parser


def run(options: argparse.Namespace) -> int:
    """Check, print and write the report. Raises `UserError`."""
    start = time.perf_counter()
    if options.output is not None:
        check_can_write(options.output)
    config = read_config(options)
    datasets = open_datasets(config)
    tallies = check(datasets, config, options.workers, options.decode, options.limit)
    report = make_report(config, datasets, tallies, options.decode, options.limit)
    print(as_text(report))
    seconds = time.perf_counter() - start
    print(f"\n{report['records']:,} records in {seconds:.1f} s, {options.workers} processes", file=sys.stderr)
    if options.output is not None:
        write_report(options.output, json.dumps(report, indent=1) + "\n")
    return EXIT_FAULTS if report["faulty"] else EXIT_GOOD


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and report; returns the exit status."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    for name in ("workers", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        return run(options)
    except UserError as error:
        print(f"check_data: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("check_data: interrupted; nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
