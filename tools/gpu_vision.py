"""FLOP/s of the vision encoder and projector by themselves, forward and forward + backward, over tiles per chunk."""

from dataclasses import replace
from typing import Any, Literal

from internvl_megatron.config.models import INTERNVIT_6B, INTERNVIT_300M, QWEN2_5_7B, QWEN2_5_72B
from internvl_megatron.config.schema import Fp8Config, LanguageConfig, ModelConfig, RunConfig
from internvl_megatron.device import DeviceName
from internvl_megatron.ranks import RankInfo
from internvl_megatron.scaling.counts import BACKWARD_AND_FORWARD, tile_flops
from tools.gpu_cases import Precision, dry_vision, model_of, run_config
from tools.gpu_training import TIMEOUT_SECONDS, device_facts, fill_on_device, timed, use_own_cores

Encoder = Literal["300M", "6B"]
ENCODERS: tuple[Encoder, ...] = ("300M", "6B")
CHUNK_TILES = (1, 4, 16, 32, 64)
"""Tiles side by side. In FP8 only multiples of 16: their 1025 tokens each must be one of 16 together."""
DRY_CHUNK_TILES = (1, 16)


def vision_config(encoder: Encoder, precision: Precision, device: DeviceName, is_dry: bool) -> RunConfig:
    """A run whose language model is as small as it gets; the projector has its real width."""
    vision, language = {"300M": (INTERNVIT_300M, QWEN2_5_7B), "6B": (INTERNVIT_6B, QWEN2_5_72B)}[encoder]
    if is_dry:
        vision, language = dry_vision(encoder), model_of("1B", is_dry).language
    small: LanguageConfig = replace(language, num_layers=1, vocab_size=512, ffn_hidden_size=256)
    fp8 = Fp8Config() if precision == "bf16" else Fp8Config(vision="current", projector="current")
    return run_config(f"vision_{encoder}_{precision}", ModelConfig(vision=vision, language=small), 4096, fp8, device)


def vision_rank(
    info: RankInfo, config: RunConfig, chunks: tuple[int, ...], num_warmup: int, num_calls: int
) -> dict[str, Any]:
    """Body of the rank: seconds and FLOP/s by tiles per chunk; a chunk too large for the memory ends the list."""
    import statistics

    import torch

    from internvl_megatron.device import open_device
    from internvl_megatron.logs import configure_logging
    from internvl_megatron.model.build import build_model, torch_dtype
    from internvl_megatron.parallel.groups import make_groups
    from internvl_megatron.parallel.layout import Layout
    from internvl_megatron.ranks import joined

    configure_logging(info.rank)
    use_own_cores()
    device = open_device(config.device, info.local_rank)
    with joined(info, device, TIMEOUT_SECONDS):
        groups = make_groups(Layout(1, 1, 1), device, TIMEOUT_SECONDS)
        model = build_model(config, groups, device, initialize=False)
        fill_on_device(model)
        tower, side = model.vision, config.model.vision.tile_pixels
        peak, results, too_large = device.peak_flops(torch_dtype(config.dtype)), [], None
        for tiles in chunks:
            pixels = torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8, device=device.torch_device)

            def forward(_: int, pixels: torch.Tensor = pixels) -> None:
                with torch.no_grad():
                    tower(pixels)

            def both(_: int, pixels: torch.Tensor = pixels) -> None:
                tower(pixels).float().square().mean().backward()
                tower.zero_grad(set_to_none=True)

            try:
                seconds = [statistics.median(timed(run, num_warmup, num_calls, device)) for run in (forward, both)]
            except torch.OutOfMemoryError:
                too_large = tiles
                break
            flops = [tiles * tile_flops(config.model) * times for times in (1, BACKWARD_AND_FORWARD)]
            rates = [work / time for work, time in zip(flops, seconds, strict=True)]
            results.append(
                {
                    "tiles": tiles,
                    "forward_seconds": seconds[0],
                    "forward_backward_seconds": seconds[1],
                    "forward_tflops_per_second": rates[0] / 1e12,
                    "forward_backward_tflops_per_second": rates[1] / 1e12,
                    "forward_backward_mfu": rates[1] / peak,
                    "peak_memory_bytes": device.peak_memory_bytes(),
                }
            )
    return {**device_facts(device), "chunks": results, "out_of_memory_at_tiles": too_large}
