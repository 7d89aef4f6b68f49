"""What methods that add to token embeddings share. No torch at import."""

import math
from dataclasses import dataclass

from hf_longctx.method import Method, require


@dataclass(frozen=True)
class Additive(Method):
    """A method of the embedding slot, whose learned gain starts at `gain`."""

    gain: float = 0.0  # where it starts; 0 leaves a pretrained model as it is

    def __post_init__(self) -> None:
        require(math.isfinite(self.gain), f"gain must be a finite number, got {self.gain}")
