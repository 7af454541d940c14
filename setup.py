"""Installs megatron_taipan with its command line programs.

A range for torch is given here because users bring their own build; `make` and CI install the pinned one first (see
Makefile), since a bare range on a machine without a GPU would fetch gigabytes of CUDA libraries.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOMS = ("megatron_taipan", "data_prep", "checkpoints")
HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "megatron_taipan/__init__.py").read_text(), re.M).group(1)
# The oldest transformers that an export accepts; a later one than was tested is warned of when a model is loaded.
RELEASES = dict(re.findall(r'^(\w+) = "(.+?)"', (HERE / "megatron_taipan/versions.py").read_text(), re.M))
MAJOR, MINOR = RELEASES["TORCH_NEWEST"].split(".")

setup(
    name="megatron-taipan",
    version=VERSION,
    description="Pretraining of Taipan: Mamba-2 blocks with selective attention, tensor parallel, through DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # Namespace packages: folders that hold only data (configs, recipes) have no __init__.py. Of launch/ the presets
    # alone are installed, inside the package: a top-level package called launch would be everybody's.
    packages=[
        *find_namespace_packages(include=[f"{room}{rest}" for room in ROOMS for rest in ("", ".*")]),
        "megatron_taipan.configs",
    ],
    package_dir={"megatron_taipan.configs": "launch/configs"},
    package_data={"": ["*.yaml", "*.md", "*.jsonl.gz", "*.json"]},
    python_requires=">=3.10",
    install_requires=[
        f"torch>={RELEASES['TORCH_OLDEST']},<{MAJOR}.{int(MINOR) + 1}",  # a run under another one warns
        "deepspeed>=0.19.8,<0.20",
        "pydantic>=2.10,<3",
        "pyyaml>=6",
        "numpy>=2",
        "tqdm>=4.66",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
        f"transformers>={RELEASES['TRANSFORMERS_OLDEST']},<6",
        "tokenizers>=0.22",
        "sentencepiece>=0.2.3",  # earlier releases end the process where a required character is not in the text
        "protobuf>=5",
        "tiktoken>=0.9",
        "fastokens>=0.3.5",
        "safetensors>=0.5",
        "datasets>=4",
        "fsspec>=2025.3",
        "pyarrow>=19",
        "zstandard>=0.23",
        "isal>=1.7",
        "orjson>=3.10",
        "xxhash>=3.4",
    ],
    extras_require={
        # These compile against the torch that is installed: `pip install --no-build-isolation '.[gpu]'` after torch.
        # The oldest releases are those of megatron_taipan/ops/libraries.py.
        "gpu": [
            "mamba-ssm>=2.3.2",
            "causal-conv1d>=1.7",
            "flash-attn>=2.8",
            "liger-kernel>=0.8.2",
            "cut-cross-entropy>=25.1.1",
        ],
        "wandb": ["wandb>=0.19"],
        # `tokenize` of https://, s3:// and gs:// addresses; hf:// takes nothing more
        "remote": ["aiohttp>=3.9", "s3fs>=2025.3", "gcsfs>=2025.3"],
        # evaluation zero-shot, `lm_eval --model hf` on an export; tests/hf/test_lm_eval.py installs the pinned one
        "eval": ["lm_eval>=0.4.13", "accelerate>=1"],
        # adapters and preference tuning of an export; tests/hf/test_libraries.py installs the pinned ones for itself
        "tune": ["peft>=0.19", "trl>=1.5", "accelerate>=1.10"],
        # Beside these the tests read files back with Megatron's own reader: `pip install --no-deps megatron-core`
        # (its dependencies would pull another torch).
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.17", "mypy>=1.15", "lxml>=5"],
    },
    entry_points={
        "console_scripts": [
            "taipan-data = data_prep.cli:program",
            "taipan-pretrain = megatron_taipan.pretrain:program",
            "taipan-export = checkpoints.export_hf:main",
        ]
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        # What passed: every test under 3.11 (CI), the GPU tests under 3.12. Under 3.13 most quick tests passed with
        # torch 2.6, below our range, and the rest could not run on it; under 3.10 what needs no torch passed. Both
        # resolve to wheels.
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
