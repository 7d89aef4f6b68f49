"""RULER's niah_single_3 (Hsieh et al. 2024): a UUID for a word, hidden in running prose."""

from dataclasses import dataclass

from hf_longctx.evals._haystack import NiahInProse


@dataclass(frozen=True)
class NiahSingle3(NiahInProse):
    """As `niah_single_2`, the value being a UUID of 32 hex digits, all of which greedy decoding must give.

    It departs from RULER where `niah_single_2` does."""

    kind = "uuid"
