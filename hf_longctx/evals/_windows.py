"""What tasks that read whole stretches of documents share."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hf_longctx.task import opening


def whole_windows(name: str, tokenizer: Any, documents: Sequence[np.ndarray], length: int, most: int, of: int) -> Iterator[tuple[np.ndarray, int]]:
    """Windows of `length` tokens, the opening one included, with the number of their document.

    Up to `most` of a document, evenly spaced and without overlap, from the first `of` documents that are long enough. Raises
    ValueError, naming the task, if the length is too short to say anything or no document is long enough.
    """
    first = opening(tokenizer)
    if length < 2 + len(first):
        raise ValueError(f"{name} needs at least {2 + len(first)} tokens, got {length}")
    chosen = [d for d in documents if len(d) >= length][:of]
    if not chosen:
        raise ValueError(f"no document has {length} tokens (the longest has {max(map(len, documents), default=0)}); give --data with longer ones")
    for number, text in enumerate(chosen):
        for start in np.linspace(0, len(text) - length, min(most, len(text) // length)).round().astype(int):
            yield np.concatenate([first, text[start : start + length - len(first)].astype(np.int64)]), number
