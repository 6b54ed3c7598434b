"""Figures are the text that Prometheus's own format describes: every sample has a head, and a number."""

import re

from internvl_megatron.serving.figures import Figures


def test_text():
    figures = Figures()
    figures.count_step(3, 0.25)
    figures.count_step(2, 0.5)
    figures.count_response(200)
    figures.count_response(499)
    figures.count_response(200)
    figures.count_prompt(10, 2)
    figures.count_first_token(0.125)
    text = figures.text({"active_sequences": ("Slots", 4)})
    assert text.endswith("\n")
    samples, types = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            types[name] = kind
        elif not line.startswith("# HELP "):
            found = re.fullmatch(r'([a-z_]+)(\{[a-z]+="[^"]*"\})? ([0-9.e+-]+)', line)
            assert found is not None, line
            assert found[1] in types or found[1].rsplit("_", 1)[0] in types, f"{line} has no head"
            samples[(found[1] + (found[2] or "")).removeprefix("internvl_megatron_")] = float(found[3])
    assert samples == {
        "active_sequences": 4,
        'responses_total{status="200"}': 2,
        'responses_total{status="499"}': 1,
        "generated_tokens_total": 5,
        "prompt_tokens_total": 10,
        "images_total": 2,
        "step_seconds_sum": 0.75,
        "step_seconds_count": 2,
        "first_token_seconds_sum": 0.125,
        "first_token_seconds_count": 1,
    }
    assert set(types.values()) == {"gauge", "counter", "summary"}
