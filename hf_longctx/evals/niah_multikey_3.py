"""RULER's niah_multikey_3 (Hsieh et al. 2024): the whole haystack is made of needles; UUIDs for UUIDs."""

from dataclasses import dataclass

from hf_longctx.evals._haystack import NiahInNeedles


@dataclass(frozen=True)
class NiahMultikey3(NiahInNeedles):
    """As `niah_multikey_2`, keys and values being UUIDs of 32 hex digits; all of the answer's must be given.

    It departs from RULER where `niah_multikey_2` does, but for the keys."""

    kind = "uuid"
