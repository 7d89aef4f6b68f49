"""The token filter of LongMamba (Ye et al. 2025).

Theirs: channels that still remember after the trained length ("global") skip the tokens of small step size, so that they forget as
much over a long text as they did over a trained one. Ours, where the released code does otherwise: it clips the largest 10 to 20 % of
the step sizes before anything else, stretches the sorted ones of each sample to the target by interpolation, takes the entry after
the one that completes the sum, averages thresholds over samples, and has a table by length, applied to prompts above 3,000 tokens
and never to generated tokens. Here the step sizes of all windows are taken together and kept down to the one that completes the sum,
for one target, and the filter is on from the first token to the last, prompt or not, since what a cached token does must not depend
on how many came with it: below the target it forgets less than it could afford. Mamba-1 has a decay for each state of a channel; the
slowest decides.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Calibrated, Method, StateShape, StepSizes, require
from hf_longctx.schema import Size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_longctx.modules import Values


@dataclass(frozen=True)
class DeltaFilter(Method):
    """Delta_t := 0 where Delta_t < g_c, in the channels c whose state outlives the trained length: the token is skipped there.

    c is a channel of Mamba-1, a head of Mamba-2. Over `samples` windows of T = `trained` tokens, S_c is the mean of sum_t Delta_t in
    a window. c is global if exp(max_n A_cn S_c) > `threshold`; g_c = 0 elsewhere. Of all Delta_t of c in these windows, in falling
    order d_1 >= d_2 >= ..., g_c is the first d_k with d_1 + ... + d_k >= (T / `target`) (d_1 + d_2 + ...): in `target` tokens like
    these, what is kept sums to S_c."""

    paper = "arXiv:2504.16053"
    target: Size  # tokens that the model is meant for
    trained: Size  # tokens that it was trained on at once, which its configuration does not tell
    threshold: float = 1e-30  # of the decay over the trained length
    samples: int = 5

    def __post_init__(self) -> None:
        require(self.target > self.trained, f"target must be longer than trained, got {self.target} and {self.trained} tokens")
        require(0 < self.threshold < 1, f"threshold is a decay, between 0 and 1, got {self.threshold:g}")
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")

    def delta(self, shape: StateShape, layer: int) -> "nn.Module":
        from hf_longctx.modules import StepSize

        return StepSize(filtered, measured={"least": [math.nan] * shape.channels})

    @property
    def calibration(self) -> tuple[int, int] | None:
        return self.samples, self.trained

    def calibrate(self, steps: StepSizes) -> Calibrated:
        share = self.trained / self.target
        return Calibrated(self, [{"least": least_kept(delta, a, share, self.threshold)} for delta, a in steps.layers()])


def filtered(values: "Values", delta: "Tensor") -> "Tensor":
    return delta.masked_fill(delta < values["least"], 0)


def least_kept(delta: "Tensor", a: "Tensor", share: float, threshold: float) -> "Tensor":
    """g of each channel. delta [windows, tokens, channels], a [channels, states], share = trained / target."""
    import torch

    falling = delta.flatten(0, 1).sort(0, descending=True).values
    sums = falling.cumsum(0, dtype=torch.float64)
    count = (sums < share * sums[-1]).sum(0).clamp(max=len(falling) - 1)  # what comes before the first that completes the share
    least = falling.gather(0, count[None])[0]
    decay = a.max(1).values * sums[-1] / len(delta)
    return torch.where(decay > math.log(threshold), least, 0.0)
