"""What this project depends on was looked at: each package stands in a list, with a reason, and has an upper bound."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

AUDITED = {
    "torch": "tensors, autograd, communication",
    "megatron-core": "tensor and pipeline parallelism, distributed optimizer and checkpoints",
    "transformers": "fast tokenizers, and the reference the model is held against",
    "safetensors": "weights, without code in them",
    "sentencepiece": "InternLM3's tokenizer",
    "protobuf": "sentencepiece imports it without declaring it",
    "numpy": "arrays on the host",
    "pillow": "decodes images; formats that start programs are never opened",
    "tensorboard": "event files",
    "fsspec": "object stores",
    "zarr": "packed rows",
    "psutil": "cores and processes of this machine",
    "tqdm": "progress bars",
    "triton": "megatron.core imports it without declaring it",
    "transformer-engine": "GPU kernels, FP8",
    "flash-attn": "GPU kernels",
    "nvidia-resiliency-ext": "megatron.core's checkpoints on GPUs",
    "torchvision": "transformers' image processor, in tests",
    "av": "decodes videos",
    "pyarrow": "parquet tables of benchmarks",
    "megatron-energon": "index of WebDataset stores",
    "starlette": "the server's paths and requests",
    "uvicorn": "speaks HTTP for it",
    "openai": "the client that tests talk to the server with",
    "playwright": "drives the browser that tests look at the server's page with",
    "pytest": "tests",
    "pytest-xdist": "tests",
    "ruff": "lint",
    "basedpyright": "types",
    "pre-commit": "checks before a commit",
    "wandb": "Weights & Biases, only for runs that name a project",
    "scikit-learn": "the demo's handwritten digits",
    "matplotlib": "the demo's and reports' pictures",
}
"""Packages that may be installed with this one, and what for. Look at a package's maintainers, releases and own dependencies before
it gets a line here: what is installed runs with all that its user may do."""


def requirements() -> list[str]:
    """All that setup.py asks for, read and not run."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    found: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("CORE", "SERVE", "EXTRAS"):
            texts = [part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
            found += [text for text in texts if isinstance(text, str) and re.search(r"[<>=]=?", text)]
    return found


def test_every_requirement_was_looked_at() -> None:
    names = {re.split(r"[\[<>=~!; ]", text)[0] for text in requirements()}
    assert names == set(AUDITED), "setup.py and the list differ"


def test_every_requirement_has_an_upper_bound() -> None:
    open_ended = [text for text in requirements() if not re.search(r"<=?\d|==\d", text.partition(";")[0])]
    assert not open_ended, "a new major release would come in unseen"
