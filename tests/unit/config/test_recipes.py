"""Recipes of the released sizes: layouts that work, published numbers, and a source for every value."""

import re

import pytest

from internvl_megatron.__main__ import main
from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.config.overrides import apply_overrides, changed_fields, field_paths
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipe_settings import COMMON, LAYOUTS, STAGES
from internvl_megatron.config.recipes import RECIPES, RELEASED, fewest_ranks, find_recipe, sources
from internvl_megatron.config.schema import DataConfig, ModelConfig, RunConfig
from internvl_megatron.recipe_report import DEFAULT, RECIPE, encoder_schedule, sourced
from internvl_megatron.scaling.drawn_rows import drawn_workload
from internvl_megatron.scaling.gpus import find_gpu
from internvl_megatron.scaling.memory import USED_SHARE, rank_bytes
from internvl_megatron.scaling.planner import judge
from internvl_megatron.scaling.predicted_step import fills_bubbles

GIVEN = ["data.meta=m.json", "data.tokenizer=t", "checkpoint.load=w"]
GPU_BYTES = 80e9
DROP_PATH = {
    "pretrain": {"1B": 0.1, "2B": 0.1, "8B": 0.1, "9B": 0.1, "14B": 0.1, "38B": 0.4, "78B": 0.4},
    "sft": {"1B": 0.0, "2B": 0.0, "8B": 0.1, "9B": 0.1, "14B": 0.1, "38B": 0.4, "78B": 0.4},
    "mpo": {"1B": 0.1, "2B": 0.1, "8B": 0.1, "9B": 0.1, "14B": 0.1, "38B": 0.4, "78B": 0.4},
    "prm": {"1B": 0.0, "2B": 0.0, "8B": 0.1, "9B": 0.1, "14B": 0.1, "38B": 0.4, "78B": 0.4},
}


def world_sizes(name: str) -> list[int]:
    """Powers of two from the fewest ranks to 1024, or to where every replica has one row."""
    config, fewest = find_recipe(name), fewest_ranks(name)
    most = min(1024, config.rows_per_step * config.parallel.tensor_size * config.parallel.pipeline_size)
    return [2**power for power in range(3, 11) if fewest <= 2**power <= most]


def test_there_is_a_recipe_for_every_size_and_stage() -> None:
    assert set(INTERNVL3) == set(LAYOUTS)
    names = {f"internvl3_{size}_{stage}" for size in ("1b", "2b", "8b", "9b", "14b", "38b", "78b") for stage in STAGES}
    assert names == set(RELEASED) and names < set(RECIPES)


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [(name, num_ranks) for name in RELEASED for num_ranks in world_sizes(name)],
)
def test_every_layout_is_accepted_and_estimated_to_fit(name: str, num_ranks: int) -> None:
    config = apply_overrides(find_recipe(name, num_ranks), GIVEN)
    made = plan(config, num_ranks)
    assert made.layout.world_size == num_ranks
    assert rank_bytes(config, made).total < USED_SHARE * GPU_BYTES


PIPELINES = [
    (name, num_ranks)
    for name in RELEASED
    if find_recipe(name).parallel.pipeline_size > 1
    for num_ranks in world_sizes(name)
]


@pytest.mark.parametrize(("name", "num_ranks"), PIPELINES)
def test_windows_of_pipelines_are_the_longest_that_fit(name: str, num_ranks: int) -> None:
    config = apply_overrides(find_recipe(name, num_ranks), GIVEN)
    window = config.parallel.vision_window_rows
    assert window is not None and window.bit_count() == 1, "a power of two"
    longer = apply_overrides(config, [f"parallel.vision_window_rows={2 * window}"])
    has_all_rows = window >= plan(config, num_ranks).rows_per_replica
    assert has_all_rows or rank_bytes(longer, plan(longer, num_ranks)).total > USED_SHARE * GPU_BYTES
    # One window and a replicated encoder could fill pauses, and a window of none says so to the trainer.
    assert config.parallel.vision_sharding == "sharded"


