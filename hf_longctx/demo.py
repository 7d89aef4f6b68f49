"""The whole pipeline on a tiny model that ships with the package, in minutes on a laptop CPU.

The model (trained window 256, recipe `demo-base`) is measured past its window, patched, fine-tuned with skip-wise positions
at the short window and measured again. Its text is the documentation that every Python ships.
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_longctx import checkpoint, files
from hf_longctx.evaluation import built_in_source, built_in_text, evaluate
from hf_longctx.recipe import parse_recipe, read_recipe
from hf_longctx.reporting import plot_results
from hf_longctx.schema import format_size
from hf_longctx.task import encode

MODEL = Path(__file__).parent / "demo_model"
LENGTHS = (256, 1024, 2048, 4096)
NEXT = """\
The same on a real model:
  longctx patch HuggingFaceTB/SmolLM2-135M -m yarn:factor=4 --out smollm2-8k
  longctx finetune smollm2-135m-32k --dry-run
  longctx finetune smollm2-135m-32k --out smollm2-40k
  longctx eval smollm2-40k --lengths 8k,16k,32k --out results"""


def run(out: str | Path, say: Callable[[str], None] = print, keys: int = 1, steps: int | None = None) -> list[dict[str, Any]]:
    """Measure, patch, fine-tune and measure the built-in model; write models, results and a picture to `out`.

    Args:
        out: a new or empty folder.
        say: called with each line for the user.
        keys: passkeys at each of ten depths.
        steps: training steps, if fewer than the recipe's are enough.

    Returns:
        The rows of all three evaluations.

    Raises:
        ValueError: `out` is in use.
    """
    begun = time.perf_counter()
    folder = files.check_output(out, overwrite=False)
    base, tuned, data = folder / "model", folder / "tuned", folder / "data.npz"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(MODEL, base)
    window = checkpoint.inspect_model(base)["window"]
    say(f"A {sum(f.stat().st_size for f in base.glob('*.safetensors')) / 2**20:.1f} MiB LLaMA-type model, trained on windows of {window} tokens.")
    say(f"Text: {built_in_source()}. Passkey retrieval, {10 * keys} keys a length:")
    write_data(data, checkpoint.load(base).tokenizer, documents=40, seed=1)
    values = read_recipe("demo").to_dict()
    values["model"]["name"], values["data"][0]["path"] = str(base), str(data)
    values["train"] |= {"disable_tqdm": True} | ({"max_steps": steps} if steps else {})
    recipe = parse_recipe(values)
    methods = recipe.methods[0]
    rows: list[dict[str, Any]] = []
    head = f"{'':26}" + "".join(f"{format_size(n):>8}" for n in LENGTHS)
    say(head)
    for label, model, change in (("as it is", base, ()), (f"patched ({methods['name']})", base, methods)):
        rows += _measure(label, model, folder / "results" / label.split()[0], change, keys, say)
    before = time.perf_counter()
    from hf_longctx.training import finetune

    finetune(recipe, tuned)
    took = time.perf_counter() - before
    rows += _measure("and fine-tuned with PoSE", tuned, folder / "results" / "tuned", (), keys, say)
    (picture,) = plot_results(rows, folder)
    say(f"Fine-tuning: {recipe.train['max_steps']} steps at a window of {recipe.window}, {took:.0f} s; all together {time.perf_counter() - begun:.0f} s.")
    say(f"{picture}")
    say(NEXT)
    return rows


def _measure(label: str, model: Path, out: Path, methods: Any, keys: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    found = evaluate(model, [{"name": "passkey", "n": keys}], LENGTHS, out=out, methods=methods)
    rows = [row | {"model": label} for row in found]
    overall: Sequence[dict[str, Any]] = [row for row in rows if row["depth"] is None and row["metric"] == "accuracy"]
    say(f"{label:26}" + "".join(f"{row['value']:>8.2f}" for row in overall))
    return rows


def train_tokenizer(folder: Path, vocabulary: int = 1024) -> None:
    """A byte-level BPE tokenizer of the built-in text, one token a digit, saved to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([built_in_text()], trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>", model_max_length=256).save_pretrained(folder)


def repeated_spans(tokenizer: Any, documents: int, blocks: int, window: int, seed: int) -> list[np.ndarray]:
    """Real text in which some spans come again: what a model must look back for, at every distance within a window.

    Each document is `blocks` stretches of `window` tokens of the built-in text; into each stretch, two to four spans are
    written two or three times at random places. A span is a few words of the text; a few words and a number; or a sentence
    such as "The list object is 48213." about random words.
    """
    spans = _Spans(tokenizer, np.random.default_rng(seed))
    return [np.concatenate([spans.stretch(window) for _ in range(blocks)]) for _ in range(documents)]


class _Spans:
    """Random stretches of text with repeated spans."""

    def __init__(self, tokenizer: Any, rng: np.random.Generator):
        text = built_in_text()
        self.rng = rng
        self.text = encode(tokenizer, text)
        self.digits = np.array([encode(tokenizer, str(d))[0] for d in range(10)])
        self.space, self.the, self.verb, self.stop = (encode(tokenizer, piece) for piece in (" ", " The", " is", "."))
        words = sorted({word for word in text.split() if word.isalpha()})
        self.words = [encode(tokenizer, " " + word) for word in words]

    def stretch(self, length: int) -> np.ndarray:
        rng = self.rng
        start = rng.integers(len(self.text) - length)
        document = self.text[start : start + length].copy()
        for _ in range(rng.integers(2, 5)):
            span = self._span()
            for _ in range(rng.integers(2, 4)):
                place = rng.integers(length - len(span))
                document[place : place + len(span)] = span
        return document

    def _span(self) -> np.ndarray:
        rng = self.rng
        kind = rng.integers(3)
        at = rng.integers(len(self.text) - 16)
        words = self.text[at : at + rng.integers(3, 16)]
        if kind == 0:
            return words
        number = rng.choice(self.digits, 5 + rng.integers(3))
        if kind == 1:
            return np.concatenate([words[:8], self.space, number])
        about = [self.words[rng.integers(len(self.words))] for _ in range(rng.integers(1, 4))]
        return np.concatenate([self.the, *about, self.verb, self.space, number, self.stop])


def write_data(path: Path, tokenizer: Any, documents: int, seed: int, window: int = 256) -> None:
    """`repeated_spans` as an .npz that a recipe's `data` reads."""
    found = repeated_spans(tokenizer, documents, 64, window, seed)
    np.savez(path, **{f"{i:06d}": d.astype(np.uint16) for i, d in enumerate(found)})  # type: ignore[arg-type]


if __name__ == "__main__":
    from transformers import AutoTokenizer

    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(out)
    write_data(out / "data.npz", AutoTokenizer.from_pretrained(out), documents=1000, seed=0)
