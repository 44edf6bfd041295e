"""What the figures were measured on, without names of hosts, people or directories."""

import os
import re
from pathlib import Path
from typing import Any

CAPABILITIES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")  # as /proc/cpuinfo spells them
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # with them a processor computes as a lesser one would
DENSE_BF16_PEAK = {"NVIDIA H200": 790e12}  # FLOP/s of the largest matrix products, measured; other devices: no share


def describe() -> dict[str, Any]:
    """The processor, how much of it may be used, the GPU (None where there is none) and the build of torch."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    return {
        **parse_cpuinfo(cpuinfo.read_text() if cpuinfo.exists() else ""),
        "limited_to": next((os.environ[name].lower() for name in LIMITS if os.environ.get(name)), None),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def parse_cpuinfo(text: str) -> dict[str, Any]:
    """Name and capabilities from the text of /proc/cpuinfo.

    A virtual machine may hide the product behind a name like "Intel(R) Xeon(R) Processor": family and model stay.
    """
    fields: dict[str, str] = {}
    for name, value in re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE):
        fields.setdefault(name, value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    cpu = fields.get("model name", f"{os.uname().machine} processor")
    if "cpu family" in fields:
        cpu += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return {"cpu": cpu, "capabilities": [flag for flag in CAPABILITIES if flag in flags]}


def sentence(machine: dict[str, Any]) -> str:
    """One line about the machine."""
    gpu = f"{machine['gpu']}; " if machine["gpu"] else ""
    capabilities = ", ".join(machine["capabilities"]) or "no vector extensions listed"
    if machine.get("limited_to"):
        capabilities += f", limited to {machine['limited_to']}"
    count = f"{machine['cores']} cores, {machine['threads']} threads"
    return f"{gpu}{machine['cpu']}, {count}, {capabilities}; torch {machine['torch']}"


def slug(machine: dict[str, Any]) -> str:
    """A file name for the results of this kind of machine."""
    name = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores {machine.get('limited_to') or ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")
