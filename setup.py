"""Packaging of aclip: the folder ``kernels/`` is installed as ``aclip.kernels`` (kernels/README.md
says why)."""

from setuptools import find_packages, setup

# The converters of parquet tables, and of COCO and RedCaps.
CONVERT = ["pyarrow>=18.0", "ijson>=3.3"]
WANDB = "wandb==0.31.0"

setup(
    name="aclip",
    version="0.1.0",
    description="Pre-trains CLIP-style models with attentive token removal (A-CLIP) on DeepSpeed",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["aclip", "aclip.*"])
    + ["aclip.kernels"]
    + [f"aclip.kernels.{name}" for name in find_packages("kernels")],
    package_dir={"aclip.kernels": "kernels"},
    package_data={"aclip": ["recipes/*.yaml", "evaluation/*.yaml", "evaluation/sets/*.yaml"]},
    install_requires=[
        "torch==2.14.1",
        "torchvision==0.29.1",
        "deepspeed==0.19.8",
        "timm==1.0.31",
        "transformers==5.24.0",
        "open_clip_torch==3.3.0",
        # timm, transformers and open_clip bring it too.
        "huggingface_hub==2.4.0",
        # It belongs to the stack that users fix; only `launch/benchmark.py --loader` imports it.
        "webdataset==1.0.2",
        "pydantic==2.14.4",
        "pyyaml==6.0.4",
        "safetensors>=0.6",
        "fsspec>=2025.3",
        "filelock>=3.16",
        # DeepSpeed needs it too; gpu-check finds a launcher's ranks with it.
        "psutil>=5.9",
        "braceexpand>=0.1.7",
        "tqdm>=4.66",
        "numpy>=2.0",
        "pillow>=11.0",
        "simplejpeg>=1.9",
        "matplotlib>=3.10",
        "tensorboard>=2.19",
    ],
    extras_require={
        "convert": CONVERT,
        "wandb": [WANDB],
        # Class prompts of the papers' sets; scipy reads the files of some.
        "eval": ["clip-benchmark==1.6.2", "scipy>=1.14"],
        "dev": [
            *CONVERT,
            WANDB,
            "scikit-learn>=1.6",
            "pytest==9.2.0",
            "pytest-benchmark==5.3.1",
            "pytest-xdist>=3.6",
            "ruff==0.17.6",
            "pre-commit>=4.0",
            "aiohttp>=3.12",
            "ninja",
        ],
    },
    classifiers=["Private :: Do Not Upload", "License :: OSI Approved :: MIT License"],
)
