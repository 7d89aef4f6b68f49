"""A recipe: one YAML 1.2 file, read into dataclasses, with errors that name the key.

Blocks named after a library's class (`lora`: peft.LoraConfig, `train`: transformers.TrainingArguments) are passed to it
verbatim and checked against its field names.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from hf_longctx.method import Method, load_methods, method_class, method_names
from hf_longctx.schema import STRICT_KEYS, Size, build, nearest

SHIPPED = Path(str(resources.files("hf_longctx.recipes")))  # in an editable install it lies elsewhere
_OURS = {"output_dir", "seed", "data_seed", "train_sampling_strategy", "remove_unused_columns"}


@dataclass(frozen=True)
class ModelSpec:
    """The model to start from: `name` (a hub id, a folder, a .gguf file) or `config` (train from scratch)."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    name: str | None = None
    """A hub id, a folder or a .gguf file."""
    config: dict[str, Any] | None = None
    """Train from scratch: keys of a Transformers configuration, `model_type` among them."""
    tokenizer: str | None = None
    """With `config`: a hub id or a folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto: the checkpoint's. Where every weight is trained, auto trains float32 and saves the checkpoint's, or
    float32 of a state-space model."""
    attn_implementation: str | None = None
    """Passed to Transformers: sdpa, flash_attention_2, eager, ...; by default what the model supports."""
    quantization: dict[str, Any] | None = None
    """Keys of transformers.BitsAndBytesConfig: {load_in_4bit: true, bnb_4bit_quant_type: nf4} for QLoRA; needs bitsandbytes, and lora."""

    def __post_init__(self) -> None:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either name (a checkpoint) or config (train from scratch)")
        if self.quantization is not None:
            self._check_quantization(self.quantization)

    def _check_quantization(self, keys: Mapping[str, Any]) -> None:
        _check_keys("quantization", keys, _quantization_keys)
        if self.name is None or self.name.endswith(".gguf"):
            raise ValueError("quantization goes with the name of a safetensors checkpoint, whose weights it packs when they are loaded")
        if not (keys.get("load_in_4bit") or keys.get("load_in_8bit")):
            raise ValueError("quantization says neither load_in_4bit: true (QLoRA) nor load_in_8bit: true, so nothing would be quantised")


@dataclass(frozen=True)
class DataSource:
    """One source of documents."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    path: str
    """A hub dataset, a .txt, .jsonl or .parquet file, a folder of those, or .npz arrays of token ids."""
    name: str | None = None
    """The configuration of a hub dataset."""
    split: str = "train"
    """The split of a hub dataset."""
    column: str = "text"
    """Where the text is, or the conversations: lists of {role, content} (messages)."""
    loss_on: Literal["answers", "all"] | None = None
    """What of a conversation is to be predicted: what the assistant says, or every token; by default the answers."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    tokens: Size | None = None
    """Read no more than this many tokens (200M: 200 million); by default all."""
    weight: float = 1.0
    """Share of the training examples, relative to the other sources."""
    short: Literal["pack", "drop"] = "pack"
    """Documents shorter than the window: pack several into a row, where they do not see each other, or drop them."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight:g}")


@dataclass(frozen=True)
class EvalSpec:
    """What `longctx finetune` measures after training, into OUT/eval, with the same names as `longctx eval`."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    tasks: tuple[str | dict[str, Any], ...] = ("passkey", "perplexity")
    """Names, or {name: ..., key: value} with a task's options."""
    lengths: tuple[Size, ...] = ()
    """Tokens (8k, 32k); by default the trained window, twice that, ... up to the target, or 16 times `window` for a model that has neither."""
    data: str | None = None
    """Text or token ids for the tasks that need them, as data.path; by default Python's own documentation."""

    def __post_init__(self) -> None:
        _check_tasks(self.tasks)


