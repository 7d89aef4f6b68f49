"""Kamradt's needle in a haystack (2023): one sentence about San Francisco in running prose, at every depth and length."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.evals._haystack import NiahInProse, behind_a_stop, stretch
from hf_longctx.task import TURN, encode, hide_several, opening

HEAD = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct\n\n"
CUE = "The best thing to do in San Francisco is"
ANSWER = " eat a sandwich and sit in Dolores Park on a sunny day"
NEEDLE = f"\n{CUE}{ANSWER}.\n"
QUESTION = f"\n\nWhat is the best thing to do in San Francisco? Don't give information outside the document or repeat your findings{TURN}\n\n{CUE}"


@dataclass(frozen=True)
class Needle(NiahInProse):
    """The sentence about a sandwich in Dolores Park stands somewhere in a document; correct if greedy decoding gives its end, word for word.

    As in Kamradt's: needle, question and instruction; the needle goes behind the last full stop before its depth (where there is
    one), at depth 1 to the end. Unlike it: the haystack is a random stretch of the user's text (the beginning of Paul Graham's
    essays); each cell has `n` trials (one; `n=1,depths=35` with 35 lengths is the original's grid); the length is exact (200
    tokens are set aside); and the prompt goes on to "is", so that no judge is needed. Kamradt's GPT-4 gives 1 to 10. Here all of
    the phrase must be right: a share of its tokens, each read behind the right ones, would pay for "Park" behind "Dolores".

    The needle never varies and is famous: measure `niah_single_2` too, where the answer cannot be known beforehand. Intervals
    take trials for independent; those in a document that is hardly longer than the length are not."""

    source = "https://github.com/gkamradt/LLMTest_NeedleInAHaystack"
    n: PositiveInt = 5  # trials a depth

    def prompt(self, tokenizer: Any, hay: list[np.ndarray], length: int, depth: float, rng: np.random.Generator) -> tuple[np.ndarray, int, str]:
        filler = stretch(rng, hay, length)
        tail, size = self.tail(tokenizer, QUESTION, ANSWER)
        head, needle = encode(tokenizer, HEAD), encode(tokenizer, NEEDLE)
        room = length - sum(map(len, (opening(tokenizer), head, tail, needle)))
        needles = [(behind_a_stop(tokenizer, filler, room, depth), needle)]
        return hide_several(tokenizer, (head, tail), needles, filler, length), size, ANSWER.strip()

    def prolongs(self, text: str) -> bool:
        return text.isalpha()
