"""Tokens/s of a training step of a SmolLM2-shaped model with a bias in RoPE's place, beside stock RoPE.

    python tests/benchmarks/bias_training.py [--rows 8] [--length 4096] [--layers 30] [--pose] [--blocks] [--compile]

On a CUDA GPU in bfloat16, elsewhere on one CPU thread in float32. Random weights, gradient checkpointing, forward and backward of the
decoder; the optimizer costs the same for all. Prints tokens/s, their ratio to stock and peak memory. With --blocks also the blocks of
SDPA that serve where the Triton kernel does not; with --pose, at positions of PoSE's two chunks up to 16,384; with --compile, all with
their layers compiled, as `longctx finetune` has them.
"""

import argparse
import statistics
import time
import warnings
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_longctx import method
from hf_longctx.integration import attention
from hf_longctx.method import load_methods
from hf_longctx.patching import patch_model
from hf_longctx.training import compile_layers

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
BIASES = {
    "stock RoPE, SDPA": [],
    "alibi": [{"name": "alibi"}],
    "mkl_alibi, preset mep": [{"name": "mkl_alibi", "preset": "mep"}],
    "mkl_alibi, preset mep_learned": [{"name": "mkl_alibi", "preset": "mep_learned", "learn_weights": True}],
    "kerple, learned": [{"name": "kerple"}],
    "sandwich": [{"name": "sandwich"}],
    "fire, learned": [{"name": "fire"}],
}


TARGET = 16384
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def build(bias, layers: int, compiled: bool):
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = AutoConfig.for_model("llama", **SMOLLM2 | {"num_hidden_layers": layers})
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).to(DEVICE)
    if bias:
        patch_model(model, load_methods([{"name": "nope", "target": TARGET}, *bias]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_layers(model)
    return model.train()


def positions(rows: int, length: int, pose: bool) -> torch.Tensor:
    """[rows, length]"""
    drawn, made = np.random.default_rng(0), method("pose", target=TARGET)
    return torch.from_numpy(np.stack([made.positions(length, TARGET, drawn)[1] if pose else np.arange(length) for _ in range(rows)])).to(DEVICE)


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def speed(bias, options: argparse.Namespace) -> tuple[float, float]:
    """Tokens/s, the median step after two, and GiB on the GPU."""
    rows, length, repeats, pose = options.rows, options.length, options.repeats, options.pose
    model, ids, taken = build(bias, options.layers, options.compile), torch.randint(0, SMOLLM2["vocab_size"], (rows, length), device=DEVICE), []
    where = positions(rows, length, pose)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 2):
        start = now()
        model.zero_grad()
        hidden = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=where, use_cache=False).last_hidden_state
        (hidden.float() ** 2).mean().backward()
        taken.append(now() - start)
    return rows * length / statistics.median(taken[2:]), torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pose", action="store_true")
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}, {options.rows} x {options.length} tokens{', compiled' * options.compile}", flush=True)
    stock = None
    for blocks in (False, True) if options.blocks else (False,):
        for name, bias in BIASES.items():
            if blocks and not bias:
                continue
            with patch.object(attention.kernel, "serves", (lambda x: False) if blocks else attention.kernel.serves):
                tokens, memory = speed(bias, options)
            stock = stock or tokens
            print(f"{name + (', in blocks' if blocks else ''):42} {tokens:10,.0f} tok/s {stock / tokens:6.2f}x stock's time {memory:6.2f} GiB", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
