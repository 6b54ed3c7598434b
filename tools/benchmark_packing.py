"""Packing algorithms on a committed file of sample sizes: how full rows are, how long samples wait, how even replicas are.

    python -m tools.benchmark packing [--output FILE]
    python -m tools.benchmark packing --draw      writes the file of sample sizes anew

The file holds sizes drawn as `internvl_megatron/scaling/drawn_rows.py` says, half of all tokens image tokens; other shares leave some of the
samples out. Every stream goes through them in an order of its own. Costs are those of `row_cost.py` for padded rows, by the
trade of `balance.py`. docs/packing.md has the table.
"""

import argparse
import datetime
import json
import os
import platform
import time
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.schema import DataConfig
from internvl_megatron.data.balance import assign_rows, imbalance
from internvl_megatron.data.packer import Pack, fill_of
from internvl_megatron.data.row_cost import RowCost
from internvl_megatron.data.row_packer import RowPacker, make_packer
from internvl_megatron.data.seeds import Purpose, generator
from internvl_megatron.scaling.drawn_rows import TILE_TOKENS, draw_samples

SAMPLES_FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "data" / "packing_samples.npz"
NUM_SAMPLES = 20000
DRAWN_IMAGE_SHARE = 0.5
DRAWN_TOKENS = 16384
"""Longest sample: the smaller of the two token budgets."""
SEED = 1

IMAGE_SHARES = (0.25, 0.5, 0.75)
BUDGETS = ((16384, 48), (32768, 96))
"""Tokens and tiles of a row: InternVL2.5's and InternVL3.5's."""
ALGORITHMS = ("first_fit", "best_fit")
POOL_SAMPLES = (64, 256)
WINDOW_ROWS = 4
GRIDS = ((8, 8, 48), (8, 1, 48), (64, 8, 12))
"""Replicas, rows of each in a step, steps."""
COST_SIZES = ("1B", "8B")
"""Language models whose costs are balanced: the smaller, the more attention and the output layer weigh."""


@dataclass(frozen=True)
class SampleSizes:
    """Sizes of samples, int64 [samples] each."""

    tokens: np.ndarray
    """Text and image tokens."""
    tiles: np.ndarray
    supervised: np.ndarray
    """Tokens that carry loss."""

    def __len__(self) -> int:
        """How many samples."""
        return len(self.tokens)

    @property
    def image_share(self) -> float:
        """Image tokens over all tokens."""
        return float(TILE_TOKENS * self.tiles.sum() / self.tokens.sum())

    def chosen(self, places: np.ndarray) -> "SampleSizes":
        """Some of the samples, in this order."""
        return SampleSizes(self.tokens[places], self.tiles[places], self.supervised[places])

    def with_image_share(self, share: float) -> "SampleSizes":
        """All samples of one kind (with an image or of text alone) and some of the other, chosen by chance, in their order."""
        surplus = TILE_TOKENS * self.tiles - share * self.tokens  # of image tokens; sums to 0 over what is kept
        thinned = (self.tiles > 0) == (share < self.image_share)
        places = np.random.default_rng((SEED, 2)).permutation(np.flatnonzero(thinned))
        num_kept = int((np.abs(np.cumsum(surplus[places])) <= abs(surplus[~thinned].sum())).sum())
        return self.chosen(np.sort(np.concatenate([np.flatnonzero(~thinned), places[:num_kept]])))


def write_samples(path: Path) -> None:
    """Draw the sizes anew."""
    samples = draw_samples(DRAWN_IMAGE_SHARE, NUM_SAMPLES, DRAWN_TOKENS, SEED)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        tokens=np.array([sample.num_tokens for sample in samples], np.uint16),
        tiles=np.array([sample.num_tiles for sample in samples], np.uint8),
        supervised=np.array([sample.num_supervised_tokens for sample in samples], np.uint16),
    )


def read_samples(path: Path = SAMPLES_FILE) -> SampleSizes:
    """The committed sizes."""
    with np.load(path, allow_pickle=False) as arrays:
        return SampleSizes(*(arrays[name].astype(np.int64) for name in ("tokens", "tiles", "supervised")))


def pack_all(sizes: SampleSizes, data: DataConfig) -> tuple[list[Pack[int]], float]:
    """Packs of all samples once, in their order, but for those that wait at the end; and CPU seconds."""
    packer, packs = make_packer(data), []
    pairs = list(zip(sizes.tokens.tolist(), sizes.tiles.tolist(), strict=True))
    begin = time.process_time()
    for place, (tokens, tiles) in enumerate(pairs):
        packs += packer.add(place, tokens, tiles)
    return packs, time.process_time() - begin


