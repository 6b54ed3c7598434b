"""lmms-eval's own command line drives the engine on local tasks; its answers and scores are those of our own commands.

Runs where lmms-eval 0.7.3 can be imported; its pins do not fit beside ours, so it lies in a folder of its own (docs/evaluation.md).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.run import generate_rank, score_rank
from internvl_megatron.inference.settings import Generation
from tests.support.random_chat import write_random_chat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parallel,
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None,
        reason="lmms-eval is not installed; docs/evaluation.md says how, in a folder of its own",
    ),
]

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ["how many digits are there?", "which is it? <image>", "are there two?", "is it three?"]
CHOICES = ["two", "three digits", "yes"]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function documents.visual
"""
TASKS = {
    "digits_free": """
task: digits_free
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 7, do_sample: false, temperature: 0, top_p: 0, until: ["~~"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "digits_choice": """
task: digits_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["two", "three digits", "yes"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}
DOCUMENTS = """
from PIL import Image
def visual(document):
    return [Image.open(document["image"])] if document["image"] else []
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`hf`, a checkpoint; `tasks`, two of them on the same four documents, one of them without a picture."""
    root = tmp_path_factory.mktemp("lmms")
    write_random_chat(root / "hf", seed=1)
    (root / "tasks").mkdir()
    (root / "tasks/documents.py").write_text(DOCUMENTS)
    records = []
    for number, question in enumerate(QUESTIONS):
        path = root / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28 * (number + 1), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        records.append({"question": question, "answer": "two", "image": "" if number == 3 else str(path)})
    (root / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in TASKS.items():
        (root / f"tasks/{name}.yaml").write_text(text + COMMON.format(data=root / "test.jsonl"))
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(root)]
    subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True
    )  # the entry point, as an installed package has it
    return root


def lmms_eval(made: Path, *more: str, model_args: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(made), str(ROOT), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "lmms_eval", "eval", "--model", "internvl_megatron"]
    command += ["--include_path", str(made / "tasks")]
    arguments = ["--model_args", f"pretrained={made / 'hf'},device=cpu,max_tiles=6{model_args}", "--log_samples"]
    return subprocess.run(
        [*command, *arguments, "--output_path", str(made / "out"), *more],
        env={**environment, "HF_DATASETS_CACHE": str(made / "cache"), "HF_DATASETS_OFFLINE": "1"},
        cwd=made,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def prompts(made: Path) -> list[Prompt]:
    """What the documents should come to."""
    texts = [f"<image>\n{QUESTIONS[0]}", QUESTIONS[1], f"<image>\n{QUESTIONS[2]}", QUESTIONS[3]]
    images = [(str(made / "0.png"),), (str(made / "1.png"),), (str(made / "2.png"),), ()]
    return [Prompt(text, own, max_tiles=6) for text, own in zip(texts, images, strict=True)]


def test_free_answers_and_choices(made, run_ranks):
    done = lmms_eval(made, "--tasks", ",".join(TASKS))
    assert done.returncode == 0, done.stdout + done.stderr
    samples = {}
    for name in TASKS:
        (path,) = (made / "out").rglob(f"*samples_{name}.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        samples[name] = sorted(lines, key=lambda line: line["doc_id"])
    expected = run_ranks(generate_rank, 1, made / "hf", prompts(made), Generation(7), "cpu")[0]
    assert [line["filtered_resps"] for line in samples["digits_free"]] == [text.strip() for text in expected]
    assert len(set(expected)) > 1
    chosen = []
    for prompt, line in zip(prompts(made), samples["digits_choice"], strict=True):
        totals = [total for total, _ in run_ranks(score_rank, 1, made / "hf", [prompt], CHOICES, 256, False, "cpu")[0]]
        np.testing.assert_allclose(
            [float(one[0]) for one in line["filtered_resps"]], [-total for total in totals], rtol=1e-4
        )
        chosen.append(float(np.argmax(totals) == 0))
    (path,) = (made / "out").rglob("*results.json")
    assert json.loads(path.read_text())["results"]["digits_choice"]["acc,none"] == np.mean(chosen)


def test_what_is_wrong_is_said(made):
    done = lmms_eval(made, "--tasks", "digits_free", model_args=",device=nowhere")
    assert "device: must be" in done.stdout + done.stderr
