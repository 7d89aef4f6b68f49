"""hf-longctx: give a language model a longer context window than it was trained with, cheaply, and prove it.

Public names are resolved on first use: `import hf_longctx` costs no torch.
"""

import sys
from importlib import import_module
from typing import Any

# At once, not on first use: the function shares its name with the module, which would hide it once anything else imported that.
from hf_longctx.method import Method, load_methods, method, method_names
from hf_longctx.on_import import on_import

__version__ = "0.1.0"

_HOME = {
    "patch": "checkpoint", "load": "checkpoint", "save": "checkpoint", "merge": "checkpoint", "inspect_model": "checkpoint",
    "Recipe": "recipe", "read_recipe": "recipe",
    "finetune": "training", "dry_run": "planning",
    "evaluate": "evaluation",
    "write_report": "html_report",
    "push": "hub",
    "SkipWiseCollator": "interop",
}  # fmt: skip
__all__ = ["Method", "__version__", "load_methods", "method", "method_names", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register() -> None:
    """Models with a bias, attention or embedding method have a model_type of ours, which AutoConfig has to know."""
    modeling = sys.modules.get(f"{_AUTO}.modeling_auto")
    if modeling is None or hasattr(modeling, "AutoModelForCausalLM"):  # else it is being imported, and its own turn comes
        import_module(f"{__name__}.integration.configs")


_AUTO = "transformers.models.auto"
for _part in ("configuration_auto", "modeling_auto"):
    on_import(f"{_AUTO}.{_part}", _register)
