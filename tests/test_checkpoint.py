"""Checkpoints in and out: what a patch, a save and a merge write, what they leave alone, and who can read it."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_longctx
from hf_longctx import checkpoint, files
from hf_longctx.integration import rope
from hf_longctx.method import load_methods, method
from tests.conftest import TINY, WINDOW, byte_tokenizer, tiny_config, tiny_model

YARN = {"name": "yarn", "factor": 4}
LINEAR = {"name": "linear", "factor": 4}
WAVELENGTH = {"name": "yarn", "factor": 4, "blend": "wavelength"}


def tokens(length: int = 3 * WINDOW) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def stock(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def store(folder: Path, family: str = "llama", **changes) -> Path:
    tiny_model(family, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def config_only(folder: Path, config) -> Path:
    """A folder whose weights are of the right name and nothing else: a patch never opens them."""
    folder.mkdir(exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    return folder


# --- What a patched folder holds.


@pytest.mark.floor
def test_weights_are_linked_and_never_opened(tmp_path):
    base = config_only(tmp_path / "base", tiny_config())
    for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json", "LICENSE", "chat_template.jinja", "pytorch_model.bin", "optimizer.pt"):
        (base / name).write_bytes(name.encode())
    out = hf_longctx.patch(base, YARN, tmp_path / "out")
    assert {p.name for p in base.iterdir()} - {p.name for p in out.iterdir()} == {"pytorch_model.bin", "optimizer.pt"}
    for path in out.iterdir():
        if path.name != "config.json":
            assert path.read_bytes() == (base / path.name).read_bytes()
            assert path.samefile(base / path.name)


@pytest.mark.parametrize("how", ["a link into a cache", "a hub snapshot", "another file system"])
def test_weights_are_copied_where_a_link_would_not_last(how, tmp_path, monkeypatch):
    real = config_only(tmp_path / "blobs", tiny_config())
    base = tmp_path / ("models--a--b/snapshots/0123abc" if how == "a hub snapshot" else "base")
    base.mkdir(parents=True)
    for path in real.iterdir():
        if how == "a link into a cache":
            (base / path.name).symlink_to(path)
        else:
            os.link(path, base / path.name)
    if how == "another file system":
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    out = hf_longctx.patch(base, YARN, tmp_path / "out")
    weights = out / "model.safetensors"
    assert not weights.is_symlink()
    assert weights.read_bytes() == b"not safetensors at all"
    assert not weights.samefile(real / "model.safetensors")


def test_the_base_is_never_written_to(base, tmp_path):
    """Its files share their bytes with the copy's: nothing may write through."""
    copy = tmp_path / "base"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    before = contents(copy)
    hf_longctx.patch(copy, YARN, tmp_path / "a")
    hf_longctx.patch(tmp_path / "a", LINEAR, tmp_path / "b")
    hf_longctx.patch(tmp_path / "a", LINEAR, tmp_path / "a", overwrite=True)  # onto itself
    hf_longctx.patch(copy, WAVELENGTH, tmp_path / "b", overwrite=True)
    loaded = hf_longctx.load(tmp_path / "a", device="cpu")
    hf_longctx.save(loaded.model, loaded.tokenizer, tmp_path / "c")
    assert contents(copy) == before
    for name in ("a", "b", "c"):
        assert (copy / "model.safetensors").read_bytes() == (tmp_path / name / "model.safetensors").read_bytes()


