"""Recipes: YAML 1.2, sizes, overrides, errors that name the key, round trips, and the shipped ones."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from hf_longctx import data, planning, training
from hf_longctx.recipe import SHIPPED, dump_recipe, json_schema, parse_recipe, parse_value, read_recipe, recipe_names
from tests.conftest import FAMILIES, byte_tokenizer, tiny_model
from tests.test_state import FAMILIES as STATEFUL

TEXT = """
seed: 3
model: {name: some/model, dtype: bfloat16}
methods:
  - {name: yarn, factor: 16}
  - {name: pose, target: 128k, chunks: 2}
window: 2k
data: {path: some.txt, column: no, tokens: 200M}
lora: {r: 8, lora_alpha: 16, target_modules: [q_proj]}
train: {max_steps: 10, learning_rate: 2e-5, report_to: no}
eval: {tasks: [passkey, {name: perplexity, stride: 512}], lengths: [8k, 32k]}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_yaml_is_version_1_2(file):
    recipe = read_recipe(file)
    assert recipe.train["learning_rate"] == 2e-5  # YAML 1.1 reads it as a string
    assert recipe.train["report_to"] == "no"  # YAML 1.1 reads it as false
    assert recipe.data[0].column == "no"


def test_sizes_are_binary_in_lower_case_and_decimal_in_upper_case(file):
    recipe = read_recipe(file)
    assert recipe.window == 2048
    assert recipe.load_methods()[1].target == 131_072
    assert recipe.data[0].tokens == 200_000_000
    assert recipe.eval.lengths == (8192, 32768)


def test_round_trips(file, tmp_path):
    recipe = read_recipe(file)
    assert parse_recipe(recipe.to_dict()) == recipe
    dump_recipe(recipe, tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml") == recipe
    bare = parse_recipe({"model": {"name": "x"}, "data": {"path": "x.txt"}, "window": 8, "lora": None})
    assert parse_recipe(bare.to_dict()) == bare != recipe


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("methods.0.factor=8", lambda r: r.methods[0]["factor"] == 8),
        ("train.max_steps=5", lambda r: r.train["max_steps"] == 5),
        ("lora=null", lambda r: r.lora is None),
        ("lora.target_modules=[k_proj, v_proj]", lambda r: r.lora["target_modules"] == ["k_proj", "v_proj"]),
        ("methods=[{name: nope}]", lambda r: [m.name for m in r.load_methods()] == ["nope"]),
        ("data.path=other.txt", lambda r: r.data[0].path == "other.txt"),  # one source: no index needed
        ("data.0.path=other.txt", lambda r: r.data[0].path == "other.txt"),
        ("window=1k", lambda r: r.window == 1024),
        ("also_train=[norms]", lambda r: r.also_train == ("norms",)),
        ("model.name=a=b", lambda r: r.model.name == "a=b"),
    ],
)
def test_overrides_set_one_key(file, override, found):
    assert found(read_recipe(file, [override]))


