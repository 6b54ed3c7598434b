"""Overrides, JSON, and the plan's cross-field checks."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from internvl_megatron.config.group_weights import parse_group_weights
from internvl_megatron.config.overrides import apply_overrides, changed_fields, field_paths, from_json, to_json
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import RECIPES, demo_digits, find_recipe
from internvl_megatron.config.schema import padded_vocab_size
from internvl_megatron.errors import ConfigError


def test_overrides_are_read_by_type() -> None:
    texts = [
        "num_steps=7",
        "optimizer.learning_rate=2e-5",
        "parallel.sequence_parallel=true",
        "data.eval_meta=null",
        "data.meta=a=b.json",
        "loss.weighting=token",
        "parallel.vision_window_rows=2",
        "model.vision.drop_path_rate=0.1",
        "optimizer.clip_grad_norm=None",
    ]
    config = apply_overrides(demo_digits(), texts)
    assert (config.num_steps, config.optimizer.learning_rate) == (7, 2e-5)
    assert (config.parallel.sequence_parallel, config.data.eval_meta, config.data.meta) == (True, None, "a=b.json")
    assert (config.loss.weighting, config.parallel.vision_window_rows) == ("token", 2)
    assert (config.model.vision.drop_path_rate, config.optimizer.clip_grad_norm) == (0.1, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lerning_rate=1", "did you mean 'optimizer.learning_rate'"),
        ("num_step=1", "did you mean 'num_steps'"),
        ("num_steps.x=1", "there is no setting"),
        ("optimizer=1", "is a section"),
        ("num_steps", "write it as section.field=value"),
        ("num_steps=ten", "'ten' is not a whole number"),
        ("num_steps=1.5", "is not a whole number"),
        ("num_steps=null", "is not a whole number"),
        ("dtype=fp8", "is not one of fp32, bf16"),
        ("parallel.sequence_parallel=1", "is not true or false"),
        ("parallel.stage_layers=3,x", "is not whole numbers, like 3,3,2"),
        ("data.group_weights", "write it as section.field=value"),
    ],
)
def test_wrong_overrides_say_what_to_do(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(demo_digits(), [text])


def test_every_field_can_be_named_and_written() -> None:
    assert {"optimizer.learning_rate", "model.vision.qk_norm", "folder"} <= set(field_paths())


def test_json_round_trip(tmp_path: Path) -> None:
    for recipe in RECIPES.values():
        path = tmp_path / "config.json"
        path.write_text(to_json(recipe()))
        assert from_json(path) == recipe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_stepz": 1}, "unknown field 'num_stepz'; did you mean 'num_steps'"),
        ({"num_steps": "1"}, "num_steps: '1' is not a whole number"),
        ({"optimizer": []}, "optimizer: expected an object"),
        ({"dtype": "int4"}, "dtype: 'int4' is not one of"),
        ({"data": {"group_weights": ["a=1", 2]}}, "group_weights: .* is not texts, like a=1,b=2"),
        ({"data": {"group_weights": "a=1"}}, "group_weights: 'a=1' is not texts, like a=1,b=2 or null"),
    ],
)
def test_wrong_json_names_the_field(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(to_json(demo_digits())) | change))
    with pytest.raises(ConfigError, match=message):
        from_json(path)


def test_missing_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        from_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        from_json(tmp_path / "config.json")


def test_changed_fields() -> None:
    changed = apply_overrides(demo_digits(), ["num_steps=7", "optimizer.beta1=0.5"])
    assert changed_fields(demo_digits(), changed) == ["optimizer.beta1", "num_steps"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_in_its_own_layout(name: str) -> None:
    config = apply_overrides(find_recipe(name), ["data.meta=m.json", "data.tokenizer=t", "checkpoint.load=w"])
    assert config.name == name
    replica = config.parallel.tensor_size * config.parallel.pipeline_size
    for num_replicas in (1, 2):
        assert plan(config, replica * num_replicas).layout.data_size == num_replicas


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'demo_digits'"):
        find_recipe("demo_digit")


def test_plan_derives_the_layout() -> None:
    made = plan(apply_overrides(demo_digits(), ["rows_per_step=8", "eval_rows=4"]), world_size=8)
    assert str(made.layout) == "TP2 x PP2 x DP2"
    assert (made.rows_per_replica, made.stage_layers, made.padded_vocab_size) == (4, (2, 2), 512)


def test_rows_are_balanced_where_that_does_not_change_the_loss() -> None:
    config = apply_overrides(demo_digits(), ["rows_per_step=8", "eval_rows=4"])
    assert plan(config, world_size=8).balance_rows
    assert not plan(config, world_size=4).balance_rows, "one replica has nobody to trade with"
    for setting in ("data.balance_rows=false", "loss.normalize=micro_batch"):
        assert not plan(apply_overrides(config, [setting]), world_size=8).balance_rows


def test_plan_of_a_split_row_and_an_interleaved_pipeline() -> None:
    settings = [
        "parallel.context_size=2",
        "parallel.virtual_size=2",
        "parallel.stage_layers=1, 1,1,1",
        "rows_per_step=4",
    ]
    made = plan(apply_overrides(demo_digits(), settings), world_size=8)
    assert str(made.layout) == "TP2 x CP2 x PP2 x VPP2 x DP1"
    assert made.stage_layers == (1, 1, 1, 1)


def test_a_ring_takes_the_place_of_heads() -> None:
    settings = [
        "parallel.tensor_size=2",
        "parallel.context_size=4",
        "parallel.context_ring_size=2",
        "data.sample_multiple_tokens=4",
        "parallel.pipeline_size=1",
    ]
    made = plan(apply_overrides(demo_digits(), settings), world_size=8)
    assert str(made.layout) == "TP2 x CP4 (ring 2) x PP1 x DP1"
    with pytest.raises(ConfigError, match=r"tensor_size=2 x parallel\.context_size=4 must divide"):
        plan(apply_overrides(demo_digits(), [*settings, "parallel.context_ring_size=1"]), world_size=8)


def test_stage_layers_survive_json(tmp_path: Path) -> None:
    config = apply_overrides(demo_digits(), ["parallel.stage_layers=3,1"])
    assert config.parallel.stage_layers == (3, 1)
    (tmp_path / "config.json").write_text(to_json(config))
    assert from_json(tmp_path / "config.json") == config
    assert apply_overrides(config, ["parallel.stage_layers=null"]).parallel.stage_layers is None


def test_vocabulary_padding_does_not_depend_on_the_layout() -> None:
    assert [padded_vocab_size(size) for size in (1, 512, 513, 151674)] == [512, 512, 1024, 152064]


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ([], 6, "does not divide the 6 ranks"),
        (["rows_per_step=3"], 8, "rows_per_step=3 must be a multiple of the 2 replicas"),
        (["parallel.pipeline_size=3"], 6, "pipeline_size=3 must divide model.language.num_layers=4"),
        (
            ["parallel.pipeline_size=2", "parallel.virtual_size=4294967297"],
            2,
            "is more stages than model.language.num_layers=4",
        ),
        (["parallel.pipeline_size=3"], 6, "parallel.stage_layers=2,1,1"),
        (["parallel.stage_layers=3,2"], 4, "must be 2 numbers .* that add up to model.language.num_layers=4"),
        (["parallel.stage_layers=4"], 4, "must be 2 numbers"),
        (["parallel.stage_layers=4,0"], 4, "every stage needs a layer"),
        (["parallel.virtual_size=2", "parallel.pipeline_size=1"], 2, "needs parallel.pipeline_size > 1"),
        (["parallel.virtual_size=2", "rows_per_step=3"], 4, "are 3, which must be a multiple of 2"),
        (["parallel.virtual_size=2", "parallel.vision_window_rows=1"], 4, "vision_window_rows are 1, which must be"),
        (["parallel.context_size=3"], 12, "x parallel.context_size=3 must divide model.language.num_heads=4"),
        (["parallel.context_size=2"], 6, "tensor_size=2 x parallel.pipeline_size=2 x parallel.context_size=2 = 8"),
        (
            ["parallel.context_size=2", "data.tokens_per_row=1794"],
            8,
            "multiple of parallel.tensor_size=2 x parallel.context",
        ),
        (
            [
                "model.language.num_kv_heads=3",
                "model.language.num_heads=12",
                "parallel.context_size=2",
                "parallel.tensor_size=1",
            ],
            4,
            "must divide the 3 key/value heads",
        ),
        (
            [
                "optimizer.vision.trainable=false",
                "optimizer.projector.trainable=false",
                "optimizer.language.trainable=false",
            ],
            4,
            "no part is trainable",
        ),
        (["parallel.tensor_size=3"], 6, "tensor_size=3 must divide model.language.num_heads=4"),
        (["parallel.tensor_size=1", "parallel.sequence_parallel=true"], 2, "sequence_parallel=true needs"),
        (["data.tokens_per_row=1791"], 4, "must be a multiple of parallel.tensor_size=2"),
        (["data.tiles_per_row=3"], 4, "set it to at least 7"),
        (["data.v2pe=fixed", "data.v2pe_numerator=3"], 4, "v2pe_numerator=3 must be one of"),
        (["data.eval_meta=null"], 4, "eval_every_steps is set but data.eval_meta is not"),
        (["eval_every_steps=null"], 4, "data.eval_meta=.* is set but eval_every_steps is not, .*eval_every_steps=N"),
        (["benchmarks.names=mmstar"], 4, "benchmarks.names: set, but benchmarks.every_steps is not"),
        (
            ["benchmarks.data=d", "benchmarks.limit_samples=5"],
            4,
            r"benchmarks.data, benchmarks.limit_samples: set, .*\(benchmarks.every_steps=N\)",
        ),
        (["model.vision.num_heads=0"], 4, "model.vision.num_heads=0 must be greater than 0"),
        (["optimizer.learning_rate=nan"], 4, "learning_rate=nan must be a finite number"),
        (["optimizer.beta2=1"], 4, "beta2=1.0 must be below 1"),
        (["seed=99999999999999999999999"], 4, "must be at most"),
        (["data.tokenizer="], 4, "data.tokenizer is not set"),
        (["num_steps=0"], 4, "num_steps=0 must be greater than 0"),
        (["optimizer.weight_decay=-1"], 4, "optimizer.weight_decay=-1.0 must be at least 0"),
        (["parallel.context_size=2", "parallel.context_ring_size=3"], 8, "context_ring_size=3 must divide"),
        (
            ["parallel.context_size=2", "parallel.context_ring_size=2"],
            8,
            "sample_multiple_tokens=1 must be a multiple of 4",
        ),
        (
            ["data.sample_multiple_tokens=5"],
            4,
            "tokens_per_row=1792 must be a multiple of data.sample_multiple_tokens=5",
        ),
        (["parallel.vision_exchange_replicas=3"], 8, "vision_exchange_replicas=3 must divide the 2 replicas"),
        (["parallel.vision_tensor_size=3"], 4, "vision_tensor_size=3 must divide the 4 ranks"),
        (
            ["parallel.vision_tensor_size=4", "model.vision.ffn_hidden_size=514"],
            4,
            r"parallel\.vision_tensor_size=4 must divide model\.vision\.ffn_hidden_size=514 .*; 1 is fastest",
        ),
        (
            ["parallel.vision_placement=colocated", "parallel.pipeline_size=1", "model.vision.ffn_hidden_size=513"],
            4,
            r"parallel\.tensor_size=2 must divide model\.vision\.ffn_hidden_size=513 .*leave parallel\.vision_placement out",
        ),
        (
            ["parallel.vision_placement=first_stage", "parallel.vision_recompute=full"],
            4,
            "set parallel.vision_recompute=layer",
        ),
        (["parallel.vision_placement=first_stage", "parallel.vision_exchange_replicas=2"], 8, "tiles stay in their"),
        (["parallel.vision_placement=first_stage", "parallel.vision_tensor_size=4"], 4, "must divide the 2 ranks"),
        (["parallel.vision_placement=colocated"], 4, "needs parallel.pipeline_size=1"),
        (["parallel.vision_shard_ranks=2"], 4, "vision_shard_ranks=2 needs parallel.vision_sharding=sharded"),
        (
            ["parallel.vision_sharding=sharded", "parallel.vision_shard_ranks=3"],
            4,
            "vision_shard_ranks=3 must divide the 4 ranks",
        ),
        (
            ["parallel.vision_sharding=sharded", "parallel.vision_placement=first_stage"],
            4,
            "needs all ranks to encode at the same time",
        ),
        (
            ["parallel.vision_sharding=sharded", "parallel.vision_tensor_size=2"],
            4,
            "leave parallel.vision_tensor_size=2 out",
        ),
        (
            ["parallel.language_offload=true", "kernels.loss_chunk_tokens=null"],
            4,
            "leave kernels.loss_chunk_tokens out",
        ),
        (["model.vision.hidden_size=126"], 4, "must be a multiple of model.vision.num_heads"),
        (["optimizer.warmup_steps=5"], 4, "optimizer.warmup_steps=5 and optimizer.warmup_ratio=0.03 both say"),
        (["optimizer.warmup_steps=700", "optimizer.warmup_ratio=null"], 4, "must be below num_steps=700"),
        (["optimizer.min_learning_rate=0.1"], 4, "min_learning_rate=0.1 is above optimizer.learning_rate=0.001"),
        (["optimizer.final_decay_ratio=1"], 4, "optimizer.final_decay_ratio=1.0 must be below 1"),
        (
            ["optimizer.schedule=wsd", "optimizer.final_decay_ratio=0.98"],
            4,
            "optimizer.schedule=wsd: 21 steps of warm-up and 686 of decay .* are more than num_steps=700",
        ),
    ],
)
def test_plan_refuses_what_cannot_work(overrides: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(apply_overrides(demo_digits(), overrides), world_size)


def test_tiles_of_colocated_encoders_stay_in_their_replica() -> None:
    settings = ["parallel.vision_placement=colocated", "parallel.pipeline_size=1", "rows_per_step=4", "eval_rows=4"]
    made = plan(apply_overrides(demo_digits(), settings), world_size=4)
    assert made.vision_layout.units == [[0, 1], [2, 3]]
    assert made.vision_layout.num_groups == 2


def test_a_stage_with_the_encoder_gets_fewer_layers() -> None:
    config = find_recipe("internvl3_1b_sft")
    settings = [
        "parallel.pipeline_size=4",
        "data.meta=m",
        "data.tokenizer=t",
        "parallel.vision_placement=first_stage",
        "parallel.vision_recompute=layer",
    ]
    made = plan(apply_overrides(config, settings), world_size=4)
    assert sum(made.stage_layers) == 24
    assert made.stage_layers[0] == 1, "InternViT-300M costs more than a quarter of the 1B"
    assert made.stage_layers[1] == made.stage_layers[2] > made.stage_layers[3], "the output layer is on the last stage"
    chosen = plan(apply_overrides(config, [*settings, "parallel.stage_layers=6,6,6,6"]), world_size=4)
    assert chosen.stage_layers == (6, 6, 6, 6)


def test_plan_names_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        plan(apply_overrides(demo_digits(), ["data.meta=", "parallel.pipeline_size=3", "data.eval_meta=null"]), 6)
    assert len(str(error.value).splitlines()) == 3


def test_plan_asks_for_rows_of_evaluation_only_where_there_is_one() -> None:
    settings = ["rows_per_step=16", "eval_every_steps=null", "data.eval_meta=null", "eval_rows=3"]
    assert plan(apply_overrides(demo_digits(), settings), 64)


def test_group_weights(tmp_path: Path) -> None:
    config = apply_overrides(demo_digits(), ["data.group_weights=language=1, multi=modal=2.50"])
    assert config.data.group_weights == ("language=1", "multi=modal=2.50")
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert from_json(path) == config
    plan(config, world_size=4)
    assert config.data.group_weights is not None
    assert parse_group_weights(config.data.group_weights) == {"language": Fraction(1), "multi=modal": Fraction(5, 2)}
    assert apply_overrides(config, ["data.group_weights=null"]).data.group_weights is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "'a' is not a group and its weight"),
        ("a=0", "'a=0' is not a group and its weight, a number above 0"),
        ("a=0.000", "is not a group and its weight"),
        ("a=-1", "is not a group and its weight"),
        ("a=nan", "is not a group and its weight"),
        ("a=1e400", "is not a group and its weight"),
        ("=1", "is not a group and its weight"),
        ("a=1,,b=2", "'' is not a group and its weight"),
        ("a=1,b=2,a=1", "group 'a' is there twice"),
        ("", "'' is not a group"),
    ],
)
def test_wrong_group_weights(text: str, message: str) -> None:
    config = apply_overrides(demo_digits(), [f"data.group_weights={text}"])
    with pytest.raises(ConfigError, match=f"data.group_weights: .*{message}"):
        plan(config, world_size=4)


def test_group_weights_of_no_group() -> None:
    with pytest.raises(ConfigError, match="names no group"):
        parse_group_weights(())


def test_urls_are_refused_where_a_run_keeps_its_files() -> None:
    changes = ["folder=s3://bucket/run", "checkpoint.load=gs://bucket/weights"]
    with pytest.raises(
        ConfigError,
        match=r"folder=s3://bucket/run is a URL[^\n]*\n[^\n]*checkpoint\.load=gs://bucket/weights is a URL",
    ):
        plan(apply_overrides(demo_digits(), changes), 4)


def test_passwords_in_urls_are_refused_and_not_repeated() -> None:
    changes = ["checkpoint.mirror=s3://user:hunter2@bucket/run", "data.meta=https://hunter2@host/meta.json"]
    with pytest.raises(ConfigError) as caught:
        plan(apply_overrides(demo_digits(), changes), 4)
    assert "checkpoint.mirror has a user or a password" in str(caught.value) and "data.meta has" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_stall_must_be_found_before_a_collective_gives_up() -> None:
    with pytest.raises(ConfigError, match=r"watchdog\.stall_seconds=600\.0 must be below .*=600"):
        plan(apply_overrides(demo_digits(), ["watchdog.stall_seconds=600"]), 4)
    plan(apply_overrides(demo_digits(), ["watchdog.stall_seconds=null"]), 4)
