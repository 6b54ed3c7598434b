"""Speed on one GPU: the vision encoder alone, whole training steps in bf16 and FP8, and Hugging Face's on the same rows.

    python -m tools.benchmark gpu vision  [--encoders 300M 6B] [--precisions bf16 fp8_current]
    python -m tools.benchmark gpu step    [--sizes 1B 2B 8B] [--precisions bf16 fp8_current fp8_blockwise] [--rows 4096 16384]
    python -m tools.benchmark gpu hf      [--sizes 1B 2B 8B] [--rows 4096 16384]
        step and hf: [--way bf16-none-16]
        all: [--dry] [--steps N] [--set section.field=value ...] [--output FILE]

`--dry` does the same on a CPU with tiny models. Every case runs in a process of its own, and so does every setting of the baseline;
the record is written anew after each, so what was measured stays when time runs out. `step_work` says what MFU counts, `gpu_cases` what the rows are, and how many
layers of a size that does not fit are run.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from internvl_megatron.data.files import write_whole
from internvl_megatron.device import DeviceName
from internvl_megatron.launcher import RankFailedError, launch
from tools.gpu_cases import (
    PRECISIONS,
    ROW_LENGTHS,
    SIZES,
    WAYS,
    Case,
    Precision,
    Setting,
    Size,
    Way,
    baseline_settings,
    best_way,
    choose,
    layers_that_fit,
    model_of,
)
from tools.gpu_training import train_rank
from tools.gpu_vision import CHUNK_TILES, DRY_CHUNK_TILES, ENCODERS, Encoder, vision_config, vision_rank
from tools.machine_record import is_installed, machine_record, query_gpu
from tools.step_work import StepWork, shares, speed

BASELINE_RANK = "tools.huggingface_baseline:baseline_rank"
"""By name: its module imports torch, and this process only starts others."""
KEPT_LAYERS = 0.75
"""Of the layers, when a case has run out of memory."""
DEFAULT_STEPS, DEFAULT_WARMUP = 5, 3
MAX_REASON_CHARACTERS = 2000

Result = dict[str, Any]


def cut_case(size: Size, precision: Precision, tokens_per_row: int, options: argparse.Namespace) -> Case:
    """A case with as many layers as should fit."""
    model = model_of(size, options.dry)
    gpu, num_layers, way = query_gpu(), model.language.num_layers, Way()
    if options.way is not None:
        way = next(way for way in WAYS if way.name == options.way)
        way = replace(way, moments="fp32") if options.dry else way  # a CPU has no others
    if gpu is not None and not options.dry:
        memory = gpu["memory_bytes"]
        if options.way is None:
            way, num_layers = best_way(model, tokens_per_row, memory)
        else:
            num_layers = layers_that_fit(model, tokens_per_row, memory, way)
    if options.layers is not None:
        num_layers = min(options.layers, model.language.num_layers)
    return Case(size, precision, tokens_per_row, num_layers, tuple(options.set), options.dry, way)


def step_result(case: Case, options: argparse.Namespace) -> Result:
    """Measure our step, with fewer layers if the memory asks for it."""
    found, case = run_until_it_fits(
        case, lambda case: launch_one(train_rank, case, _device(options), options.warmup, options.steps)
    )
    if "failure" in found:
        return {**described(case), **found}
    rows = case.rows
    work, seconds = StepWork.of_rows(rows), statistics.median(found["seconds"])
    return {
        **described(case),
        **speed(work, case.model, seconds, found["peak_flops_per_second"]),
        "work": shares(work, case.model),
        **found,
    }


def run_until_it_fits(case: Case, measure: Callable[[Case], Result]) -> tuple[Result, Case]:
    """What was measured, or the failure; and the case it was measured on."""
    while True:
        try:
            return measure(case), case
        except RankFailedError as error:
            if not out_of_memory(error) or case.num_layers == 1:
                return failure(error), case
            print(f"{case.name}: {case.num_layers} layers do not fit", flush=True)
            case = replace(case, num_layers=max(1, int(KEPT_LAYERS * case.num_layers)))


def launch_one(body: Callable[..., Any], case: Case, device: DeviceName, *numbers: int) -> Result:
    """Run the case's rank."""
    return launch(body, 1, case.config(device), case.rows, *numbers, device=device)[0]


def huggingface_results(case: Case, options: argparse.Namespace) -> Iterator[Result]:
    """Ours in bf16 and every setting of the baseline, with the same layers on the same rows; the best counts. All that is known, each
    time there is more."""
    ours = step_result(case, options)
    if "failure" in ours:
        yield ours
        return
    case = replace(case, num_layers=ours["layers"])
    settings, tried = baseline_settings(), list[Result]()
    yield compared(ours, tried, settings)
    for number, setting in enumerate(settings):
        for attempt in (setting, replace(setting, recomputes=True)):
            found, has_memory = baseline_result(case, attempt, ours["peak_flops_per_second"], options)
            tried.append({"setting": attempt.name, **found})
            yield compared(ours, tried, settings[number + 1 :])
            if has_memory:
                break


