"""RULER's niah_multiquery (Hsieh et al. 2024): four keys have a number each, all are asked for."""

from dataclasses import dataclass

from hf_longctx.evals._haystack import NiahOfFour


@dataclass(frozen=True)
class NiahMultiquery(NiahOfFour):
    """Four sentences of a document give seven-digit numbers for four keys; what share of the numbers does the model list?

    As in RULER: prompt, keys, values, 128 tokens to answer in, in any order. Unlike it: the text is the user's (essays), depths are
    any (of 40), keys come from a list of our own (wonderwords), and the length is exact."""

    keys = 4
