"""How sharp attention is under each scaling: entropy and largest weight of the softmax against the number of keys and the spread of their lengths.

    python tests/benchmarks/softmax.py [--keys 64 512 4096 32768] [--spread 0 0.5 1] [--draws 80]

Queries and keys are standard normal, head dimension 64, as in Bernhard 2023 (arXiv:2311.09406); a key's length is multiplied by
exp(spread * z - spread^2 / 2), z standard normal. The scalings are the library's own modules. Prints one table: entropy over
log(keys), 1 if all weights are equal, and the largest weight times the number of keys, then too; means over the draws.
"""

import argparse
import math

import torch

from hf_longctx import method
from hf_longctx.method import Frequencies, Shape

DIM, HEADS = 64, 8
SHAPE = Shape("llama", DIM * HEADS, 1, HEADS, HEADS, DIM, DIM, 10000.0, Frequencies((1.0,)), "default", 512)
ROWS = {
    "q k / sqrt(d)": None,
    "key_norm, by sum": {"name": "key_norm"},
    "key_norm, by mean": {"name": "key_norm", "by": "mean"},
    "key_norm, by max": {"name": "key_norm", "by": "max"},
    "log_n": {"name": "log_n"},
    "ssmax": {"name": "ssmax"},
}


def weights(spec: dict[str, str] | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """What the last query gives each key; q [1, heads, 1, dim], k [1, heads, keys, dim]."""
    keys = k.shape[2]
    if spec is not None:
        at = torch.tensor([[keys - 1]])
        q, k = method(**spec).attention(SHAPE)(q, k, at, at + 1, None)
    return (q @ k.mT / math.sqrt(DIM)).softmax(-1)


@torch.no_grad()
def measure(spec: dict[str, str] | None, keys: int, spread: float, draws: int) -> tuple[float, float]:
    """Entropy over log(keys), and the largest weight times `keys`."""
    made = torch.Generator().manual_seed(0)
    entropy, largest, heads = 0.0, 0.0, 0
    while heads < draws:
        q, k = (torch.randn(1, HEADS, size, DIM, generator=made, dtype=torch.float64) for size in (1, keys))
        k = k * torch.exp(spread * torch.randn(1, HEADS, keys, 1, generator=made, dtype=torch.float64) - spread**2 / 2)
        p = weights(spec, q, k)
        entropy += float(torch.special.entr(p).sum())
        largest += float(p.amax(-1).sum())
        heads += HEADS
    return entropy / heads / math.log(keys), largest / heads * keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="*", default=[64, 512, 4096, 32768])
    parser.add_argument("--spread", type=float, nargs="*", default=[0.0, 0.5, 1.0])
    parser.add_argument("--draws", type=int, default=80)
    options = parser.parse_args()
    columns = [(keys, spread) for spread in options.spread for keys in options.keys]
    print("| keys, spread | " + " | ".join(f"{keys}, {spread:g}" for keys, spread in columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for row, spec in ROWS.items():
        found = (measure(spec, keys, spread, options.draws) for keys, spread in columns)
        print(f"| {row} | " + " | ".join(f"{entropy:.3f}, {largest:.3g}" for entropy, largest in found) + " |", flush=True)


if __name__ == "__main__":
    main()
