"""Slotstream's packages and dependencies.

Lower bounds are the oldest versions whose interfaces the code uses; constraints.txt holds the versions that the tests ran with.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="slotstream",
    version="0.1.0",
    description="Distributed training of video object-centric models on streamed feature shards",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["trainer*", "data_pipeline*", "cluster*"]), "configs"],
    package_data={
        "configs": ["*.yaml", "*/*.yaml"],
        "trainer": ["observe/report.html"],
        "cluster": ["monitoring/**/*.yml", "monitoring/**/*.yaml", "monitoring/**/*.json", "monitoring/*.yml", "monitoring/*.md"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",  # older ones lack the output hooks, newer ones are untested: only trainer/engine.py knows it
        "webdataset>=1.0.2",
        "ray>=2.40",
        "submitit>=1.5.2",
        "hydra-core>=1.3.2,<1.4",
        "prometheus-client>=0.20",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10",
        "safetensors>=0.4.3",
        "google-crc32c>=1.5",
        "pycocotools>=2.0.7",
        "rich>=13",
    ],
    extras_require={
        # attention kernels; the wheel has no CPU operator and exists for Linux alone, so it is asked for where CUDA is
        "cuda": ["xformers>=0.0.35; platform_system == 'Linux' and platform_machine == 'x86_64'"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "pre-commit>=3.6",
            "psutil>=5.9",
        ],
    },
)
