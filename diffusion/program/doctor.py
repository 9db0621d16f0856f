"""What this installation consists of, and what to change about it: the command `doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pydeqsolve import build_info

from ..models.checkpoint import SHIPPED
from .machine import cores

EXTRAS = {"matplotlib": "viz", "sklearn": "data", "PIL": "data", "diffusers": "diffusers"}
DISTRIBUTIONS = (
    "pydeqsolve",
    "torch",
    "numpy",
    "scipy",
    "safetensors",
    "matplotlib",
    "scikit-learn",
    "pillow",
    "diffusers",
)


def environment() -> dict[str, Any]:
    """Return versions, processor, devices and thread settings, ready for JSON."""
    info = build_info()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "versions": {name: _version(name) for name in DISTRIBUTIONS},
        "native": info["native"],
        "native_error": info["native_error"],
        "instruction_set": info["cpu_isa"],
        "cuda_architectures": info["cuda_architectures"],
        "torch_cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "thread_variables": {k: os.environ[k] for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if k in os.environ},
        "checkpoints": sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) if SHIPPED.is_dir() else [],
    }


def processor() -> str:
    """Return the name of the processor as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def advice(facts: dict[str, Any]) -> list[str]:
    """Return what to change, one line each; empty when nothing stands out."""
    lines = []
    if not facts["native"]:
        lines.append(
            f"the native module is not loaded ({facts['native_error']}): the PyTorch reference is used, several times "
            "slower; install again with a C++17 compiler at hand"
        )
    if facts["devices"] and not facts["cuda_architectures"]:
        lines.append("there is a GPU but the module has no CUDA kernels: install again with nvcc on the PATH")
    if facts["cuda_architectures"] and not facts["devices"]:
        lines.append("CUDA kernels are built in, but torch sees no GPU: solves run on the CPU")
    if facts["threads"] > 1 and facts["wait_policy"] != "PASSIVE":
        lines.append("set OMP_WAIT_POLICY=PASSIVE before torch is imported: idle threads that spin starve the others")
    if facts["threads"] > facts["cores"]:
        lines.append(f"torch uses {facts['threads']} threads on {facts['cores']} cores: set OMP_NUM_THREADS lower")
    missing = sorted({extra for module, extra in EXTRAS.items() if importlib.util.find_spec(module) is None})
    if missing:
        lines.append(f"not installed: pip install 'pydeqsolve[{','.join(missing)}]'")
    if not facts["checkpoints"]:
        lines.append("the shipped checkpoints are missing: install again from a wheel or a whole source tree")
    return lines


def run_doctor(args: Namespace) -> dict[str, Any]:
    """Return the summary of the command `doctor`."""
    facts = environment()
    return {"command": "doctor", "prefix": sys.prefix, **facts, "advice": advice(facts)}