def baseline_result(
    case: Case, setting: Setting, peak_flops: float, options: argparse.Namespace
) -> tuple[Result, bool]:
    """Measure a setting of the baseline; also whether the memory was enough."""
    device, rows = _device(options), case.rows
    config = case.config(device)
    try:
        found = launch(BASELINE_RANK, 1, config, rows, setting, options.warmup, options.steps, device=device)[0]
    except RankFailedError as error:
        return failure(error), not out_of_memory(error)
    return found | speed(StepWork.of_rows(rows), case.model, found["step_seconds"], peak_flops), True


def compared(ours: Result, tried: Sequence[Result], left: Sequence[Setting]) -> Result:
    """Ours beside what has been tried of the baseline."""
    measured = [found for found in tried if "samples_per_second" in found]
    best = max(measured, key=lambda found: found["samples_per_second"], default=None)
    return {
        **ours,
        "baselines": list(tried),
        "baselines_not_run": [setting.name for setting in left],
        "best_baseline": None if best is None else best["setting"],
        "samples_per_second_over_best_baseline": None
        if best is None
        else ours["samples_per_second"] / best["samples_per_second"],
        "left_out": [] if is_installed("flash_attn") else ["packed, flash_attention_2: flash-attn is not installed"],
    }


def vision_result(encoder: Encoder, precision: Precision, options: argparse.Namespace) -> Result:
    """Measure an encoder."""
    chunks = DRY_CHUNK_TILES if options.dry else CHUNK_TILES
    if precision != "bf16":
        chunks = tuple(tiles for tiles in chunks if tiles % 16 == 0)
    config = vision_config(encoder, precision, _device(options), options.dry)
    case: Result = {"encoder": encoder, "precision": precision, "is_dry": options.dry}
    try:
        found = launch(vision_rank, 1, config, chunks, options.warmup, options.steps, device=_device(options))[0]
    except RankFailedError as error:
        found = failure(error)
    return {**case, **found}


def described(case: Case) -> Result:
    """What was run."""
    fp8 = PRECISIONS[case.precision]
    return {
        "name": case.name,
        "size": case.size,
        "precision": case.precision,
        "tokens_per_row": case.tokens_per_row,
        "layers": case.num_layers,
        "full_layers": case.full_layers,
        "fp8": asdict(fp8),
        "way": asdict(case.way),
        "overrides": list(case.overrides),
        "is_dry": case.is_dry,
    }


def out_of_memory(error: RankFailedError) -> bool:
    """Whether the device's memory was too small."""
    return "OutOfMemoryError" in str(error)


def failure(error: RankFailedError) -> Result:
    """The end of the report of what went wrong; other cases go on."""
    return {"failure": str(error)[-MAX_REASON_CHARACTERS:]}


def _device(options: argparse.Namespace) -> DeviceName:
    return "cpu" if options.dry else "cuda"


def left_out(precisions: Sequence[Precision], is_dry: bool) -> dict[str, str]:
    """Precisions that cannot be measured here, with the reason. On a CPU FP8 is emulated."""
    if is_dry or is_installed("transformer_engine"):
        return {}
    return {name: "Transformer Engine is not installed" for name in precisions if name != "bf16"}


def results(options: argparse.Namespace, skipped: dict[str, str]) -> Iterator[Iterator[Result]]:
    """Of one case after the other: all that is known of it, once or each time there is more."""
    precisions: list[Precision] = [name for name in options.precisions if name not in skipped]
    if options.what == "vision":
        for encoder in options.encoders:
            for precision in precisions:
                if precision in ("bf16", "fp8_current"):  # the others' encoder is that of `fp8_current`
                    yield once(vision_result, encoder, precision, options)
        return
    wanted: list[Precision] = precisions if options.what == "step" else ["bf16"]
    for size, precision, length in choose(options.sizes, wanted, options.rows):
        case = cut_case(size, precision, length, options)
        yield once(step_result, case, options) if options.what == "step" else huggingface_results(case, options)


