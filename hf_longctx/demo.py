"""The whole pipeline on a tiny model that ships with the package, in minutes on a laptop CPU.

The model (trained window 256, recipe `demo-base`) is measured past its window, patched, fine-tuned with skip-wise positions
at the short window and measured again. Its text is the documentation that every Python ships.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from hf_longctx.evaluation import built_in_text
from hf_longctx.task import encode

MODEL = Path(__file__).parent / "demo_model"


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
    np.savez(path, **{f"{i:06d}": d.astype(np.uint16) for i, d in enumerate(found)})


if __name__ == "__main__":
    from transformers import AutoTokenizer

    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(out)
    write_data(out / "data.npz", AutoTokenizer.from_pretrained(out), documents=1000, seed=0)