def rows_waited(sizes: SampleSizes, data: DataConfig) -> np.ndarray:
    """Of each sample packed, the rows that were finished between its arrival and its own, int64."""
    packer, arrived, waited = make_packer(data), [], []
    num_rows = 0
    for place, (tokens, tiles) in enumerate(zip(sizes.tokens.tolist(), sizes.tiles.tolist(), strict=True)):
        arrived.append(num_rows)
        for pack in packer.add(place, tokens, tiles):
            waited += [num_rows - arrived[item] for item in pack.items]
            num_rows += 1
    return np.array(waited)


def stream_rows(sizes: SampleSizes, data: DataConfig, stream: int, num_rows: int) -> list[Pack[int]]:
    """The first rows of a stream that goes through all samples in an order of its own, again and again."""
    tokens, tiles, rows = sizes.tokens.tolist(), sizes.tiles.tolist(), []
    window = data.packing_window_rows
    packer: RowPacker[int] = RowPacker(
        make_packer(data),
        window,
        lambda n: generator(SEED, Purpose.WINDOW, n).permutation(window).tolist(),
        lambda place: tokens[place] ** 2,
    )
    order = generator(SEED, Purpose.SHUFFLE, stream).permutation(len(sizes)).tolist()
    for place in (order[number % len(order)] for number in count()):
        packer.add(place, tokens[place], tiles[place])
        rows += islice(iter(packer.take, None), num_rows - len(rows))
        if len(rows) == num_rows:
            return rows
    raise AssertionError("a stream has no end")


def row_costs(sizes: SampleSizes, rows: list[Pack[int]], tokens_per_row: int, size: str) -> np.ndarray:
    """FLOPs of padded rows in the language model of a released size, int64 [rows]."""
    cost = RowCost.of_model(INTERNVL3[size].language, cut_multiple=None)
    supervised = np.array([sizes.supervised[row.items].sum() for row in rows])
    squares = np.array([(sizes.tokens[row.items] ** 2).sum() for row in rows])
    return cost.per_token * tokens_per_row + cost.per_target * supervised + cost.per_attention_pair * squares


def imbalances(costs: np.ndarray, num_replicas: int) -> np.ndarray:
    """Busiest replica over the mean after the trade, in each step: int64 [streams, steps] -> float [steps]."""
    return np.array([imbalance(step, assign_rows(step, num_replicas), num_replicas) for step in costs.T])


def packing_of(
    algorithm: str, budget: tuple[int, int], pool_samples: int = POOL_SAMPLES[0], window_rows: int = 1
) -> DataConfig:
    """Settings of a packer, without a window if not told otherwise."""
    tokens, tiles = budget
    return DataConfig(
        tokens_per_row=tokens,
        tiles_per_row=tiles,
        packing=algorithm,  # pyright: ignore[reportArgumentType]
        packing_pool_samples=pool_samples,
        packing_window_rows=window_rows,
    )


def measure_fill(sizes: SampleSizes, data: DataConfig) -> dict[str, Any]:
    """How full rows are, how long samples wait, and how fast it goes."""
    packs, seconds = pack_all(sizes, data)
    waited = rows_waited(sizes, data)
    fill = fill_of(packs, data.tokens_per_row, data.tiles_per_row)
    return {
        "algorithm": data.packing,
        "pool_samples": data.packing_pool_samples if data.packing == "best_fit" else None,
        "buffer_rows": data.packing_buffer_rows if data.packing == "first_fit" else None,
        "rows": fill.num_rows,
        "token_fill": round(fill.tokens, 5),
        "tile_fill": round(fill.tiles, 5),
        "binding_fill": round(fill.binding, 5),
        "tiles_of_a_row_std": round(float(np.std([pack.tiles for pack in packs])), 2),
        "samples_per_cpu_second": round(len(sizes) / seconds),
        "rows_waited_mean": round(float(waited.mean()), 2),
        "rows_waited_most": int(waited.max()),
    }


def measure_balance(sizes: SampleSizes, data: DataConfig, num_replicas: int, rows_each: int, steps: int) -> list[Any]:
    """Evenness of replicas for every size of the language model, mean and worst step."""
    streams = [stream_rows(sizes, data, stream, steps) for stream in range(num_replicas * rows_each)]
    results = []
    for size in COST_SIZES:
        costs = np.stack([row_costs(sizes, rows, data.tokens_per_row, size) for rows in streams])
        traded = imbalances(costs, num_replicas)
        kept = [imbalance(step, np.arange(len(step)) % num_replicas, num_replicas) for step in costs.T]
        step_totals = costs.sum(axis=0)
        results.append(
            {
                "algorithm": data.packing,
                "window_rows": data.packing_window_rows,
                "size": size,
                "replicas": num_replicas,
                "rows_per_replica": rows_each,
                "steps": steps,
                "kept_mean": round(float(np.mean(kept)), 4),
                "traded_mean": round(float(traded.mean()), 4),
                "traded_most": round(float(traded.max()), 4),
                "step_cost_spread": round(float(step_totals.std() / step_totals.mean()), 4),
            }
        )
    return results


