"""Passkey prompts with their answers, as training data: what `data: [{path: passkeys.npz}]` of a recipe reads.

    python tests/benchmarks/passkeys.py SMOLLM2 --length 512 --documents 8000 --out passkeys.npz

Every document is one prompt of `longctx eval --task passkey` at that length, the key at one of 50 depths; seeds differ from those of
an evaluation.
"""

import argparse
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from hf_longctx.task import load_task

DEPTHS, SEED = 50, 1_000_000  # an evaluation has --seed 0 unless told otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--documents", type=int, default=8000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    task = load_task({"name": "passkey", "n": -(-options.documents // DEPTHS), "depths": DEPTHS})
    cells = task.cells(AutoTokenizer.from_pretrained(options.tokenizer), [], options.length, SEED)
    order = np.random.default_rng(SEED).permutation(len(cells))[: options.documents]
    np.savez(options.out, **{f"{i}": cells[j].ids for i, j in enumerate(order)})
    print(f"{options.out}: {len(order)} documents of {options.length} tokens")


if __name__ == "__main__":
    main()