def once[**P](measure: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Iterator[Result]:
    """What is known of a case at one time."""
    yield measure(*args, **kwargs)


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, write the record; 1 if a case failed."""
    skipped = left_out(options.precisions, options.dry)
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}", flush=True)
    record: Result = {"name": f"gpu_{options.what}", **machine_record(), "is_dry": options.dry, "left_out": skipped}
    record |= {"steps": options.steps, "warmup_steps": options.warmup, "results": []}
    for growing in results(options, skipped):
        before: list[Result] = record["results"]
        for result in growing:
            record["results"] = [*before, result]
            if options.output is not None:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                write_whole(options.output, json.dumps(record, indent=1) + "\n")
        print(table({**record, "results": record["results"][-1:]}), flush=True)
    return int(any("failure" in result for result in record["results"]))


def table(record: Result) -> str:
    """A record as Markdown."""
    rows = {"gpu_vision": vision_rows, "gpu_step": step_rows, "gpu_hf": huggingface_rows}[record["name"]](record)
    head, *body = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body])


def vision_rows(record: Result) -> list[list[str]]:
    """A line for each encoder, precision and chunk."""
    rows = [["encoder", "precision", "tiles", "forward TFLOP/s", "forward + backward TFLOP/s", "MFU", "peak GB"]]
    for result in record["results"]:
        head = [result["encoder"], result["precision"]]
        if "failure" in result:
            rows.append([*head, "failed", "", "", "", ""])
            continue
        rows += [
            [
                *head,
                str(chunk["tiles"]),
                f"{chunk['forward_tflops_per_second']:.4g}",
                f"{chunk['forward_backward_tflops_per_second']:.4g}",
                f"{chunk['forward_backward_mfu']:.1%}",
                f"{chunk['peak_memory_bytes'] / 1e9:.1f}",
            ]
            for chunk in result["chunks"]
        ]
        if result["out_of_memory_at_tiles"]:
            rows.append([*head, str(result["out_of_memory_at_tiles"]), "out of memory", "", "", ""])
    return rows


def step_rows(record: Result) -> list[list[str]]:
    """A line for each case; MFU with the head on supervised positions, attention counted half and in full."""
    rows = [
        [
            "case",
            "layers",
            "head's FLOPs",
            "tokens/s",
            "samples/s",
            "images/s",
            "step s",
            "MFU causal",
            "MFU full",
            "peak GB",
        ]
    ]
    for result in record["results"]:
        head = [result["name"], f"{result['layers']} of {result['full_layers']}"]
        if "failure" in result:
            rows.append([*head, "failed", *[""] * 7])
            continue
        mfu = result["mfu"]
        rows.append(
            [
                *head,
                f"{result['work']['head_flops_share']:.1%}",
                *(f"{result[f'{what}_per_second']:.4g}" for what in ("tokens", "samples", "images")),
                f"{result['step_seconds']:.4g}",
                f"{mfu['causal_attention_supervised_head']:.1%}",
                f"{mfu['full_attention_supervised_head']:.1%}",
                f"{result['peak_memory_bytes'] / 1e9:.1f}",
            ]
        )
    return rows


def huggingface_rows(record: Result) -> list[list[str]]:
    """A line for ours and each setting of the baseline."""
    rows = [["case", "layers", "who", "samples/s", "step s", "MFU causal", "peak GB", "ours over it"]]
    for result in record["results"]:
        case = [result["name"], f"{result['layers']} of {result['full_layers']}"]
        if "failure" in result:
            rows.append([*case, "ours failed", *[""] * 5])
            continue
        for who, found in [("ours", result), *((baseline["setting"], baseline) for baseline in result["baselines"])]:
            if "failure" in found:
                rows.append([*case, who, "failed", *[""] * 4])
                continue
            rows.append(
                [
                    *case,
                    who,
                    f"{found['samples_per_second']:.4g}",
                    f"{found['step_seconds']:.4g}",
                    f"{found['mfu']['causal_attention_supervised_head']:.1%}",
                    f"{found['peak_memory_bytes'] / 1e9:.1f}",
                    f"{result['samples_per_second'] / found['samples_per_second']:.2f}",
                ]
            )
    return rows


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `gpu` of `tools.benchmark`."""
    parser = commands.add_parser("gpu", help="speed on one GPU: vision encoder, training steps, Hugging Face's")
    parser.add_argument("what", choices=("vision", "step", "hf"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=ENCODERS)
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), default=tuple(PRECISIONS))
    parser.add_argument("--rows", nargs="+", type=int, choices=ROW_LENGTHS, default=ROW_LENGTHS, help="tokens per row")
    parser.add_argument("--layers", type=int, help="of the language model; default: as many as fit")
    parser.add_argument(
        "--way",
        choices=[way.name for way in WAYS],
        help="moments of AdamW, what of the encoder is run again, tiles side by side; default: the first that the model fits with",
    )
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="measured; their median counts")
    parser.add_argument("--warmup", type=int, default=DEFAULT_WARMUP, help="steps before them")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="section.field=value", help="change settings of our runs"
    )
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU: does it work?")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: print tables only")
    parser.set_defaults(run=run)