def measure() -> dict[str, Any]:
    """Everything there is to report."""
    all_sizes = read_samples()
    fills, balances = [], []
    for share in IMAGE_SHARES:
        sizes = all_sizes.with_image_share(share) if share != DRAWN_IMAGE_SHARE else all_sizes
        for budget in BUDGETS:
            setting = {"image_share": round(sizes.image_share, 4), "tokens": budget[0], "tiles": budget[1]}
            demand = sizes.tokens.sum() / budget[0], sizes.tiles.sum() / budget[1]
            setting |= {"binds": "tokens" if demand[0] > demand[1] else "tiles", "least_rows": float(max(demand))}
            packings = [packing_of("first_fit", budget)] + [packing_of("best_fit", budget, n) for n in POOL_SAMPLES]
            fills += [setting | measure_fill(sizes, data) for data in packings]
    for budget in BUDGETS:
        for algorithm in ALGORITHMS:
            for window in (1, WINDOW_ROWS):
                data = packing_of(algorithm, budget, window_rows=window)
                for grid in GRIDS:
                    setting = {"tokens": budget[0], "tiles": budget[1]}
                    balances += [setting | found for found in measure_balance(all_sizes, data, *grid)]
    return {"fill": fills, "balance": balances}


def table(record: dict[str, Any]) -> str:
    """The record as the two tables of docs/packing.md."""
    lines = ["| image tokens | row | algorithm | fill | tokens | tiles | rows | waits, mean | most | samples/s |"]
    lines.append("|--:|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for one in record["fill"]:
        name = one["algorithm"] + (f", pool {one['pool_samples']}" if one["pool_samples"] else "")
        lines.append(
            f"| {one['image_share']:.0%} | {one['tokens'] // 1024}K, {one['tiles']} | {name} | "
            f"{one['binding_fill']:.2%} | {one['token_fill']:.2%} | {one['tile_fill']:.1%} | {one['rows']} | "
            f"{one['rows_waited_mean']:.1f} | {one['rows_waited_most']} | {one['samples_per_cpu_second']} |"
        )
    lines += [
        "",
        "| row | algorithm | replicas x rows | size | no window: kept | traded | worst | window of 4 | worst |",
    ]
    lines.append("|---|---|---|---|--:|--:|--:|--:|--:|")
    keys = ("tokens", "algorithm", "replicas", "rows_per_replica", "size")
    windows: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for one in record["balance"]:
        windows.setdefault(tuple(one[key] for key in keys), {})[one["window_rows"]] = one
    for (tokens, algorithm, replicas, rows_each, size), by_window in windows.items():
        without, with_window = by_window[1], by_window[WINDOW_ROWS]
        lines.append(
            f"| {tokens // 1024}K | {algorithm} | {replicas} x {rows_each} | {size} | {without['kept_mean']:.3f} | "
            f"{without['traded_mean']:.3f} | {without['traded_most']:.3f} | {with_window['traded_mean']:.3f} | "
            f"{with_window['traded_most']:.3f} |"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Measure, print the tables, write the record."""
    if options.draw:
        write_samples(SAMPLES_FILE)
        return 0
    record = {
        "name": "packing",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load_average": os.getloadavg()[0],
        "versions": {"numpy": np.__version__, "python": platform.python_version()},
        "samples": {
            "file": "benchmarks/data/packing_samples.npz",
            "drawn_by": "internvl_megatron.scaling.drawn_rows.draw_samples: sizes of images and log-normal text, as stated there",
            "count": NUM_SAMPLES,
            "image_share": DRAWN_IMAGE_SHARE,
            "most_tokens": DRAWN_TOKENS,
            "seed": SEED,
            "other_image_shares": "all samples of one kind, with an image or of text alone, and some of the other by chance",
        },
        **measure(),
    }
    print(table(record))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `packing` of `tools.benchmark`."""
    parser = commands.add_parser("packing", help="fill and balance of the packing algorithms")
    parser.add_argument("--draw", action="store_true", help="write the file of sample sizes anew, measure nothing")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: print the tables only")
    parser.set_defaults(run=run)