@pytest.mark.parametrize(("name", "num_ranks"), PIPELINES)
def test_pipelines_pause_little_unless_replicas_have_few_rows(name: str, num_ranks: int) -> None:
    """As predicted for H100 and half image tokens. A pipeline of P stages and M rows pauses for (P - 1) / (M + P - 1) of its
    time whatever the window; where that is much, the step itself is too small for so many GPUs."""
    config = apply_overrides(find_recipe(name, num_ranks), GIVEN)
    workload = drawn_workload(config.data.tokens_per_row, config.data.tiles_per_row, 0.5)
    _, time = judge(config, num_ranks, workload, find_gpu("h100-80g"))
    rows, stages = plan(config, num_ranks).rows_per_replica, config.parallel.pipeline_size
    own = (stages - 1) / (rows + stages - 1)
    share = time.pauses / time.total
    assert share <= (0.15 if rows >= 4 * stages else own), f"{share:.3f} of the step, {own:.3f} with one window"


def test_small_sizes_start_from_one_node() -> None:
    fewest = {size: fewest_ranks(f"internvl3_{size.lower()}_sft") for size in INTERNVL3}
    assert fewest == {"1B": 8, "2B": 8, "8B": 8, "9B": 8, "14B": 8, "38B": 16, "78B": 32}


@pytest.mark.parametrize("size", INTERNVL3)
def test_native_pretraining_is_as_published(size: str) -> None:
    config = find_recipe(f"internvl3_{size.lower()}_pretrain")
    optimizer = config.optimizer
    assert all(part.trainable for part in (optimizer.vision, optimizer.projector, optimizer.language))
    assert (config.data.v2pe, config.loss.weighting, config.loss.normalize) == ("random", "square", "step")
    assert config.data.group_weights == ("language=1", "multimodal=3")
    assert config.data.tokens_per_row == 32 * 1024
    tokens = config.num_steps * config.rows_per_step * config.data.tokens_per_row
    assert 200e9 <= tokens < 200.1e9, "the paper's 200 B tokens"
    assert (optimizer.learning_rate, config.rows_per_step, config.data.tiles_per_row) == (2e-5, 512, 96)


@pytest.mark.parametrize("size", INTERNVL3)
def test_fine_tuning_has_the_proxy_s_numbers(size: str) -> None:
    config = find_recipe(f"internvl3_{size.lower()}_sft")
    assert config.optimizer.learning_rate == (2e-5 if size == "78B" else 8e-5)
    assert (config.num_steps, config.rows_per_step) == (8000, 512)
    assert (config.data.tokens_per_row, config.data.tiles_per_row, config.data.max_tiles) == (32768, 96, 12)


@pytest.mark.parametrize("size", INTERNVL3)
def test_preference_optimization_is_as_published(size: str) -> None:
    config = find_recipe(f"internvl3_{size.lower()}_mpo")
    is_large = size in ("38B", "78B")
    assert config.loss.kind == "mpo" and config.optimizer.learning_rate == 2e-7
    assert config.data.tokens_per_row // 2 == (8192 if is_large else 12288), "of each answer"
    assert config.rows_per_step * 4 == (512 if is_large else 256), "pairs, four a row"
    assert config.num_steps == (400 if is_large else round(300_000 / 256))
    assert config.optimizer.schedule_steps == (round(300_000 / 512) if is_large else None), (
        "the rate falls over an epoch"
    )
    mpo = config.mpo
    factors = (mpo.preference_factor, mpo.quality_factor, mpo.generation_factor)
    assert (factors, mpo.beta, mpo.reference_file) == ((0.8, 0.2, 1.0), 0.1, None)
    optimizer = config.optimizer
    assert all(part.trainable for part in (optimizer.vision, optimizer.projector, optimizer.language))


@pytest.mark.parametrize("size", INTERNVL3)
def test_process_reward_models_have_the_proxy_s_numbers(size: str) -> None:
    config = find_recipe(f"internvl3_{size.lower()}_prm")
    assert (config.optimizer.learning_rate, config.data.max_tiles, config.loss.kind) == (1e-5, 6, "next_token")
    assert config.rows_per_step * 8 == 512, "solutions, eight a row"
    assert config.num_steps == -(-400_000 // 512)


@pytest.mark.parametrize("name", RELEASED)
def test_all_have_upstream_s_optimizer(name: str) -> None:
    stage, size = RELEASED[name]
    config = find_recipe(name)
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.schedule, optimizer.min_learning_rate) == ("cosine", 0.0)
    assert optimizer.warmup_ratio == (0.05 if stage == "prm" else 0.03)
    assert (optimizer.weight_decay, optimizer.clip_grad_norm, config.seed) == (0.05, 1.0, 42)
    for part in (optimizer.vision, optimizer.projector, optimizer.language):
        assert (part.decay, part.learning_rate_scale) == ("all", 1.0), "biases and norms decay too"
    assert config.model.vision.drop_path_rate == DROP_PATH[stage][size]


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("num_ranks", [None, 512])
def test_whatever_differs_from_the_defaults_has_a_source(name: str, num_ranks: int | None) -> None:
    config = find_recipe(name, num_ranks)
    bare = RunConfig(
        name="", model=ModelConfig(vision=config.model.vision, language=config.model.language), data=DataConfig()
    )
    shown = {line.partition("=")[0]: source for line, source in sourced(name, num_ranks)}
    assert list(shown) == field_paths(), "every field, once"
    differing = {*changed_fields(bare, config), *(path for path in field_paths() if path.startswith("model."))}
    assert {path for path in differing if shown[path] in (DEFAULT, RECIPE)} == {"name", "folder"}
    allowed = r"(InternVL|InternLM|proxy: InternVL|ours|yours|the recipe|default)"
    assert all(re.match(allowed, source) for source in shown.values())


