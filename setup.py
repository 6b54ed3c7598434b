"""Package metadata. Tool settings live in pyproject.toml, which must stay without a [project] table: it would shadow this file."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version in the package's `__init__.py`, read as text so that nothing is imported."""
    source = (HERE / "internvl_megatron" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('internvl_megatron/__init__.py has no line like: __version__ = "0.1.0"')
    return found.group(1)


def readme() -> str:
    """README.md, the long description."""
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


# NVIDIA Apex is deliberately absent, here and below: the `apex` on PyPI is another project, and Megatron Core, which only
# asks `import apex`, would take it for the real one. Apex comes from its own sources or not at all.
CORE = [
    "torch>=2.11,<2.16",
    "megatron-core>=0.19.2,<0.20",
    "transformers>=5.23,<6",
    "safetensors>=0.6,<1",
    "sentencepiece>=0.2,<1",
    # sentencepiece's own description of its models, which it imports without declaring it.
    "protobuf>=5,<8",
    "numpy>=2,<3",
    "pillow>=11,<14",
    "tensorboard>=2.19,<3",
    # torch depends on it as well; object stores need its plug-ins (s3fs, gcsfs, ...) besides.
    "fsspec>=2025.3,<2028",
    "zarr>=3,<4",
    "psutil>=6,<8",
    "tqdm>=4.66,<5",
    # megatron.core imports triton without declaring it.
    'triton>=3,<4; platform_system=="Linux"',
]
SERVE = ["starlette>=1.10,<2", "uvicorn>=0.54,<1"]
EXTRAS = {
    "gpu": ["transformer-engine[pytorch]>=2.20,<3", "flash-attn>=2.8,<3", "nvidia-resiliency-ext>=0.4,<1"],
    # torchvision: transformers' processor of exported checkpoints needs it, the tests load one.
    "dev": [
        "torchvision>=0.26,<1",
        "av>=16,<19",
        "megatron-energon>=7,<8",
        *SERVE,
        # Tests talk to the server with OpenAI's own client, and to its page with a browser.
        "openai>=3.57,<4",
        "playwright>=1.65,<2",
        "pyarrow>=21,<27",
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17,<0.18",
        "basedpyright>=1.40,<2",
        "pre-commit>=4,<5",
    ],
    "video": ["av>=16,<19"],
    "eval": ["pyarrow>=21,<27"],
    "energon": ["megatron-energon>=7,<8"],
    "wandb": ["wandb>=0.20,<1"],
    "serve": SERVE,
    "demo": ["scikit-learn>=1.6,<2", "matplotlib>=3.10,<4"],
}

setup(
    name="internvl_megatron",
    version=version(),
    description="Train InternVL3 with 3D parallelism on Megatron Core",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.12",
    packages=find_packages(include=["internvl_megatron*", "checkpoint_convert*"]),
    package_data={"internvl_megatron": ["py.typed", "serving/page.html"], "checkpoint_convert": ["py.typed"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["internvl-megatron=internvl_megatron.__main__:main"],
        "lmms_eval.models": ["internvl_megatron=internvl_megatron.evaluate.lmms_eval_plugin:manifest"],
    },
)