def test_an_override_fills_a_block_that_was_null(file):
    assert read_recipe(file, ["lora=null", "lora.r=2"]).lora == {"r": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("window", "needs key=value"),
        ("methods.7.factor=8", "'7' is no index into a list of 2"),
        ("methods.factor=8", "'factor' is no index into a list of 2"),
        ("window.x=1", "there is no 'x' in '2k'"),
        ("window=[1", "not a YAML value"),
        ("window=@nowhere.yaml", "does not exist"),
        ("trian.max_steps=1", "did you mean 'train'"),
    ],
)
def test_wrong_overrides_are_named(file, override, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_recipe(file, [override])


def test_a_value_may_lie_in_a_file(tmp_path):
    (tmp_path / "v.yaml").write_text("[1, {a: 2e-3}]")
    assert parse_value(f"@{tmp_path / 'v.yaml'}") == [1, {"a": 2e-3}]


GOOD = {"model": {"name": "x"}, "data": {"path": "x.txt"}, "window": "2k"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widow": 1}, "unknown key 'widow'; did you mean 'window'"),
        ({"model": {"nam": "x"}}, "'model.nam'; did you mean 'name'"),
        ({"data": {"path": "x", "colum": "t"}}, "'data.0.colum'; did you mean 'column'"),
        ({"data": [{"path": "x"}, {"pth": "x"}]}, "'data.1.pth'; did you mean 'path'"),
        ({"lora": {"lora_alfa": 1}}, "lora: unknown key 'lora_alfa'; did you mean 'lora_alpha'"),
        ({"train": {"learning_rat": 1}}, "train: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"methods": [{"name": "yarn", "facto": 4}]}, "'facto'; did you mean 'factor'"),
        ({"methods": [{"name": "yarm", "factor": 4}]}, "unknown method 'yarm'; did you mean 'yarn'"),
        ({"methods": [{"factor": 4}]}, "needs a name"),
        ({"methods": [{"name": "yarn", "factor": 4}, {"name": "linear", "factor": 4}]}, "yarn and linear both fill the rope slot"),
        ({"eval": {"task": []}}, "'eval.task'; did you mean 'tasks'"),
        ({"model": "x"}, r"model takes keys with values \(name: \.\.\.\), got 'x'"),
        ({"data": ["x.txt"]}, r"data\.0 takes keys with values \(path: \.\.\.\), got 'x\.txt'"),
        ({"methods": ["yarn"]}, r"methods\.0 takes keys with values, got 'yarn'"),
        ({"also_train": "norms"}, "also_train takes a list, got 'norms'"),
        ({"window": "2q"}, "window: expected a number of tokens.*got '2q'"),
        ({"window": 1}, "at least 2 tokens"),
        ({"seed": -1}, "seed must not be negative"),
        ({"data": []}, "data is empty"),
        ({"data": {"path": "x", "weight": 0}}, "weight must be positive"),
        ({"data": {"path": "x", "short": "pad"}}, "data.0.short.*'pack' or 'drop'.*got 'pad'"),
        ({"model": {}}, "give either name"),
        ({"model": {"name": "x", "config": {}}}, "give either name"),
        ({"model": {"config": {"model_type": "llama"}}}, "set lora: null"),
        ({"lora": None, "also_train": ["norms"]}, "also_train goes with lora"),
        *(({"train": {key: 1}}, f"{key} is set by longctx") for key in ("output_dir", "seed", "data_seed", "remove_unused_columns")),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_recipe(GOOD | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model", "data", "window"])
def test_missing_keys_are_named(key):
    with pytest.raises(ValueError, match=f"{key} is required"):
        parse_recipe({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"model: {name: x", "not valid YAML"), (b"a: 1\na: 2\n", "not valid YAML"), (b"- 1", "not a recipe"), (b"a: \xe9", "not UTF-8"), (b"", "not a recipe")],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_recipe_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no recipe file 'nowhere'"):
        read_recipe("nowhere")


def family_of(name: str) -> str:
    """The tiny family that stands for a hub model, by its name; llama for most."""
    known = sorted([*FAMILIES, *STATEFUL], key=len, reverse=True)
    flat = name.lower().replace("-", "").replace(".", "").replace("_", "")
    return "gpt_neox" if "pythia" in flat else next((f for f in known if f.removesuffix("_text").replace("_", "") in flat), "llama")


@pytest.mark.parametrize("name", recipe_names() or [pytest.param("", marks=pytest.mark.skip("no recipe is shipped yet"))])
def test_shipped_recipes_train_for_a_step(name, base, tokens, tmp_path):
    """With the model replaced by a tiny one of its family, everything else that can stay as it is stays."""
    given = read_recipe(name)
    values = given.to_dict()
    if given.model.config is not None:
        values["model"]["tokenizer"] = str(base)
        shrunk = {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
            "num_heads": 4, "head_dim": 32, "state_size": 8,
        }  # fmt: skip
        values["model"]["config"] |= {key: value for key, value in shrunk.items() if key in values["model"]["config"]}
    else:
        family = family_of(given.model.name)
        tiny_model(family, **({"hidden_size": 16} | STATEFUL[family] if family in STATEFUL else {})).save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        values["model"] |= {"name": str(tmp_path / "model"), "revision": None}
    values["model"] |= {"dtype": "float32", "attn_implementation": None}
    for item in values["methods"]:  # targets fitted the real model's window
        if item["name"] != "theta":  # which needs one, from that window up
            item.pop("target", None)
    values |= {"window": 32, "compile": "off", "data": [{"path": str(tokens), "short": source["short"]} for source in values["data"]]}
    gpu_only = {"bf16", "tf32", "fp16", "optim", "dataloader_num_workers", "use_liger_kernel"}
    train = {key: value for key, value in values["train"].items() if key not in gpu_only}
    values["train"] = train | {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "disable_tqdm": True}
    out = training.finetune(values, tmp_path / "out")
    assert list(out.glob("*.safetensors"))


def test_shipped_recipes_are_the_files_in_the_folder():
    assert recipe_names() == sorted(path.stem for path in SHIPPED.glob("*.yaml"))


# --- on the shapes that they are for


def _shape(family, hidden, inner, layers, heads, kv_heads, window, theta, vocabulary, **more):
    return {
        "model_type": family, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": window, "rope_theta": theta, "vocab_size": vocabulary, **more,
    }  # fmt: skip


def _mixers(family, hidden, layers, vocabulary, **more):
    return {"model_type": family, "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary, **more}


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHAPES = {  # what the vendors' config.json say
    "smollm2-135m-32k": _shape("llama", 576, 1536, 30, 9, 3, 8192, 100000, 49152, tie_word_embeddings=True),
    "llama-2-7b-16k": _shape("llama", 4096, 11008, 32, 32, 32, 4096, 10000.0, 32000),
    "llama-3.1-8b-256k": _shape("llama", 4096, 14336, 32, 32, 8, 131072, 500000.0, 128256, rope_scaling=LLAMA3_ROPE),
    "mistral-7b-128k": _shape("mistral", 4096, 14336, 32, 32, 8, 32768, 1000000.0, 32768, sliding_window=None),
    "qwen2.5-7b-128k": _shape("qwen2", 3584, 18944, 28, 28, 4, 32768, 1000000.0, 152064, sliding_window=131072, use_sliding_window=False, max_window_layers=28),
    "qwen3-8b-128k": _shape("qwen3", 4096, 12288, 36, 32, 8, 40960, 1000000, 151936, head_dim=128, sliding_window=None, use_sliding_window=False, max_window_layers=36),
}
SHAPES["smollm2-135m-mkl-alibi"] = SHAPES["smollm2-135m-32k"]
STATES = {  # of models without positions
    "mamba-130m-carry": _mixers("mamba", 768, 24, 50280, state_size=16, time_step_rank=48, tie_word_embeddings=True),
    "mamba2-130m-carry": _mixers("mamba2", 768, 24, 50288, state_size=128, num_heads=24, head_dim=64, n_groups=1, tie_word_embeddings=True),
    "falcon-mamba-7b-carry": _mixers("falcon_mamba", 4096, 64, 65024, state_size=16, time_step_rank=256, intermediate_size=8192, expand=16, tie_word_embeddings=False),
}  # fmt: skip
STATE_WEIGHTS = {"mamba-130m-carry": 0.1291, "mamba2-130m-carry": 0.1290, "falcon-mamba-7b-carry": 7.2727}  # in billions
WEIGHTS = {  # parameters, in billions, and the window before and after
    "smollm2-135m-32k": (0.1345, 8192, 5 * 8192), "llama-2-7b-16k": (6.738, 4096, 16384), "llama-3.1-8b-256k": (8.030, 131072, 262144),
    "mistral-7b-128k": (7.248, 32768, 131072), "qwen2.5-7b-128k": (7.616, 32768, 131072), "qwen3-8b-128k": (8.191, 40960, 163840),
    "smollm2-135m-mkl-alibi": (0.1345, 8192, 65536),
}  # fmt: skip


@pytest.fixture
def true_shape(tmp_path, monkeypatch):
    """`true_shape(name, **changes)`: a shipped recipe for a folder with the true config.json, no weights, and a book of its window."""
    monkeypatch.setattr(planning, "coverage", partial(data.coverage, draws=2))  # 400 take seconds at such targets

    def make(name, **changes):
        byte_tokenizer().save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text(json.dumps((SHAPES | STATES)[name] | changes))
        recipe = read_recipe(name)
        np.savez(tmp_path / "book.npz", np.arange((512 if name in STATES else 2) * recipe.window, dtype=np.uint16) % 250 + 3)
        return read_recipe(name, [f"model.name={tmp_path / 'model'}", f"data.path={tmp_path / 'book.npz'}"])

    return make


def test_every_recipe_for_a_checkpoint_has_its_shape_here():
    assert set(SHAPES) == set(WEIGHTS)
    assert set(STATES) == set(STATE_WEIGHTS)
    assert set(SHAPES | STATES) == {name for name in recipe_names() if read_recipe(name).model.config is None and name != "demo"}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shipped_recipes_resolve_on_their_true_shapes_without_weights(name, true_shape):
    recipe = true_shape(name)
    found = planning.dry_run(recipe, samples=1)
    billions, before, after = WEIGHTS[name]
    biased = name == "smollm2-135m-mkl-alibi"
    assert (found["trained_window"], found["target"], found["sampler"].get("target")) == (before, after, None if biased else after)
    assert [m["name"] for m in found["methods"]] == (["theta", "mkl_alibi"] if biased else ["yarn"])
    assert recipe.window <= before
    assert found["steps"] == recipe.train["max_steps"] > 0
    assert found["dropped"] == 0
    total, trained = planning._parameters(planning.plan(recipe, weights=False))
    assert total / 1e9 == pytest.approx(billions, rel=1e-3)
    assert 0 < trained < total / 5
    memory = found["memory"]
    assert memory["weights"] >= total * 2 / 2**30
    assert memory["total"] < 80  # on a CPU it counts 32-bit weights; one large GPU is enough


def test_the_recipe_with_a_bias_leaves_the_rotations_as_they_are(true_shape):
    """Its base is the model's own; what changes is the window, and what is added to attention."""
    what = planning.plan(true_shape("smollm2-135m-mkl-alibi"), weights=False)
    changed, stock = what.config.rope_parameters, AutoConfig.for_model(**SHAPES["smollm2-135m-mkl-alibi"]).rope_parameters
    assert {key: changed[key] for key in stock} == stock


@pytest.mark.parametrize("name", sorted(STATES))
def test_shipped_recipes_for_models_with_a_state_resolve_on_their_true_shapes(name, true_shape):
    recipe = true_shape(name)
    found = planning.dry_run(recipe, samples=1)
    assert (found["trained_window"], found["target"], found["coverage"], found["methods"]) == (None, None, None, [])
    rows = found["batch"]
    assert found["state"] == {"method": {"name": "carry", "probability": 0.0}, "lanes": rows, "windows_per_lane": 512 / rows, "fresh": rows / 512}
    assert found["steps"] == recipe.train["max_steps"] == 500
    assert recipe.data[0].tokens >= 500 * rows * recipe.window, "a window should not come twice"
    total, trained = planning._parameters(planning.plan(recipe, weights=False))
    assert total / 1e9 == pytest.approx(STATE_WEIGHTS[name], rel=1e-3)
    assert trained == total if recipe.lora is None else 0 < trained < total / 50
    assert found["memory"]["states"] < found["memory"]["total"] < 80


def test_mistral_of_the_first_version_gets_full_attention(true_shape):
    """Its layers slide over 4096 tokens. The recipe is for v0.3, whose layers do not."""
    what = planning.plan(true_shape("mistral-7b-128k", sliding_window=4096, rope_theta=10000.0, vocab_size=32000), weights=False)
    assert what.config.sliding_window is None
    assert what.target == 131072


# --- the schema


def described(schema, where=""):
    """Every key of a recipe's own blocks, and its description."""
    for block in [schema, *schema["$defs"].values()]:
        for key, value in block["properties"].items():
            yield f"{block['title']}.{key}", value.get("description", "")


@pytest.fixture(scope="module")
def schema():
    return json_schema()


def test_the_schema_says_what_every_key_is(schema):
    assert not [key for key, text in described(schema) if len(text) < 10]


def test_the_schema_completes_methods_tasks_and_what_is_passed_on(schema):
    text = json.dumps(schema)
    for name in ("yarn", "pose", "passkey", "perplexity", "beta_fast", "target_modules", "gradient_accumulation_steps", "report_to"):
        assert f'"{name}"' in text
    assert "output_dir" not in schema["properties"]["train"]["properties"]  # --out sets it


@pytest.mark.parametrize("name", recipe_names())
def test_the_schema_accepts_every_shipped_recipe(name, schema):
    jsonschema = pytest.importorskip("jsonschema")
    from ruamel.yaml import YAML

    validator = jsonschema.Draft202012Validator(schema)
    values = YAML(typ="safe", pure=True).load((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"))
    assert not list(validator.iter_errors(values))
    for wrong in ({"widow": 1}, {"window": [1]}, {"train": {"learning_rat": 1}}, {"methods": {"name": "yarm"}}, {"methods": [{"name": "yarn", "factr": 4}]}):
        assert list(validator.iter_errors(values | wrong)), wrong