@pytest.mark.parametrize("stage", ["mpo", "prm"])
def test_what_other_stages_scripts_say_is_no_source_of_this_one(stage: str) -> None:
    """InternVL3.5 pre-training's and SFT's scripts stand for InternVL3's; MPO has its own, and the judge its proxy."""
    for line, source in sourced(f"internvl3_8b_{stage}"):
        assert not re.search(r"InternVL3\.5 (pre-training|SFT)", source), f"{line} # {source}"
    shown = {line.partition("=")[0]: source for line, source in sourced(f"internvl3_8b_{stage}")}
    if stage == "mpo":
        for name in ("beta1", "beta2", "eps", "clip_grad_norm"):
            assert shown[f"optimizer.{name}"].startswith("InternVL3's MPO scripts: their DeepSpeed settings"), name


def test_values_are_those_of_the_table() -> None:
    config = find_recipe("internvl3_8b_sft")
    for path, setting in (COMMON | STAGES["sft"]).items():
        value = config
        for part in path.split("."):
            value = getattr(value, part)
        assert value == setting.value, path


def test_more_ranks_choose_another_layout() -> None:
    few, many = (find_recipe("internvl3_14b_sft", num_ranks).parallel for num_ranks in (8, 64))
    assert (few.tensor_size, few.language_recompute) == (4, "full")
    assert (many.tensor_size, many.language_recompute) == (8, "none")
    assert find_recipe("internvl3_14b_sft", 63).parallel == find_recipe("internvl3_14b_sft", 1).parallel == few
    assert find_recipe("demo_digits", 64) == find_recipe("demo_digits"), "a recipe of one layout"
    assert sources("demo_digits") == {}


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--show", "internvl3_38b_pretrain", "--ranks", "64"]) == 0
    text = capsys.readouterr().out
    assert "on 64 ranks: TP8 x PP2 x DP4" in text and "38.388 B parameters" in text and "not measured" in text
    assert re.search(r"^optimizer\.learning_rate=2e-05 +# proxy: InternVL3\.5 pre-training script", text, re.MULTILINE)
    assert re.search(
        r"^data\.group_weights=language=1,multimodal=3 +# InternVL3 paper, sec\. 2\.2", text, re.MULTILINE
    )
    assert re.search(r"^checkpoint\.load=null +# yours to set", text, re.MULTILINE)
    assert main(["recipes", "--show", "demo_digits"]) == 0
    assert re.search(r"^optimizer\.learning_rate=0\.001 +# the recipe", capsys.readouterr().out, re.MULTILINE)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["recipes", "--show", *arguments]) == 0
    return capsys.readouterr().out


