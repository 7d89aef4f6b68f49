"""A recipe: one YAML 1.2 file, read into dataclasses, with errors that name the key.

Blocks named after a library's class (`lora`: peft.LoraConfig, `train`: transformers.TrainingArguments) are passed to it
verbatim and checked against its field names.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

from hf_longctx.method import Method, load_methods
from hf_longctx.schema import STRICT_KEYS, Size, build, nearest

SHIPPED = Path(str(resources.files("hf_longctx.recipes")))  # in an editable install it lies elsewhere
_OURS = {"output_dir", "seed", "data_seed", "train_sampling_strategy", "remove_unused_columns"}


@dataclass(frozen=True)
class ModelSpec:
    """The model to start from: `name` (a hub id, a folder, a .gguf file) or `config` (train from scratch)."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    name: str | None = None
    config: dict[str, Any] | None = None  # keys of a Transformers configuration, `model_type` among them
    tokenizer: str | None = None  # with `config`; by default the one of `name`
    revision: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either name (a checkpoint) or config (train from scratch)")


@dataclass(frozen=True)
class DataSource:
    """One source of documents."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    path: str  # a hub dataset, a .txt, .jsonl or .parquet file, a folder of those, or .npz arrays of token ids
    name: str | None = None  # the dataset's configuration
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    tokens: Size | None = None  # read no more than this many
    weight: float = 1.0  # share of the training examples, relative to the other sources
    short: Literal["pack", "drop"] = "pack"  # documents shorter than the window

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight:g}")


@dataclass(frozen=True)
class EvalSpec:
    """What to measure after training, with the same names as on the command line."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    tasks: tuple[str | dict[str, Any], ...] = ("passkey", "perplexity")
    lengths: tuple[Size, ...] = ()  # by default the trained window, twice that, ... up to the target
    data: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; two equal recipes on one device give equal weights."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    model: ModelSpec
    data: tuple[DataSource, ...]
    window: Size  # tokens of a training example
    methods: tuple[dict[str, Any], ...] = ()
    seed: int = 0
    lora: dict[str, Any] | None = dataclasses.field(default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    also_train: tuple[Literal["norms", "embeddings"], ...] = ()  # beside LoRA, in full (LongLoRA, arXiv 2309.12307)
    mask_seams: bool = False  # leave out the label just after a skip; the PoSE paper trains it
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of each layer, and CUDA graphs; auto: on CUDA, from 50 steps on
    loss: Literal["blocks", "model"] = "blocks"  # blocks: the tokens x vocabulary logits are never kept
    distill: float = 0.0  # 0 to 1: how much the base at plain positions counts against the text as what to predict (LongReD, arXiv 2502.07365)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    eval: EvalSpec | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty; give at least one source")
        self.load_methods()
        _check_keys("lora", self.lora or {}, _lora_keys)
        _check_keys("train", self.train, _train_keys)
        for key in sorted(_OURS & set(self.train)):
            raise ValueError(f"train: {key} is set by longctx (--out, seed); leave it out")
        if self.also_train and self.lora is None:
            raise ValueError("also_train goes with lora; without it every weight is trained anyway")
        if self.model.config is not None and self.lora is not None:
            raise ValueError("model.config trains from scratch, and LoRA on random weights is of no use: set lora: null")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill must lie between 0 and 1, got {self.distill:g}")
        if self.distill and (self.lora is None or self.loss != "blocks"):
            raise ValueError("distill needs lora, whose base is the teacher, and loss: blocks")
        if self.window < 2:
            raise ValueError("window must be at least 2 tokens: the first one predicts the second")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def load_methods(self) -> tuple[Method, ...]:
        """The methods, built and checked."""
        return load_methods(self.methods)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a YAML file would hold them; `parse_recipe` reads them back to an equal recipe."""
        return _plain(dataclasses.asdict(self))


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one that is shipped, by its name.

    Args:
        path: a .yaml file, or the name of a shipped recipe ("smollm2-135m-32k").
        overrides: `dotted.key=value` strings; the value is YAML (`methods.0.factor=8`, `lora=null`).

    Raises:
        ValueError: no such file; not YAML; an unknown, missing or wrong key, with the nearest name.
    """
    file = _find(path)
    text = _text(file)
    try:
        values = _yaml().load(text)
    except Exception as error:  # ruamel.yaml has no common base for its errors
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} is not a recipe: it must hold keys such as model, methods, window, data")
    values = _listed(values)
    for override in overrides:
        _override(values, override)
    return parse_recipe(values, str(path))


def parse_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values. Raises ValueError as `read_recipe`."""
    return build(Recipe, _listed(values), where)


def _listed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with lists for `data` and `methods`: for one source or one method users need none."""
    return {key: [value] if key in ("data", "methods") and isinstance(value, Mapping) else value for key, value in values.items()}


def parse_value(text: str) -> Any:
    """A YAML flow value from the command line: `8`, `true`, `[1, 2]`, or `@file` for the YAML or JSON in a file."""
    if text.startswith("@"):
        file = Path(text[1:])
        if not file.is_file():
            raise ValueError(f"{file} does not exist")
        text = _text(file)
    try:
        return _yaml().load(text)
    except Exception as error:
        raise ValueError(f"{text!r} is not a YAML value: {' '.join(str(error).split())}") from None


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML."""
    from ruamel.yaml import YAML

    with path.open("w", encoding="utf-8") as file:
        writer = YAML()
        writer.default_flow_style = None
        writer.dump(recipe.to_dict(), file)


def _find(path: str | Path) -> Path:
    for candidate in (Path(path), SHIPPED / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    raise ValueError(f"no recipe file {str(path)!r}" + nearest(path, recipe_names()))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None


def _yaml() -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True)


def _override(values: dict[str, Any], text: str) -> None:
    """Set one dotted key in nested dictionaries and lists."""
    path, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set needs key=value, got {text!r}")
    *parents, last = path.split(".")
    here: Any = values
    for part in parents:
        here, key = _place(here, part, path)
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        here = here[key]
    here, key = _place(here, last, path)
    here[key] = parse_value(value)


def _place(here: Any, part: str, path: str) -> tuple[Any, Any]:
    """Where `part` lies: a container and the key in it. The only item of a list needs no index: `data.path`."""
    if isinstance(here, list) and len(here) == 1 and not part.isdigit():
        here = here[0]
    if isinstance(here, dict):
        return here, part
    if not isinstance(here, list):
        raise ValueError(f"--set {path}: there is no {part!r} in {here!r}")
    if not part.isdigit() or int(part) >= len(here):
        raise ValueError(f"--set {path}: {part!r} is no index into a list of {len(here)}")
    return here, int(part)


def _check_keys(block: str, values: Mapping[str, Any], known: Any) -> None:
    if not values:
        return
    names = known()
    for key in values:
        if key not in names:
            raise ValueError(f"{block}: unknown key {key!r}" + nearest(key, names))


def _lora_keys() -> set[str]:
    from peft import LoraConfig

    return {f.name for f in dataclasses.fields(LoraConfig)}


def _train_keys() -> set[str]:
    from transformers import TrainingArguments

    return {f.name for f in dataclasses.fields(TrainingArguments)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors that complete and check YAML."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(Recipe).json_schema()
    many = schema["properties"]
    for key in ("data", "methods"):  # one source or method may stand without a list
        many[key] = {"anyOf": [many[key], many[key]["items"]]} | ({"default": []} if key == "methods" else {})
    return schema
