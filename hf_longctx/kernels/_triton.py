"""Triton where there is one: importing the kernels needs none."""

from collections.abc import Callable, Sequence
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
except ImportError:
    triton = tl = None


def jit(sizes: Sequence[str]) -> Callable[[Any], Any]:
    """A kernel that is not compiled anew for another value of the arguments in `sizes`."""

    def compiled(function: Any) -> Any:
        if triton is None:
            return function
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        return triton.jit(function, do_not_specialize=[name for name in sizes if name in arguments])

    return compiled


@jit(())
def _nothing():  # type: ignore[no-untyped-def]
    pass


_INTERPRETED = triton is not None and isinstance(_nothing, InterpretedFunction)  # here, since torch.compile cannot trace the question


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on any tensor, slowly: TRITON_INTERPRET=1 was set before the first import."""
    return _INTERPRETED