def test_show_a_configuration_of_one_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Layout, memory and sources are of what was given, on either side of the options."""
    plain = shown(capsys, "internvl3_8b_sft", "--ranks", "16")
    given = ["parallel.pipeline_size=4", "parallel.vision_window_rows=null", "data.meta=m.json"]
    changed = shown(capsys, "internvl3_8b_sft", *given[:2], "--ranks", "16", *given[2:])
    assert "TP4 x PP1 x DP4" in plain and "TP4 x PP4 x DP1" in changed
    memory = [re.search(r"fullest rank: weights ([\d.]+) GB", text) for text in (plain, changed)]
    assert memory[0] and memory[1] and float(memory[1][1]) < float(memory[0][1]) / 2
    assert re.search(r"^parallel\.pipeline_size=4 +# given$", changed, re.MULTILINE)
    assert re.search(r"^parallel\.vision_window_rows=null +# given$", changed, re.MULTILINE)
    assert re.search(r"^data\.meta=m\.json +# given$", changed, re.MULTILINE)
    assert re.search(r"^data\.meta= +# yours to set$", plain, re.MULTILINE)
    assert re.search(r"^parallel\.tensor_size=4 +# ours: estimated", changed, re.MULTILINE), "what was not given"
    assert "\nencoder: in phases of its own" in plain and "\nencoder: in the pauses of the pipeline" in changed
    without_ranks = shown(capsys, "internvl3_8b_sft", "parallel.pipeline_size=4", "parallel.stage_layers=7,7,7,7")
    assert "on 16 ranks: TP4 x PP4 x DP1" in without_ranks, "the fewest that it goes on"
    assert "not filled because of parallel.vision_window_rows=4" in without_ranks


@pytest.mark.parametrize(
    ("name", "overrides", "num_ranks", "line"),
    [
        (
            "internvl3_38b_sft",
            [],
            64,
            "in phases of its own, windows of 16 rows; tiles travel between 2 of 4 replicas; a window's pipeline pauses for 6%, "
            "not filled because of parallel.vision_sharding=sharded, parallel.vision_window_rows=16",
        ),
        ("internvl3_8b_sft", [], 64, "in phases of its own, windows of 4 rows; tiles travel between 8 of 16 replicas"),
        (
            "demo_digits",
            [],
            4,
            "in phases of its own, windows of 2 rows; tiles stay in their replica; a window's pipeline pauses for "
            "33%, not filled because of no more rows of a replica (2) than stages",
        ),
        ("demo_digits", ["rows_per_step=8"], 4, "in the pauses of the pipeline; tiles stay in their replica"),
        (
            "demo_digits",
            ["rows_per_step=8", "parallel.vision_placement=first_stage"],
            4,
            "in the passes of the first stage",
        ),
        (
            "demo_digits",
            ["rows_per_step=8", "parallel.virtual_size=2", "parallel.pad_rows=false"],
            4,
            "in phases of its own, windows of 8 rows; tiles stay in their replica; a window's pipeline pauses for "
            "6%, not filled because of parallel.pad_rows=false, parallel.virtual_size=2",
        ),
    ],
)
def test_the_report_says_whether_pauses_are_filled(name: str, overrides: list[str], num_ranks: int, line: str) -> None:
    given = GIVEN if name in RELEASED else []
    config = apply_overrides(find_recipe(name, num_ranks), [*given, *overrides])
    made = plan(config, num_ranks)
    assert encoder_schedule(config, made) == f"encoder: {line}"
    assert fills_bubbles(config, made) == line.startswith("in the pauses")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["internvl3_8b_sft", "parallel.tensr_size=2"], "did you mean 'parallel.tensor_size'"),
        (["internvl3_8b_sft", "parallel.tensor_size=3"], "parallel.tensor_size=3 must divide"),
        (["internvl3_8b_sft", "parallel.tensor_size=3", "--ranks", "8"], "which does not divide the 8 ranks"),
        (["internvl3_38b_pretain"], "did you mean 'internvl3_38b_pretrain'"),
        (["internvl3_78b_sft", "--ranks", "8"], "= 32 ranks a replica, which does not divide the 8 ranks"),
        (["internvl3_8b_sft", "--ranks", "0"], "--ranks 0: at least one"),
    ],
)
def test_show_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["recipes", "--show", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--ranks", "8"], ["num_steps=1"]])
def test_settings_without_a_recipe_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["recipes", *arguments]) == 2
    assert "--show NAME" in capsys.readouterr().err


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RECIPES)


@pytest.mark.parametrize(("num_ranks", "tensor_size"), [(6, 4), (60, 4), (68, 8)])
def test_training_takes_the_layout_of_its_ranks(
    capsys: pytest.CaptureFixture[str], num_ranks: int, tensor_size: int
) -> None:
    """Of 14B; nothing starts, for the ranks do not go around."""
    assert main(["train", "internvl3_14b_sft", *GIVEN, "--nproc", str(num_ranks)]) == 2
    message = capsys.readouterr().err
    if num_ranks % tensor_size:
        assert f"parallel.tensor_size={tensor_size} x parallel.pipeline_size=1 = {tensor_size} ranks" in message
    else:
        assert f"rows_per_step=512 must be a multiple of the {num_ranks // tensor_size} replicas" in message