def test_tokenizer_files_are_the_bases_but_for_the_limit(base, tmp_path):
    out = hf_longctx.patch(base, YARN, tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    limit = b'"model_max_length": %d'
    assert (base / "tokenizer_config.json").read_bytes().replace(limit % WINDOW, limit % (4 * WINDOW)) == (out / "tokenizer_config.json").read_bytes()
    assert AutoTokenizer.from_pretrained(out).model_max_length == 4 * WINDOW


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"a": "é", "model_max_length": 64, "z": 1}', '{"a": "é", "model_max_length": 256, "z": 1}'),
        ('{\r\n  "model_max_length" : 1000000000000000019884624838656,\r\n  "z": 1\r\n}', '{\r\n  "model_max_length" : 256,\r\n  "z": 1\r\n}'),
        ('{"model_max_length": null}', '{"model_max_length": 256}'),
        ('{"model_max_length": 1e30}', '{"model_max_length": 256}'),
        ('{"a": {"b": 1}}', '{\n  "model_max_length": 256,"a": {"b": 1}}'),
        ("{ }", '{\n  "model_max_length": 256 }'),
    ],
)
def test_the_tokenizers_limit_is_all_that_changes(before, after, tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(before.encode())
    files.set_tokenizer_limit(tmp_path, 256)
    assert path.read_bytes() == after.encode()
    assert json.loads(path.read_text())["model_max_length"] == 256


def test_the_configuration_is_the_bases_but_for_what_the_method_changes(base, tmp_path):
    out = hf_longctx.patch(base, YARN, tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"longctx", "max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"}
    assert after["rope_theta"] == before["rope_parameters"]["rope_theta"]
    assert after["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}


def test_json_is_never_written_through_a_hard_link(tmp_path):
    (tmp_path / "base").write_text("{}")
    os.link(tmp_path / "base", tmp_path / "copy")
    files.write_json(tmp_path / "copy", {"b": "é", "a": 1})
    assert (tmp_path / "base").read_text() == "{}"
    assert (tmp_path / "copy").read_text(encoding="utf-8") == '{\n  "a": 1,\n  "b": "é"\n}\n'
    assert {p.name for p in tmp_path.iterdir()} == {"base", "copy"}


# --- The folder to write.


@pytest.mark.parametrize("state", ["full", "a file"])
def test_an_output_in_use_is_refused_before_anything_is_read(state, tmp_path):
    out = tmp_path / "out"
    if state == "full":
        out.mkdir()
        (out / "mine").write_text("")
    else:
        out.write_text("")
    for call in (
        lambda: hf_longctx.patch("no/such-model", YARN, out),
        lambda: hf_longctx.patch(tmp_path / "no.gguf", YARN, out),
        lambda: hf_longctx.merge(tmp_path / "no adapter", out),
    ):
        with pytest.raises(ValueError, match="--out"):
            call()
    assert out.exists()


def test_overwriting_replaces_all_of_it(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    hf_longctx.patch(base, YARN, out, overwrite=True)
    assert not (out / "mine").exists()
    assert (out / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_may_be_empty_nested_or_a_link(base, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "here")
    for out in ("../empty", "../new/deep", "../link"):
        assert files.read_json(hf_longctx.patch(base, YARN, out, overwrite=out == "../link") / "config.json")["longctx"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "here", "link", "new"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_the_working_directory_is_no_output(out, base, tmp_path, monkeypatch):
    """It would be replaced under the shell's feet."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(base, "working directory", YARN, out=out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("fails", ["place", "write_json", "set_tokenizer_limit"])
def test_a_failure_leaves_the_old_output_and_no_scraps(fails, base, tmp_path, monkeypatch):
    out = hf_longctx.patch(base, YARN, tmp_path / "out")
    before = contents(out)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, fails, full)
    with pytest.raises(OSError, match="No space"):
        hf_longctx.patch(base, LINEAR, out, overwrite=True)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_to_swap_puts_the_old_output_back(base, tmp_path, monkeypatch):
    """The old folder has been moved aside, the new one cannot take its place."""
    out = hf_longctx.patch(base, YARN, tmp_path / "out")
    before, rename = contents(out), Path.rename

    def stuck(self, target):
        if Path(target) == out and not self.name.endswith(".old"):
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(OSError, match="busy"):
        hf_longctx.patch(base, LINEAR, out, overwrite=True)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_needs_an_output(base):
    with pytest.raises(ValueError, match="needs out"):
        hf_longctx.patch(base, YARN)


# --- What is refused, by name and in one line.


def refused(model, match, methods=LINEAR, **more):
    with pytest.raises(ValueError, match=match) as caught:
        hf_longctx.patch(model, methods, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "match"), [("pytorch_model.bin", "only as pytorch_model.bin"), ("model.pth", "only as model.pth"), ("notes", "has no .*weights")])
def test_weights_in_pickle_are_refused(name, match, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path, match, out=tmp_path / "out")
    with pytest.raises(ValueError, match=match):
        hf_longctx.load(tmp_path)


@pytest.mark.parametrize("left", [0, 1000, -1])
def test_weights_cut_short_are_refused_by_name(base, tmp_path, left):
    """By a copy or a download that was stopped half-way: in the header, and behind it."""
    shutil.copytree(base, tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"cut/model.safetensors is damaged or cut short"):
        hf_longctx.load(tmp_path / "cut")


def test_no_such_model(tmp_path):
    """The hub is switched off in the tests."""
    refused("no-one/nothing", "no folder here, and the hub cannot be reached", out=tmp_path / "out")
    refused("not a/name/at all", "neither a folder here nor a repository", out=tmp_path / "out")
    refused(tmp_path, "holds no model", out=tmp_path / "out")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file", out=tmp_path / "out")
    refused(tmp_path / "no.gguf", "does not exist", out=tmp_path / "out")
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", "is empty", out=tmp_path / "out")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        files.read_json(tmp_path / "config.json")


UNSUPPORTED = [
    ("gpt2", {}, "gpt2 has no rotary position embedding"),
    ("falcon", {"alibi": True}, "falcon has no rotary position embedding"),
    ("deepseek_v3", {}, "deepseek_v3 uses multi-head latent attention"),
    ("qwen2_vl", {}, "qwen2_vl is a multimodal model"),
    ("gemma3", {}, "gemma3 is a multimodal model"),
    ("qwen2_vl_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}, "multi-axis RoPE .mrope_section"),
    ("gemma4_text", {}, "gemma4_text was trained with rope_type 'proportional'"),
    ("phimoe", {}, "phimoe multiplies cos and sin"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic', whose frequencies depend on the length"),
]


@pytest.mark.parametrize(("family", "fields", "match"), UNSUPPORTED)
def test_unsupported_families_are_refused(family, fields, match, tmp_path):
    try:
        config = AutoConfig.for_model(family, **fields)
    except ValueError:
        pytest.skip(f"this Transformers has no {family}")
    refused(config_only(tmp_path / "base", config), match, out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    facts = hf_longctx.inspect_model(tmp_path / "base")
    assert match.split()[0].strip("'") in facts["supported"] or facts["supported"].startswith(family)


def test_training_methods_are_refused(base, tmp_path):
    refused(base, "pose fills the positions slot, which belongs to training", {"name": "pose"}, out=tmp_path / "out")


def test_what_phi3_cannot_express_is_refused(family_folder, tmp_path):
    refused(family_folder("phi3"), "phi3 accepts no rope_type but longrope", {"name": "dynamic_ntk", "factor": 2}, out=tmp_path / "out")


def test_an_adapter_is_refused(adapter, tmp_path):
    refused(adapter, "is an adapter; merge it first", out=tmp_path / "out")
    with pytest.raises(ValueError, match="is an adapter, trained with methods of its own"):
        hf_longctx.load(adapter, methods=LINEAR)


def test_a_wrapped_model_is_refused():
    from peft import LoraConfig, get_peft_model

    refused(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])), "PeftModel is not a Transformers model")


# --- Sliding windows count tokens, not positions.


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_where_every_layer_slides_attention_becomes_full(family, tmp_path):
    base = store(tmp_path / "base", family, sliding_window=16)
    out = hf_longctx.patch(base, LINEAR, tmp_path / "out")
    model, ids = stock(out), tokens(WINDOW)
    assert model.config.sliding_window is None
    with torch.no_grad():
        change = model(ids).logits - model(torch.cat([ids[:, :1] ^ 1, ids[:, 1:]], 1)).logits
        blind = stock(base)(ids).logits - stock(base)(torch.cat([ids[:, :1] ^ 1, ids[:, 1:]], 1)).logits
    assert change[0, -1].abs().max() > 1e-4  # the last token sees the first
    assert blind[0, -1].abs().max() < 1e-5  # two layers of 16 reach back 30 tokens, not 63


def test_listed_sliding_layers_become_full_before_the_model_is_built(tmp_path):
    """qwen2 keeps a list of layer types, from which layers and cache are built: a live model cannot change them."""
    slides = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    base = store(tmp_path / "base", "qwen2", **slides)
    assert AutoConfig.from_pretrained(base).layer_types == ["sliding_attention"] * 2
    config = AutoConfig.from_pretrained(hf_longctx.patch(base, LINEAR, tmp_path / "out"))
    assert (config.layer_types, config.sliding_window, config.use_sliding_window) == (["full_attention"] * 2, None, False)
    refused(tiny_model("qwen2", **slides), "every layer of this qwen2 slides over 16 tokens: patch the checkpoint")
    loaded = hf_longctx.load(base, methods=LINEAR, device="cpu")
    assert loaded.model.model.layers[0].self_attn.sliding_window is None


def test_alternating_windows_stay(family_folder, tmp_path):
    """gemma3: five local layers to a global one; the global ones are extended."""
    base = family_folder("gemma3_text")
    out = hf_longctx.patch(base, LINEAR, tmp_path / "out")
    before, after = stock(base), stock(out)
    assert after.config.layer_types == before.config.layer_types
    assert after.config.sliding_window == WINDOW // 2
    was, now = before.model.rotary_emb, after.model.rotary_emb
    assert now.sliding_attention_inv_freq.equal(was.sliding_attention_inv_freq)
    torch.testing.assert_close(now.full_attention_inv_freq, was.full_attention_inv_freq / 4)


def test_a_sliding_window_that_is_wide_enough_stays(tmp_path):
    out = hf_longctx.patch(config_only(tmp_path / "base", tiny_config("mistral", sliding_window=1024)), LINEAR, tmp_path / "out")
    assert AutoConfig.from_pretrained(out).sliding_window == 1024


# --- phi3 accepts longrope only, and in Transformers 4 not even its attention factor.


@pytest.mark.parametrize("spec", [LINEAR, YARN, WAVELENGTH, {"name": "llama3", "factor": 4}])
def test_phi3_is_saved_as_longrope_with_equal_lists(spec, family_folder, tmp_path):
    out = hf_longctx.patch(family_folder("phi3"), spec, tmp_path / "out")
    scaling = files.read_json(out / "config.json")["rope_scaling"]
    assert scaling["type" if "type" in scaling else "rope_type"] == "longrope"
    assert scaling["short_factor"] == scaling["long_factor"]
    assert (len(scaling) == 3) == (spec["name"] in ("linear", "llama3"))  # no whole number yields YaRN's attention factor at 64 tokens


@pytest.mark.parametrize("spec", [LINEAR, YARN])
@pytest.mark.parametrize("window", [WINDOW, 65536])
def test_phi3_survives_loading_and_saving(spec, window, tmp_path):
    """Read back, the attention factor may be there only as a ratio of windows."""
    base = store(tmp_path / "base", "phi3", max_position_embeddings=window)
    loaded = hf_longctx.load(hf_longctx.patch(base, spec, tmp_path / "out"), device="cpu")
    hf_longctx.save(loaded.model, loaded.tokenizer, tmp_path / "again")
    assert stock(tmp_path / "again").model.rotary_emb.attention_scaling == loaded.model.model.rotary_emb.attention_scaling
    torch.testing.assert_close(logits(stock(tmp_path / "again")), logits(loaded.model), atol=1e-6, rtol=0)


# --- Adapters.


def make_adapter(base: Path, folder: Path, spec=YARN, **config) -> Path:
    """What fine-tuning leaves: a PEFT adapter of the patched base with random weights, its configuration and longctx.json."""
    from peft import LoraConfig, get_peft_model

    loaded = hf_longctx.load(base, methods=spec, device="cpu")
    mark = checkpoint.fingerprint(loaded.model)
    torch.manual_seed(1)
    model = get_peft_model(loaded.model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **config)).eval()
    model.save_pretrained(folder)
    loaded.model.config.save_pretrained(folder)
    checkpoint.write_sidecar(folder, str(base), None, load_methods(spec), mark, 4 * WINDOW)
    torch.save(logits(model), folder / "logits")
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.mark.floor
def test_an_adapter_loads_and_merges_to_what_was_trained(adapter, base, tmp_path):
    trained = torch.load(adapter / "logits")
    loaded = hf_longctx.load(adapter, device="cpu")
    torch.testing.assert_close(logits(loaded.model), trained, atol=1e-5, rtol=1e-5)
    assert loaded.tokenizer.model_max_length == 4 * WINDOW
    merged = hf_longctx.merge(adapter, tmp_path / "merged")
    scale = trained.abs().max()  # W + B A is rounded once more
    torch.testing.assert_close(logits(stock(merged)) / scale, trained / scale, atol=1e-5, rtol=0)
    assert (logits(stock(base)) - trained).abs().max() > 0.1  # neither LoRA nor the patch is idle
    without = AutoModelForCausalLM.from_pretrained(merged, config=AutoConfig.from_pretrained(base), dtype=torch.float32)
    assert (logits(without) - trained).abs().max() > 0.01


@pytest.mark.parametrize("tied", [True, False])
def test_a_merge_keeps_vocabulary_embeddings_and_dtype(tied, tmp_path):
    base = tmp_path / "base"
    model = tiny_model(tie_word_embeddings=tied).to(torch.bfloat16)
    model.save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    merged = hf_longctx.merge(make_adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    result = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert result.dtype == torch.bfloat16
    assert result.get_input_embeddings().weight.equal(model.get_input_embeddings().weight)
    assert (result.get_output_embeddings().weight.data_ptr() == result.get_input_embeddings().weight.data_ptr()) == tied
    config = files.read_json(merged / "config.json")
    assert config["vocab_size"] == TINY["vocab_size"]
    assert config["tie_word_embeddings"] == tied
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert files.read_json(merged / "tokenizer_config.json")["model_max_length"] == 4 * WINDOW
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not {files.SIDECAR, files.ADAPTER} & {p.name for p in merged.iterdir()}


@pytest.mark.parametrize("seed", [1, 2])
def test_another_base_of_the_same_shape_is_refused(seed, adapter, tmp_path):
    tiny_model(seed=seed).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    for call in (hf_longctx.load, lambda a, base: hf_longctx.merge(a, tmp_path / "out", base=base)):
        with pytest.raises(ValueError, match="is another model"):
            call(adapter, base=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_a_moved_base_is_found_by_name(adapter, base, tmp_path):
    copy = hf_longctx.patch(base, LINEAR, tmp_path / "copy")  # patched otherwise: the adapter's own methods replace that
    torch.testing.assert_close(logits(hf_longctx.load(adapter, base=str(copy), device="cpu").model), torch.load(adapter / "logits"), atol=1e-5, rtol=1e-5)


def test_a_stranger_adapter_is_refused(adapter, tmp_path):
    for path in adapter.iterdir():
        if path.name != files.SIDECAR:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for call in (hf_longctx.load, hf_longctx.inspect_model, lambda a: hf_longctx.merge(a, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"without longctx\.json"):
            call(tmp_path)


def test_only_adapters_can_be_merged(base, tmp_path):
    with pytest.raises(ValueError, match="is not an adapter folder"):
        hf_longctx.merge(base, tmp_path / "out")


def test_the_fingerprint_knows_weights_not_their_form(base, tmp_path):
    """Sixteen values of every parameter, rounded to bfloat16: dtype, shards and the patch do not matter."""
    mark = checkpoint.fingerprint(stock(base))
    assert checkpoint.fingerprint(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)) == mark
    assert checkpoint.fingerprint(hf_longctx.patch(stock(base), YARN)) == mark
    stock(base).save_pretrained(tmp_path, max_shard_size="50KB")
    assert checkpoint.fingerprint(stock(tmp_path)) == mark
    other = stock(base)
    other.model.norm.weight.data[0] += 1
    assert checkpoint.fingerprint(other) != mark


# --- Inspecting.


def test_inspecting_a_model(base, tmp_path):
    facts = hf_longctx.inspect_model(base)
    assert (facts["kind"], facts["family"], facts["trained_window"], facts["window"], facts["methods"]) == ("model", "llama", WINDOW, WINDOW, [])
    facts = hf_longctx.inspect_model(hf_longctx.patch(base, YARN, tmp_path / "out"))
    assert (facts["trained_window"], facts["window"], facts["rope"]["rope_type"]) == (WINDOW, 4 * WINDOW, "yarn")
    assert facts["methods"] == [method("yarn", factor=4).to_dict()]
    assert {"transformers>=5", "transformers>=4.43", "vLLM", "llama.cpp (convert_hf_to_gguf.py)"} == set(facts["loads_with"])
    assert json.loads(json.dumps(facts)) == facts
    with pytest.raises(ValueError, match="holds no model"):
        hf_longctx.inspect_model(tmp_path)


def test_inspecting_needs_no_weights(tmp_path):
    tiny_config("phi3").save_pretrained(tmp_path)
    assert hf_longctx.inspect_model(tmp_path)["family"] == "phi3"


def test_inspecting_says_where_transformers_4_refuses(family_folder, tmp_path):
    for spec, readable in ((LINEAR, True), (YARN, False)):
        facts = hf_longctx.inspect_model(hf_longctx.patch(family_folder("phi3"), spec, tmp_path / spec["name"]))
        assert ("transformers>=4.43" in facts["loads_with"]) == readable


def test_inspecting_an_adapter(adapter, base):
    facts = hf_longctx.inspect_model(adapter)
    assert (facts["kind"], facts["base"], facts["trained_window"], facts["window"]) == ("adapter", str(base), WINDOW, 4 * WINDOW)
    assert facts["methods"] == [method("yarn", factor=4).to_dict()]
    assert facts["loads_with"] == ["hf_longctx"]


# --- Loading.


@pytest.mark.parametrize(("first", "second"), [(YARN, LINEAR), (WAVELENGTH, YARN)])
def test_loading_with_methods_replaces_what_was_patched(first, second, base, tmp_path):
    """The wavelength form brings a top-level `original_max_position_embeddings`, which would win over YaRN's own."""
    folder = hf_longctx.patch(base, first, tmp_path / "out")
    loaded = hf_longctx.load(folder, methods=second, device="cpu")
    wanted = logits(hf_longctx.patch(stock(base), second))
    torch.testing.assert_close(logits(loaded.model), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(hf_longctx.patch(stock(folder), second)), wanted, atol=1e-5, rtol=1e-5)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training


def test_loading_in_an_unknown_dtype(base):
    with pytest.raises(ValueError, match="unknown dtype 'float17'"):
        hf_longctx.load(base, dtype="float17")


def test_saving_keeps_an_unpatched_model_as_it_is(base, tmp_path):
    loaded = hf_longctx.load(base, device="cpu")
    loaded.model.config.use_cache = False  # as Trainer leaves it
    hf_longctx.save(loaded.model, loaded.tokenizer, tmp_path)
    config = files.read_json(tmp_path / "config.json")
    assert config["use_cache"] is True
    assert "longctx" not in config
    torch.testing.assert_close(logits(stock(tmp_path)), logits(stock(base)), atol=0, rtol=0)


# --- GGUF.


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    """The tiny LLaMA as llama.cpp would convert it, but for the row order of queries and keys."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_context_length(WINDOW)
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    words = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    words = [word for word, _ in words] + ["ab"]
    writer.add_token_list(words + [f"<{i}>" for i in range(len(words), TINY["vocab_size"])])
    writer.add_token_types([1] * TINY["vocab_size"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, TINY["num_hidden_layers"])
    for name, value in tiny_model().state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_patched_stock_checkpoint(tiny_gguf, tmp_path):
    facts = hf_longctx.inspect_model(tiny_gguf)
    assert (facts["kind"], facts["family"], facts["trained_window"]) == ("GGUF", "llama", WINDOW)
    loaded = hf_longctx.load(tiny_gguf, methods=YARN, device="cpu")
    assert not getattr(loaded.model, "is_quantized", False)
    out = hf_longctx.patch(tiny_gguf, YARN, tmp_path / "out")
    torch.testing.assert_close(logits(stock(out)), logits(loaded.model), atol=1e-6, rtol=0)
    assert rope.trained_window(AutoConfig.from_pretrained(out)) == WINDOW
    assert AutoTokenizer.from_pretrained(out)("grab it").input_ids == loaded.tokenizer("grab it").input_ids
    assert AutoTokenizer.from_pretrained(out).model_max_length == 4 * WINDOW


# --- Who can read it.

READ = """
import json, sys
class Gone:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "hf_longctx":
            raise ImportError("hf_longctx is not installed here")
sys.meta_path.insert(0, Gone())
sys.modules.pop("hf_longctx", None)
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids, found = torch.load(sys.argv[1]), {}
for folder in sys.argv[3:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:
        found[folder] = str(error)
        continue
    with torch.no_grad():
        out = model(ids).logits
    module = (model.gpt_neox if hasattr(model, "gpt_neox") else model.model).rotary_emb
    flat = hasattr(module, "inv_freq")
    inv_freq = module.inv_freq if flat else module.full_attention_inv_freq
    scaling = module.attention_scaling if flat else module.full_attention_attention_scaling
    found[folder] = {"logits": out, "inv_freq": inv_freq, "scaling": float(scaling)}
assert "hf_longctx" not in sys.modules
torch.save(found, sys.argv[2])
"""


def read_elsewhere(python: str, folders: list[Path], tmp_path: Path) -> list:
    """What another interpreter, to which hf_longctx is not importable, computes from each folder; or the error it gives."""
    torch.save(tokens(), tmp_path / "ids.pt")
    command = [python, "-c", READ, str(tmp_path / "ids.pt"), str(tmp_path / "found.pt"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt")
    return [found[str(folder)] for folder in folders]


def assert_reads_the_same(there, folder: Path) -> None:
    here = stock(folder)
    assert not isinstance(there, str), there
    torch.testing.assert_close(there["logits"], logits(here), atol=2e-5, rtol=1e-5)
    found = rope.frequencies(rope.rotary_of(here), rope.layer_type(here.config))
    torch.testing.assert_close(there["inv_freq"].double(), torch.tensor(found.inv_freq, dtype=torch.float64), rtol=1e-6, atol=0)
    assert there["scaling"] == pytest.approx(found.attention_factor, rel=1e-6)


@pytest.mark.floor
def test_results_load_without_us(base, adapter, tmp_path):
    """Patched, saved and merged results are stock checkpoints."""
    folders = [hf_longctx.patch(base, WAVELENGTH, tmp_path / "patched"), hf_longctx.merge(adapter, tmp_path / "merged")]
    folders.append(hf_longctx.save(hf_longctx.patch(stock(base), YARN), AutoTokenizer.from_pretrained(base), tmp_path / "saved"))
    for there, folder in zip(read_elsewhere(sys.executable, folders, tmp_path), folders):
        assert_reads_the_same(there, folder)


FOR_V4 = [
    *(("llama", spec) for spec in (LINEAR, YARN, WAVELENGTH, {"name": "ntk", "factor": 4}, {"name": "llama3", "factor": 4}, {"name": "nope"})),
    ("llama", {"name": "dynamic_ntk", "factor": 4}),
    ("llama", {"name": "theta", "theta": 1e6, "target": 256}),
    ("llama", {"name": "yarn", "factor": 2.3, "truncate": False, "beta_fast": 16.0, "attention_factor": 1.2}),
    ("llama", {"name": "longrope", "factor": 4, "long_factor": [2.0] * 8, "short_factor": [1.5] * 8}),
    *((family, spec) for family in ("gemma3_text", "phi3", "gpt_neox", "mistral", "qwen2") for spec in (LINEAR, WAVELENGTH)),
    ("gemma3_text", YARN),
    ("gpt_neox", {"name": "theta", "theta": 1e6, "target": 256}),
]


def test_transformers_4_reads_the_same(family_folder, tmp_path):
    """Silently running another RoPE is the failure that the legacy keys are there for. phi3 may refuse instead, by name."""
    python = os.environ.get("LONGCTX_PYTHON_457")
    if not python:
        pytest.skip("needs LONGCTX_PYTHON_457, an interpreter with transformers 4.57 and torch")
    folders = [hf_longctx.patch(family_folder(family), spec, tmp_path / f"{i}") for i, (family, spec) in enumerate(FOR_V4)]
    thetas = {"full_attention": {"rope_type": "default", "rope_theta": 5e5}, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
    local = store(tmp_path / "local", "gemma3_text", rope_parameters=thetas)
    folders.append(hf_longctx.patch(local, YARN, tmp_path / "local yarn"))
    wide = store(tmp_path / "wide", "phi3", max_position_embeddings=65536)  # a window at which a whole number gives YaRN's attention factor
    folders.append(hf_longctx.patch(wide, YARN, tmp_path / "wide yarn"))
    for (family, spec), there, folder in zip([*FOR_V4, ("gemma3_text", YARN), ("phi3", YARN)], read_elsewhere(python, folders, tmp_path), folders):
        if (family, spec) == ("phi3", WAVELENGTH):
            assert "rope_scaling" in there
        else:
            assert_reads_the_same(there, folder)


# --- A real model.


@pytest.mark.shared
def test_a_real_checkpoint(smollm2, tmp_path):
    """SmolLM2-135M-Instruct: 256 MB of weights are linked, and it still answers."""
    out = hf_longctx.patch(smollm2, {"name": "yarn", "factor": 2}, tmp_path / "out")
    assert (out / "model.safetensors").stat().st_size == (smollm2 / "model.safetensors").stat().st_size
    assert hf_longctx.inspect_model(out)["window"] == 16384
    model, tokenizer = hf_longctx.load(out, device="cpu", dtype="bfloat16")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_vllm_is_told_an_attention_factor_that_it_would_not_derive():
    """vLLM takes longrope's temperature from the windows, or from `short_mscale` and `long_mscale`."""
    lists = {"name": "longrope", "factor": 4, "long_factor": [1.5] * 8}
    for spec, meant in [({"name": "yarn", "factor": 4, "blend": "wavelength"}, 0.1 * math.log(4) + 1), (lists | {"attention_factor": 1.3}, 1.3), (lists, None)]:
        model = tiny_model()
        hf_longctx.patch(model, spec)
        parameters = model.config.rope_parameters
        assert parameters.get("short_mscale") == parameters.get("long_mscale") == pytest.approx(meant)
