"""Values that users write: sizes such as `128k`, and dictionaries checked against a dataclass.

Recipes, methods and evaluation tasks are plain dataclasses; pydantic reads their annotations, so a field is
declared once and its type, its error message and its JSON schema follow.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError, WithJsonSchema

T = TypeVar("T")
_reader: Callable[..., TypeAdapter[Any]] = cache(TypeAdapter)  # making one reads the source of the class: ten milliseconds
STRICT_KEYS = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # the string under a field is what editors show
_UNITS = {"": 1, "k": 1024, "m": 1024**2, "K": 1000, "M": 1000**2, "B": 1000**3}


def parse_size(value: Any) -> int:
    """A number of tokens: 2048, "2k" (2,048), "1m" (1,048,576).

    Lower-case `k` and `m` are powers of two, as in window sizes; upper-case `K`, `M` and `B` are powers of ten, as in
    "200M training tokens". Raises ValueError for anything that is not a positive whole number of tokens.
    """
    match = re.fullmatch(r"\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*)(?:\.[0-9]+)?)\s*([kmKMB]?)\s*", str(value))
    if match is None or isinstance(value, bool):
        raise ValueError(f"expected a number of tokens such as 2048, 2k or 128k, got {value!r}")
    size = Fraction(re.sub("[_,]", "", match[1])) * _UNITS[match[2]]
    if size.denominator != 1 or size < 1:
        raise ValueError(f"expected a whole, positive number of tokens, got {value!r}")
    return int(size)


def format_size(tokens: int) -> str:
    """2048 -> "2k", 131072 -> "128k", 1000 -> "1000": what `parse_size` reads back to the same number."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


Size = Annotated[
    int, BeforeValidator(parse_size), WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]})
]


def nearest(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'yarn'?`, or the list of what there is when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there is: {', '.join(known)}"


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """`cls(**values)` with types converted and checked.

    Args:
        cls: a dataclass whose `__pydantic_config__` is STRICT_KEYS.
        values: what the user wrote.
        where: how the user would name this block ("methods.0 (yarn)"); every message starts with it.

    Raises:
        ValueError: one line per problem: the key, what was given, what is accepted, the nearest name.
    """
    try:
        return _reader(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ValueError("; ".join(_explain(item, cls, where) for item in error.errors())) from None


def _explain(item: Any, cls: type, where: str) -> str:
    path = ".".join(str(part) for part in item["loc"])
    key = f"{where}: {path}" if path else where
    if item["type"] == "unexpected_keyword_argument":
        owner = _owner(cls, item["loc"][:-1])
        return f"{where}: unknown key {path!r}" + nearest(item["loc"][-1], owner)
    if item["type"] in ("missing", "missing_argument"):
        return f"{key} is required"
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}"
    if item["type"] in ("dict_type", "dataclass_type"):
        first = f" ({next(iter(_owner(cls, item['loc'])))}: ...)" if item["type"] == "dataclass_type" else ""
        return f"{key} takes keys with values{first}, got {item['input']!r}"
    if item["type"] == "tuple_type":
        return f"{key} takes a list, got {item['input']!r}"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def _owner(cls: Any, path: tuple[Any, ...]) -> Iterable[str]:
    """Field names of the dataclass at `path` inside `cls`."""
    import dataclasses
    import typing

    for part in path:
        if dataclasses.is_dataclass(cls) and isinstance(part, str) and part in typing.get_type_hints(cls):
            hint = typing.get_type_hints(cls)[part]
            options = [hint, *typing.get_args(hint)]
            cls = next((o for o in options if dataclasses.is_dataclass(o)), cls)
    return [field.name for field in dataclasses.fields(cls)]
