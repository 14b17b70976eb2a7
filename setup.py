"""Slotstream's packages and dependencies.

Lower bounds are the oldest versions whose interfaces the code uses; constraints.txt holds the versions that the tests ran with.
"""

from pathlib import Path

from setuptools import find_packages, setup

S3 = "boto3>=1.34,<2"
VIDEO = "av>=14,<19"  # PyAV; newer ones are untested
PHYSICS = "pybullet>=3.2.6,<4"
TENSORBOARD = "tensorboard>=2.14,<3"
WANDB = "wandb>=0.16,<1"

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
        "data_pipeline": ["sources/physics/card.md"],
        "trainer": ["report/page.html"],
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
        "awscrt>=0.27,<1",  # CRC-32C at twice the speed of the alternatives
        "pycocotools>=2.0.7",
        "rich>=13",
        "requests>=2.31",
        "urllib3>=2.3",
    ],
    extras_require={
        # attention kernels; the wheel has no CPU operator and exists for Linux alone, so it is asked for where CUDA is
        "cuda": ["xformers>=0.0.35; platform_system == 'Linux' and platform_machine == 'x86_64'"],
        # source=video_files
        "video": [VIDEO],
        # source=physics_movi_c and physics_movi_e; where there is no wheel it is compiled, which takes minutes
        "physics": [PHYSICS],
        # data.root=s3://...
        "s3": [S3],
        # observe.mirror, trainer.observe.mirror
        "tensorboard": [TENSORBOARD],
        "wandb": [WANDB],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "pre-commit>=3.6",
            "psutil>=5.9",
            # its versions end in Grafana's: the oldest that loads the dashboards
            "grafana-foundation-sdk==1769699998!10.1.0; python_version >= '3.11'",
            S3,
            TENSORBOARD,
            WANDB,
            "moto[s3]>=5,<6",  # with flask: a server that boto3 takes for S3
            "flask>=3",
            "flask-cors>=5",
            VIDEO,
            # where there are wheels; elsewhere the tests of the physics source are skipped
            f"{PHYSICS}; python_version < '3.12' and platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
)
