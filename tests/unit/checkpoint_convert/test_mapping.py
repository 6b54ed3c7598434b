"""The table against transformers' own modules, the published layout and formulas worked out here."""

from dataclasses import replace

import pytest
import torch

from checkpoint_convert.mapping import check_fit, in_memory_name, mapping, on_disk_name
from checkpoint_convert.transforms import GroupedQKV, ThirdsQKV
from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.errors import CheckpointError
from internvl_megatron.scaling.counts import parameter_counts
from tests.support.models import huggingface_model, small_model
from tests.support.spec_layouts import internvl_chat_shapes


def shapes_of(model, layout):
    entries = mapping(model, layout)
    return {name: shape for entry in entries for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)}


@pytest.mark.parametrize("size", INTERNVL3)
def test_custom_layout_has_exactly_the_published_tensors(size):
    assert shapes_of(INTERNVL3[size], "internvl-chat") == internvl_chat_shapes(INTERNVL3[size])


@pytest.mark.parametrize("size", INTERNVL3)
def test_native_layout_has_exactly_the_tensors_of_transformers(size):
    """The whole model in transformers' classes, without memory for its values."""
    with torch.device("meta"):
        theirs = huggingface_model(INTERNVL3[size], fill=False)
    state = {on_disk_name(name): tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert shapes_of(INTERNVL3[size], "transformers") == state


@pytest.mark.parametrize("size", INTERNVL3)
@pytest.mark.parametrize("layout", ["internvl-chat", "transformers"])
def test_every_parameter_once(size, layout):
    """Names of ours and theirs are all different, and the values are as many as the closed form counts."""
    model = INTERNVL3[size]
    entries = mapping(model, layout)
    assert len({entry.name for entry in entries}) == len(entries)
    theirs = [name for entry in entries for name in entry.hf_names]
    assert len(set(theirs)) == len(theirs)
    num_values = sum(torch.Size(shape).numel() for shape in shapes_of(model, layout).values())
    assert num_values == parameter_counts(model).total


def test_vision_thirds_become_heads():
    """25 heads: row h * 3 d + j * d + i of ours is row j * 25 d + h * d + i of InternVL's qkv (j = q, k, v)."""
    heads, size = 25, 4
    rows = torch.arange(3 * heads * size)
    transform = ThirdsQKV(GroupedQKV(heads, size))
    ours = transform.join([rows])
    for head in (0, 7, 24):
        for part in range(3):
            first = head * 3 * size + part * size
            expected = part * heads * size + head * size
            assert ours[first : first + size].tolist() == list(range(expected, expected + size))
    assert torch.equal(transform.split(ours)[0], rows)


def test_language_rows_are_grouped_per_key_value_head():
    """4 query heads on 2 key/value heads: q0 q1 k0 v0 q2 q3 k1 v1, which is InternLM2's wqkv too."""
    q, k, v = torch.arange(0, 4), torch.arange(10, 12), torch.arange(20, 22)
    assert GroupedQKV(2, 1).join([q, k, v]).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_names_in_memory_and_on_disk(tmp_path):
    """transformers says itself how it writes what it has in memory."""
    from safetensors import safe_open

    model = huggingface_model(small_model())
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {on_disk_name(name) for name in model.state_dict()} == set(file.keys())
        assert {in_memory_name(name) for name in file.keys()} == set(model.state_dict())  # noqa: SIM118
        assert {on_disk_name(name) for name in file.keys()} == set(file.keys())  # noqa: SIM118


def test_all_offenders_are_listed():
    model = small_model()
    entries = mapping(model, "transformers")
    shapes = shapes_of(model, "transformers")
    del shapes["language_model.lm_head.weight"], shapes["vision_tower.encoder.layer.1.lambda_2"]
    shapes["vision_tower.layernorm.weight"] = (40,)
    shapes["language_model.model.layers.1.mlp.gate_proj.weight"] = (96, 32)
    with pytest.raises(CheckpointError) as raised:
        check_fit(entries, shapes, "here")
    lines = str(raised.value).splitlines()
    assert lines[0] == "here: 4 tensors do not fit the configuration"
    assert {line.split(maxsplit=1)[0] for line in lines[1:]} == {"missing", "unknown", "mis-shaped"}
    for name in (
        "lm_head.weight",
        "layer.1.lambda_2",
        "vision_tower.layernorm.weight",
        "1.mlp.gate_proj.weight: [96, 32]",
    ):
        assert sum(name in line for line in lines[1:]) == 1


def test_a_swapped_vision_family_does_not_fit():
    entries = mapping(replace(small_model("300m"), vision=small_model("6b").vision), "transformers")
    with pytest.raises(CheckpointError, match=r"missing +vision_tower\.encoder\.layer\.0\.attention\.q_norm\.weight"):
        check_fit(entries, shapes_of(small_model("300m"), "transformers"), "here")
