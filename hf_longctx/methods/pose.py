"""PoSE, positional skip-wise training (Zhu et al. 2023)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_longctx.method import Method, require
from hf_longctx.schema import Size

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Pose(Method):
    """Chunks of a short window at far-apart positions, up to the target.

    The window is cut into `chunks` of random length; chunk i is moved right by u_i, u_0 = 0 and
    u_i ~ U{u_{i-1}, ..., target - window}, so that positions up to the target are met with `window` tokens.

    `form: paper` draws chunk lengths freely (section 3.2). `form: code` is the published script: two chunks, the first at
    most half the window, text from the first 5 windows of the document.
    `content` says which text a moved chunk holds: `none`: the text that follows; `random`: v_i ~ U{v_{i-1}, ..., what the
    document allows}, independent of u_i, as the paper's main runs; `aligned`: v_i = u_i, the text that really stands there,
    as far as the document reaches.
    `pin_tail` is the probability that the last chunk ends exactly at the target: with two chunks only a few per cent of
    examples touch the longest distances otherwise.
    `plain` is the share of examples that stay contiguous text at its own positions."""

    paper = "arXiv:2309.10400"
    target: Size | None = None  # tokens; by default the patched model's window
    chunks: int = 2
    form: Literal["paper", "code"] = "paper"
    content: Literal["none", "random", "aligned"] = "random"
    pin_tail: float = 0.0
    plain: float = 0.0

    def __post_init__(self) -> None:
        require(self.chunks >= 2, f"chunks must be at least 2, got {self.chunks} (for one chunk use plain)")
        require(0 <= self.pin_tail <= 1, f"pin_tail is a probability, got {self.pin_tail:g}")
        require(0 <= self.plain < 1, f"plain is a share below 1, got {self.plain:g} (for 1 use the method plain)")
        require(self.form == "paper" or self.chunks == 2, f"form: code has two chunks, got {self.chunks}; use form: paper")

    def positions(self, window: int, document_length: int, rng: "np.random.Generator") -> "tuple[np.ndarray, np.ndarray]":
        import numpy as np

        assert self.target is not None
        assert self.target >= window
        chunks = min(self.chunks, window)
        index = np.arange(window)
        chunk_of = np.searchsorted(self._cuts(window, chunks, rng), index, side="right")
        skips = self._offsets(chunks, self.target - window, rng)
        if rng.random() < self.pin_tail:
            skips[-1] = self.target - window
        reach = min(document_length, 5 * window) if self.form == "code" else document_length
        if self.content == "none":
            shifts = np.zeros_like(skips)
        elif self.content == "aligned":
            shifts = np.minimum(skips, reach - window)
        else:
            shifts = self._offsets(chunks, reach - window, rng)
        if rng.random() < self.plain:
            skips[:] = shifts[:] = 0
        return index + shifts[chunk_of], index + skips[chunk_of]

    def runs(self, window: int) -> int:
        return self.chunks

    def _cuts(self, window: int, chunks: int, rng: "np.random.Generator") -> "np.ndarray":
        """Where chunks 1, 2, ... start: sorted, distinct, within 1..window-1."""
        import numpy as np

        if self.form == "code":
            return rng.integers(1, (window + 1) // 2, size=1, endpoint=True)
        return np.sort(rng.choice(window - 1, size=chunks - 1, replace=False)) + 1

    @staticmethod
    def _offsets(chunks: int, room: int, rng: "np.random.Generator") -> "np.ndarray":
        """0, then each uniform between the one before it and `room`, both included."""
        import numpy as np

        offsets = np.zeros(chunks, dtype=np.int64)
        for i in range(1, chunks):
            offsets[i] = rng.integers(offsets[i - 1], room, endpoint=True)
        return offsets
