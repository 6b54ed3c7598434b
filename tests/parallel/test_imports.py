"""Importing the package changes nothing in torch and needs neither CUDA nor the optional GPU packages."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WATCHED = [
    *(f"torch.{name}" for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "as_tensor")),
    *(
        f"torch.cuda.{name}"
        for name in (
            "current_device", "synchronize", "empty_cache", "Stream", "Event", "current_stream", "default_stream",
            "stream", "get_rng_state", "set_rng_state", "manual_seed", "get_device_capability", "is_available",
            "random.get_rng_state", "random.set_rng_state", "random.manual_seed",
        )
    ),
    "torch.Tensor.cuda", "torch.Tensor.type", "torch.nn.Module.cuda", "torch.distributed.init_process_group",
    "torch.distributed.new_group", "torch.get_default_dtype()", "torch.get_num_threads()", "torch.initial_seed()",
    "torch.cuda.is_initialized()", "torch.distributed.is_initialized()",
]  # fmt: skip

IMPORT_EVERYTHING = f"""
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformer_engine", "flash_attn", "apex"):
            raise ModuleNotFoundError(f"{{name}} is not installed, says the test", name=name)

sys.meta_path.insert(0, Refuse())
import torch

def state():
    values = {{name: eval(name) for name in {WATCHED!r}}}
    return {{name: value if name.endswith(")") else id(value) for name, value in values.items()}}

before = state()
import internvl_megatron
found = [module.name for module in pkgutil.walk_packages(internvl_megatron.__path__, "internvl_megatron.")]
# lmms_eval_model is a module for lmms-eval to import, which brings itself.
names = [name for name in found if not name.endswith(("__main__", ".lmms_eval_model"))]
assert len(names) > 20, names
for name in names:
    importlib.import_module(name)
after = state()
changed = sorted(name for name in before if before[name] != after[name])
assert not changed, f"importing the package changed {{changed}}"
"""


def test_importing_everything_changes_nothing_in_torch() -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_EVERYTHING],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
