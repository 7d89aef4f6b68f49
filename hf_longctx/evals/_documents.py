"""What RULER's question answering tasks share (Hsieh et al. 2024): the documents of a question among those of others."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import PositiveInt

from hf_longctx.task import TURN, Cell, Result, Scored, Task, accuracy, answers_found, encode, for_prompts, opening, pad_before, room_for

NEW = 32
INSTRUCTION = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
HEAD = f"{INSTRUCTION}\n\nThe following are given documents.\n\n"
QUESTION = f"\n\n{INSTRUCTION}\n\nQuestion: {{question}}{TURN} Answer:"


@dataclass(frozen=True)
class Question:
    """A question, its answers, any of which is right, and numbers of documents: its own, and those that are taken first beside them."""

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


Corpus = tuple[list[Question], list[str]]


@dataclass(frozen=True)
class DocumentQa(Task):
    """A question about documents, asked behind them and others in a random order."""

    source = "arXiv:2404.06654"
    needs_text = False
    file: ClassVar[str] = ""  # what the user has to bring
    path: str | None = None  # where it is
    n: PositiveInt = 100  # questions
    chat: bool = False  # ask within the tokenizer's chat template

    @staticmethod
    def read(content: Any) -> Corpus:
        """What stands in that file, once it is parsed."""
        raise NotImplementedError

    def for_lengths(self, lengths: Sequence[int]) -> Task:
        self.corpus()
        return self

    def corpus(self) -> Corpus:
        """Questions and documents. Raises ValueError if the file was not given, or is none of its kind."""
        if self.path is None:
            raise ValueError(f"{self.name} needs {self.file}, which does not come with hf-longctx: give its place as {self.name}:path=FILE")
        return _read(self.read, self.file, Path(self.path).expanduser())

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng, room = np.random.default_rng([seed, length]), room_for(length, NEW)
        questions, texts = self.corpus()
        prompts = _Prompts(for_prompts(tokenizer, self.chat), texts)
        chosen = rng.permutation(len(questions))[: self.n]
        return [Cell(prompts.make(questions[i], room, rng), room, length, cluster=int(i), answers=questions[i].answers) for i in chosen]

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return accuracy(cells, [any(answers_found(c, o, tokenizer)) for c, o in zip(cells, outputs, strict=True)])


@cache
def _read(parse: Callable[[Any], Corpus], file: str, path: Path) -> Corpus:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is no JSON file; {file} is") from None
    try:
        questions, texts = parse(content)
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"{path} is not laid out as {file}") from None
    if not questions:
        raise ValueError(f"{path} has no question that can be answered")
    return questions, texts


class _Prompts:
    """Prompts over the same documents, each of which is tokenised once."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.tokens = cache(lambda text: encode(tokenizer, text))

    def make(self, question: Question, room: int, rng: np.random.Generator) -> np.ndarray:
        """Exactly `room` tokens: as many documents as fit, and the beginning of one more."""
        head, tail = np.append(opening(self.tokenizer), self.tokens(HEAD)), encode(self.tokenizer, QUESTION.format(question=question.text))
        chosen = self._chosen(question, room - len(head) - len(tail), room, rng)
        body = [piece for i, place in enumerate(rng.permutation(len(chosen))) for piece in (self._label(i), chosen[place])]
        return pad_before(tail, self.tokens("\n")[-1:], [head, *body], room)

    def _chosen(self, question: Question, room: int, length: int, rng: np.random.Generator) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for number in self._order(question, rng):
            label, text = len(self._label(len(found))), self.tokens(self.texts[number])
            if len(found) < len(question.own) and label + len(text) > room:
                raise ValueError(f"a prompt of {length} tokens is too short: the documents of the question {question.text!r} do not fit")
            if label >= room:
                return found
            found.append(text[: room - label])
            room -= label + len(found[-1])
        if room > 0:
            raise ValueError(f"a prompt of {length} tokens takes more documents than the {len(self.texts)} that there are")
        return found

    def _order(self, question: Question, rng: np.random.Generator) -> Iterator[int]:
        yield from question.own
        yield from rng.permutation(question.near).astype(int)
        taken = {*question.own, *question.near}
        yield from (int(i) for i in rng.permutation(len(self.texts)) if i not in taken)

    def _label(self, place: int) -> np.ndarray:
        return self.tokens(("\n\n" if place else "") + f"Document {place + 1}:\n")
