"""Fine-tuning, merging and reloading models whose methods have modules of their own: bias, attention, embedding."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_longctx
from hf_longctx import checkpoint, planning, training
from hf_longctx.data import collate
from hf_longctx.lora import add_lora
from hf_longctx.method import load_methods
from hf_longctx.modules import Formula
from hf_longctx.patching import patch_model
from hf_longctx.recipe import parse_recipe
from tests.conftest import tiny_model
from tests.test_training import adapted, logits

COMBINATIONS = {
    "bias in place of RoPE": [{"name": "nope", "target": 128}, {"name": "mkl_alibi", "preset": "mep_learned"}],
    "bias a layer": [{"name": "kerple", "per_layer": True}],
    "scaling": [{"name": "yarn", "factor": 2}, {"name": "ssmax"}],
    "embedding": [{"name": "sinusoidal", "gain": 0.5}],
    "all": [{"name": "linear", "factor": 2}, {"name": "t5"}, {"name": "key_norm", "by": "mean", "learn_gain": True}, {"name": "legendre"}],
    "nothing learned": [{"name": "nope", "target": 128}, {"name": "alibi"}],
}  # fmt: skip


def formulas(model) -> dict[str, torch.Tensor]:
    """Every learned number of the methods, the trained copy where PEFT made one."""
    return {
        name.replace("modules_to_save.default.", "").removeprefix("base_model.model."): p.detach().clone()
        for name, p in model.named_parameters() if "longctx_" in name and "original_module" not in name
    }  # fmt: skip


@pytest.mark.parametrize("methods", COMBINATIONS.values(), ids=COMBINATIONS)
def test_an_adapter_carries_what_the_methods_learned(recipe, tmp_path, methods):
    recipe |= {"methods": methods}
    folder, trained = adapted(recipe, tmp_path / "out")
    start = formulas(hf_longctx.load(recipe["model"]["name"], methods=methods, device="cpu").model)
    learned = formulas(trained)
    assert learned.keys() == start.keys()
    assert all(not torch.equal(value, start[name]) for name, value in learned.items())
    saved = [name for name in load_file(folder / "adapter_model.safetensors") if "longctx_" in name]
    assert len(saved) == len(learned)
    again = hf_longctx.load(folder, device="cpu").model
    torch.testing.assert_close(logits(again), logits(trained))
    merged = checkpoint.merge(folder, tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["model_type"] == "hf_longctx_llama"
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits(whole), logits(trained), atol=1e-5, rtol=1e-4)
    assert formulas(whole).keys() == learned.keys()
    for name, value in formulas(whole).items():
        torch.testing.assert_close(value, learned[name])
    if learned:
        with pytest.raises(ValueError, match=r"holds what its methods learned \(longctx_.*patch the model that it was made from$"):
            hf_longctx.patch(merged, "alibi", tmp_path / "again")


def test_a_whole_model_is_trained_and_saved(recipe, tmp_path):
    recipe |= {"methods": COMBINATIONS["all"], "lora": None}
    folder, trained = adapted(recipe, tmp_path / "out")
    again = hf_longctx.load(folder, device="cpu").model
    torch.testing.assert_close(logits(again), logits(trained), atol=1e-5, rtol=1e-4)
    assert all(p.dtype == torch.float32 for module in again.modules() if isinstance(module, Formula) for p in module.parameters())


def test_an_adapter_on_the_wrong_base_is_still_refused(recipe, tmp_path):
    """The base's fingerprint leaves out what a method adds."""
    recipe |= {"methods": COMBINATIONS["bias a layer"]}
    training.finetune(recipe, tmp_path / "out")
    note = json.loads((tmp_path / "out/longctx.json").read_text())
    assert note["fingerprint"] == checkpoint.fingerprint_of(recipe["model"]["name"])


def test_documents_are_not_packed_where_a_method_reads_the_whole_row(recipe, tmp_path):
    np.savez(tmp_path / "t.npz", np.arange(3, 100), np.arange(3, 20))
    recipe |= {"methods": [{"name": "key_norm"}], "data": {"path": str(tmp_path / "t.npz")}}
    with pytest.raises(ValueError, match=r"cannot be packed with key_norm, which sums over all keys of a row; set short: drop$"):
        planning.plan(planning.as_recipe(recipe))


@pytest.mark.parametrize("methods", [[{"name": "alibi"}], [{"name": "log_n", "form": "su", "reference": 8}], [{"name": "ssmax"}]])
def test_packed_rows_are_each_document_alone(recipe, tmp_path, methods):
    """A packed row's 4-D mask keeps documents apart; distances and counts of keys start anew with each."""
    np.savez(tmp_path / "t.npz", np.arange(3, 27), np.arange(30, 50))
    recipe |= {"methods": methods, "data": {"path": str(tmp_path / "t.npz")}}
    what = planning.plan(planning.as_recipe(recipe))
    row = collate([what.dataset[0]])
    model = hf_longctx.load(recipe["model"]["name"], methods=methods, device="cpu").model
    with torch.no_grad():
        packed = model(**{key: row[key] for key in ("input_ids", "attention_mask", "position_ids")}, use_cache=False).logits[0]
    starts = [0, *(torch.nonzero(row["position_ids"][0].diff() < 0)[:, 0] + 1).tolist(), row["input_ids"].shape[1]]
    assert len(starts) > 2
    for begin, end in pairwise(starts):
        with torch.no_grad():
            alone = model(row["input_ids"][:, begin:end], use_cache=False).logits[0]
        torch.testing.assert_close(packed[begin:end], alone, atol=1e-4, rtol=1e-4)


def test_pefts_default_layers_are_those_of_the_stock_family():
    given = parse_recipe({"model": {"name": "x"}, "window": 32, "data": {"path": "x"}, "lora": {"r": 2}, "methods": []})
    stock, ours = (sorted(add_lora(model, given).peft_config["default"].target_modules) for model in (tiny_model(), patch_model(tiny_model(), load_methods("alibi"))))
    assert stock == ours == ["q_proj", "v_proj"]
