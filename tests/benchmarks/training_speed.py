"""Training speed and memory: ours beside plain Trainer + PEFT, same model, data, positions, LoRA, batch. One CUDA GPU.

    python tests/benchmarks/training_speed.py MODEL TOKENS.npz [--batch 16] [--steps 30] [--only plain,ours]

Prints, from one run: tokens/s and peak memory of each contender and their ratios; ours at targets from 16k to 1M; memory of an
evaluation at 131,072 tokens. The first `--warm` steps, in which kernels are compiled, are not timed.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_longctx import patch, planning, training
from hf_longctx.data import collate
from hf_longctx.recipe import parse_recipe
from hf_longctx.scoring import score_cells
from hf_longctx.task import Cell


class Clock(TrainerCallback):
    """Seconds of the steps after the first `warm`."""

    def __init__(self, warm: int):
        self.warm, self.seconds, self.steps = warm, 0.0, 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warm:
            torch.cuda.synchronize()
            self.start = time.perf_counter()
        if state.global_step == state.max_steps:
            torch.cuda.synchronize()
            self.seconds, self.steps = time.perf_counter() - self.start, state.global_step - self.warm


def recipe(options, factor: int = 4):
    return parse_recipe(
        {
            "model": {"name": options.model, "attn_implementation": "sdpa"}, "window": options.window, "data": {"path": options.data},
            "methods": [{"name": "yarn", "factor": factor}, {"name": "pose"}], "lora": {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"},
            "train": {
                "max_steps": options.steps, "per_device_train_batch_size": options.batch, "learning_rate": 1e-4, "save_strategy": "no",
                "disable_tqdm": True, "logging_steps": 1000,
            },
            "compile": "on",
        }
    )  # fmt: skip


def measure(options, trainer: Trainer) -> tuple[float, float]:
    clock = Clock(options.warm)
    trainer.add_callback(clock)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return clock.steps * options.batch * options.window / clock.seconds, torch.cuda.max_memory_allocated() / 2**30


def ours(options, folder: Path, factor: int = 4) -> tuple[float, float]:
    what = planning.plan(recipe(options, factor))
    model, _ = training._build_model(what)
    return measure(options, training._trainer(what, model, training._arguments(what.recipe, folder)))


def plain(options, folder: Path, **flags) -> tuple[float, float]:
    """What a user would write: AutoModel, PEFT, Trainer, with PoSE positions and the all-ones mask."""
    what = planning.plan(recipe(options))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, attn_implementation="sdpa").cuda()
    patch(model, {"name": "yarn", "factor": 4})
    model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=options.steps, per_device_train_batch_size=options.batch, learning_rate=1e-4, bf16=True, save_strategy="no",
        disable_tqdm=True, logging_steps=1000, remove_unused_columns=False, dataloader_num_workers=2, **flags,
    )  # fmt: skip
    return measure(options, Trainer(model=model, args=arguments, train_dataset=what.dataset, data_collator=collate))


def evaluation(options, folder: Path, length: int = 131072) -> tuple[float, float]:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).cuda().eval()
    cell = Cell(np.random.default_rng(0).integers(3, 40000, length), length - 1024, length)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    score_cells(model, [cell])
    torch.cuda.synchronize()
    return length / (time.perf_counter() - start), torch.cuda.max_memory_allocated() / 2**30


CONTENDERS = {
    "plain": ("Trainer + PEFT", plain),
    "liger": ("Trainer + PEFT, use_liger_kernel", partial(plain, use_liger_kernel=True)),
    "ours": ("longctx", ours),
    "64k": ("longctx, target 64k", partial(ours, factor=8)),
    "1M": ("longctx, target 1M", partial(ours, factor=128)),
    "evaluation": ("evaluation at 131,072 tokens", evaluation),
    "compile": ("Trainer + PEFT, torch_compile", partial(plain, torch_compile=True)),
    "both": ("Trainer + PEFT, torch_compile, use_liger_kernel", partial(plain, torch_compile=True, use_liger_kernel=True)),
}


def run(key: str, options) -> tuple[float, float]:
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        return CONTENDERS[key][1](options, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=10)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="some of these, the first of them to compare with")
    options = parser.parse_args()
    rows = {}
    for key in options.only.split(","):
        name = CONTENDERS[key][0]
        try:  # each in a process of its own: one that breaks CUDA must not cost the others
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows[name] = pool.submit(run, key, options).result()
            print(f"  {name}: {rows[name][0]:,.0f} tok/s, {rows[name][1]:.2f} GiB", flush=True)
        except Exception as error:
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, {options.batch} x {options.window} tokens a step")
    print(f"{'':50} {'tok/s':>10} {'x first':>8} {'GiB':>7} {'x first':>8}")
    base = next(iter(rows.values()))
    for name, (speed, memory) in rows.items():
        print(f"{name:50} {speed:>10,.0f} {speed / base[0]:>8.2f} {memory:>7.2f} {memory / base[1]:>8.2f}")


if __name__ == "__main__":
    main()
