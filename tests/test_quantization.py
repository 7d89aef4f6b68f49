"""QLoRA: a recipe's quantisation block, training on packed weights, and the adapter on the base as it is stored."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from hf_longctx import checkpoint, planning, training
from hf_longctx.data import collate
from hf_longctx.recipe import json_schema, parse_recipe
from tests.conftest import byte_tokenizer, tiny_model
from tests.test_training import logits, trainer_for, weights

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install 'hf-longctx[qlora]'), which is not installed here"
)


@pytest.fixture
def qlora(recipe, tmp_path):
    """The usual recipe on a base whose layers fill whole blocks of 64."""
    tiny_model(intermediate_size=128).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return recipe | {"model": {"name": str(tmp_path / "base"), "quantization": NF4}}


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ({"quantization": {"load_in_4bits": True}}, {}, "unknown key 'load_in_4bits'; did you mean 'load_in_4bit'"),
        ({"quantization": {"bnb_4bit_quant_type": "nf4"}}, {}, "neither load_in_4bit: true .QLoRA. nor load_in_8bit"),
        ({"quantization": NF4}, {"lora": None}, "model.quantization goes with lora"),
        ({"quantization": NF4, "name": "x.gguf"}, {}, "quantization goes with the name of a safetensors checkpoint"),
        ({"quantization": NF4, "name": None, "config": {"model_type": "llama"}}, {"lora": None}, "goes with the name of a safetensors checkpoint"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(model, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_recipe({"model": {"name": "x"} | model, "data": {"path": "x.txt"}, "window": 32} | change)
    assert "\n" not in str(caught.value)


def test_the_schema_knows_the_keys():
    found = json_schema()["$defs"]["ModelSpec"]["properties"]["quantization"]["anyOf"][0]["properties"]
    assert set(NF4) <= set(found)
    assert "kwargs" not in found


def test_without_bitsandbytes_it_is_refused_before_anything_is_read(qlora, monkeypatch):
    monkeypatch.setattr(checkpoint, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr(planning, "load_documents", None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes, which is not here: pip install") as caught:
        planning.plan(planning.as_recipe(qlora))
    assert "\n" not in str(caught.value)


def test_the_block_reaches_transformers_as_it_stands(qlora, monkeypatch):
    """Everything up to the loading itself, for machines without bitsandbytes."""
    given = {}

    def load(folder, **kwargs):
        given.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(checkpoint, "BitsAndBytesConfig", lambda **keys: keys)
    monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", load)
    what = planning.plan(planning.as_recipe(qlora))
    with pytest.raises(KeyboardInterrupt):
        training._build_model(what)
    assert given["quantization_config"] == NF4
    assert given["config"].rope_parameters["rope_type"] == "yarn"
    assert given["device_map"] is None  # the quantiser places each process on its own device


def test_the_memory_estimate_is_lower(qlora, monkeypatch):
    monkeypatch.setattr(checkpoint, "bitsandbytes_config", dict)
    small = planning.dry_run(qlora)["memory"]["weights"]
    del qlora["model"]["quantization"]
    assert small < 0.7 * planning.dry_run(qlora)["memory"]["weights"]


@needs_bitsandbytes
def test_a_value_that_bitsandbytes_refuses_is_one_line(qlora):
    qlora["model"]["quantization"] = NF4 | {"bnb_4bit_compute_dtype": "bfloat99"}
    with pytest.raises(ValueError, match=r"quantization: .*bfloat99"):
        planning.plan(planning.as_recipe(qlora))


@needs_bitsandbytes
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_step_is_that_of_the_dequantised_weights(qlora, tmp_path, recomputed):
    """Also after an evaluation, which must not leave layers behind that pass no gradient."""
    import bitsandbytes

    qlora["train"] |= {"gradient_checkpointing": recomputed}
    trainer, model, what = trainer_for(qlora, tmp_path / "out")  # it has compared the losses in eval mode
    reference, _ = training._build_model(planning.plan(planning.as_recipe(qlora | {"model": {"name": qlora["model"]["name"]}})))
    packed = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit) and "lora" not in name}
    assert len(packed) == 2 * 7
    with torch.no_grad():
        for name, module in packed.items():
            plain = reference.get_submodule(name).weight
            plain.copy_(bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).reshape(plain.shape))
        for (name, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            if "lora_" in name:
                b.copy_(a.normal_(std=0.1))
    if recomputed:
        model.gradient_checkpointing_enable()
    rows = collate([what.dataset[i] for i in range(2)])
    trainer.compute_loss(model, rows | {"logits_to_keep": 1}).backward()
    reference(**rows, use_cache=False).loss.backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert wanted
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert wanted[name].abs().max() > 0
            assert torch.allclose(p.grad, wanted[name], rtol=1e-3, atol=1e-4 * wanted[name].abs().max()), name


@needs_bitsandbytes
def test_an_adapter_from_a_quantised_base_loads_on_the_stored_one(qlora, tmp_path):
    out = training.finetune(qlora, tmp_path / "out")
    history = json.loads((out / "checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert np.isfinite([entry["loss"] for entry in history if "loss" in entry]).all()
    assert all("lora" in name for name in weights(out))
    plain = checkpoint.load(out)  # refuses a base with another fingerprint
    packed = checkpoint.load(out, quantization_config=checkpoint.bitsandbytes_config(NF4))
    assert type(packed.model.get_base_model().model.layers[0].mlp.up_proj).__module__ == "peft.tuners.lora.bnb"
    assert (logits(plain.model) - logits(packed.model)).abs().max() > 0
    assert checkpoint.merge(out, tmp_path / "merged")
    tiny_model(intermediate_size=128, seed=1).save_pretrained(tmp_path / "base")
    for config in (None, checkpoint.bitsandbytes_config(NF4)):
        with pytest.raises(ValueError, match="is another model"):
            checkpoint.load(out, quantization_config=config)
