"""What made a number, beside its inputs: machine and versions."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from hf_longctx import __version__


def provenance() -> dict[str, Any]:
    """`machine`, the accelerator's name or the processor's kind; `versions`, by package."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"machine": machine, "versions": versions | {"hf_longctx": __version__, "python": platform.python_version()}}


def in_words(found: Mapping[str, Any]) -> list[str]:
    """The versions that matter most to a reader."""
    versions = found.get("versions", {})
    return [f"{key} {versions[key]}" for key in ("hf_longctx", "transformers", "torch") if key in versions]