@dataclass(frozen=True)
class ProbeSpec:
    """What to measure on the model in training, every so many steps; the numbers go to the log and to the trackers."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    tasks: tuple[str | dict[str, Any], ...] = ({"name": "passkey", "n": 1},)
    """Names, or {name: ..., key: value} with a task's options; by default one passkey at each of ten depths."""
    lengths: tuple[Size, ...] = ()
    """Tokens (8k, 32k); by default the target alone, or 16 times `window` for a model that has none."""
    every: PositiveInt = 100
    """Optimizer steps from one probe to the next."""
    stop_at: float | None = None
    """Stop training early, and save, once every accuracy that is probed is at least this, above 0 to 1; by default never."""
    data: str | None = None
    """Text or token ids for the tasks that need them, as data.path; by default Python's own documentation."""

    def __post_init__(self) -> None:
        names = _check_tasks(self.tasks)
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tasks holds {name} twice, and both would be logged under one name; keep one")
        if self.stop_at is not None and not 0 < self.stop_at <= 1:
            raise ValueError(f"stop_at is an accuracy above 0 and up to 1, got {self.stop_at:g}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; two equal recipes give equal weights on one device whose kernels add in a fixed order, as a CPU's do."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    model: ModelSpec
    """The model to start from."""
    data: tuple[DataSource, ...]
    """One source of documents, or a list that is mixed by weight."""
    window: Size
    """Tokens of a training example (2k: 2048)."""
    methods: tuple[dict[str, Any], ...] = ()
    """What changes the model, the positions and the states that windows start from, at most one a slot; `longctx methods` lists them."""
    seed: int = 0
    """Decides everything that is random: first weights of the adapter, order and positions of the examples."""
    lora: dict[str, Any] | None = dataclasses.field(default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    """Keys of peft.LoraConfig; null trains every weight."""
    also_train: tuple[Literal["norms", "embeddings"], ...] = ()
    """Beside LoRA, in full (LongLoRA, arXiv 2309.12307)."""
    mask_seams: bool = False
    """Leave out the label just after a skip; the PoSE paper trains it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each layer, and CUDA graphs; auto: on CUDA, from 50 steps on."""
    loss: Literal["blocks", "model"] = "blocks"
    """blocks: the tokens x vocabulary logits are never kept; model: the loss of the model itself, for families that scale or cap logits."""
    distill: float = 0.0
    """0 to 1: how much the base at plain positions counts against the text as what to predict (LongReD, arXiv 2502.07365)."""
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of transformers.TrainingArguments: max_steps, per_device_train_batch_size, learning_rate, report_to (off by default), ..."""
    probe: ProbeSpec | None = None
    """Measure the model during training."""
    eval: EvalSpec | None = None
    """Measure the result after training."""

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
        if self.model.quantization is not None and self.lora is None:
            raise ValueError("model.quantization goes with lora: quantised weights cannot be trained")
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


def _check_tasks(specs: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """The names of evaluation tasks. Raises ValueError for what cannot be one: before training, not after it."""
    from hf_longctx.task import load_tasks

    return [task.name for task in load_tasks(specs)]


def _check_keys(block: str, values: Mapping[str, Any], known: Any) -> None:
    if not values:
        return
    names = known()
    for key in values:
        if key not in names:
            raise ValueError(f"{block}: unknown key {key!r}" + nearest(key, names))


def _lora_keys() -> dict[str, str]:
    from peft import LoraConfig

    return _fields(LoraConfig)


def _train_keys() -> dict[str, str]:
    from transformers import TrainingArguments

    return _fields(TrainingArguments)


def _quantization_keys() -> dict[str, str]:
    from transformers import BitsAndBytesConfig

    return {name: "" for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"}  # no dataclass: what it does not know it ignores


def _fields(cls: Any) -> dict[str, str]:
    """The fields of a library's dataclass, and what it says about each."""
    return {f.name: f.metadata.get("help", "") for f in dataclasses.fields(cls)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors that complete and check YAML."""
    from pydantic import TypeAdapter

    from hf_longctx.task import GROUPS, task_class, task_names

    schema = TypeAdapter(Recipe).json_schema()
    keys, blocks = schema["properties"], schema["$defs"]
    keys["methods"]["items"] = {"anyOf": [_named(name, method_class(name)) for name in method_names()]}
    for spec in ("EvalSpec", "ProbeSpec"):
        blocks[spec]["properties"]["tasks"]["items"] = {"anyOf": [{"enum": [*task_names(), *GROUPS]}, *(_named(name, task_class(name)) for name in task_names())]}
    keys["lora"] |= {"anyOf": [_object(_lora_keys()), {"type": "null"}]}
    blocks["ModelSpec"]["properties"]["quantization"] |= {"anyOf": [_object(_quantization_keys()), {"type": "null"}]}
    keys["train"] |= _object({key: text for key, text in _train_keys().items() if key not in _OURS})
    for key in ("data", "methods"):  # one source or method may stand without a list
        about = {name: keys[key].pop(name) for name in ("title", "description", "default") if name in keys[key]}
        keys[key] = about | {"anyOf": [keys[key], keys[key]["items"]]}
    return schema


def _named(name: str, cls: type) -> dict[str, Any]:
    """The schema of a method or a task: its fields and its name."""
    from pydantic import TypeAdapter

    found = TypeAdapter(cls).json_schema()
    found["properties"] = {"name": {"const": name}} | found.get("properties", {})
    return found | {"required": ["name", *found.get("required", [])]}


def _object(keys: Mapping[str, str]) -> dict[str, Any]:
    """The schema of a block that is passed on: its keys, with what the library says about them."""
    return {"type": "object", "properties": {key: {"description": text} if text else {} for key, text in keys.items()}, "additionalProperties": False}
