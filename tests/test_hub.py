"""push and load with the real huggingface_hub client, against a hub of our own on the loopback interface.

The client reads its environment when it is imported, and the other tests are offline: it runs in processes of its own.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_longctx
from hf_longctx import files
from hf_longctx.hub import _explained, trainer_options
from hf_longctx.recipe import dump_recipe, parse_recipe
from tests.conftest import byte_tokenizer, tiny_model, write_tokens
from tests.fake_hub import FakeHub
from tests.test_card import evaluation

LOOP = """
import contextlib, io, json, os, sys
from hf_longctx.cli.main import main
for line in sys.stdin:
    words, environment = json.loads(line)
    os.environ.update(environment)
    sys.argv = ["longctx", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            exec(words[1], {}) if words[0] == "python" else main()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


class Run(NamedTuple):
    status: int
    out: str
    err: str


class Client:
    """`client("push", folder, "tester/x", token="hf_read")`: the command line, or python, in one process, since importing takes seconds."""

    def __init__(self, environment: dict[str, str]):
        self.process = subprocess.Popen([sys.executable, "-c", LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def __call__(self, *words: object, token: str = "hf_write") -> Run:
        self.process.stdin.write(json.dumps([[*map(str, words)], {"HF_TOKEN": token}]) + "\n")
        self.process.stdin.flush()
        return Run(*json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="module")
def hub(base):
    with FakeHub() as found:
        found.add("tester/base", base)
        yield found


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    """That of a user of the loopback hub, with nothing of this machine's settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    return kept | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_write", "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def client(environment):
    found = Client(environment)
    yield found
    found.close()


@pytest.fixture(scope="module")
def made(base, tokens, tmp_path_factory):
    """`made/adapter`, trained on a local base, `made/merged` and `made/shards`, patched only, in several weight files."""
    root = tmp_path_factory.mktemp("made")
    recipe = {
        "model": {"name": str(base)}, "methods": [{"name": "yarn", "factor": 4}, {"name": "pose"}], "window": 32, "data": {"path": str(tokens)}, "lora": {"r": 4},
        "train": {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "disable_tqdm": True},
    }  # fmt: skip
    hf_longctx.finetune(recipe, root / "adapter")
    hf_longctx.merge(root / "adapter", root / "merged")
    for folder in (root / "adapter", root / "merged"):
        for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "notes.txt", "all_results.json", "events.out.tfevents.1", ".env"):
            (folder / name).write_text("mine")
        (folder / "eval").mkdir()
        (folder / "eval" / "model.safetensors").write_text("mine")
    (root / "merged" / "LICENSE").write_text("Do what you want.")
    (root / "adapter" / "README.md").write_text("# What I think of it\n")
    config = files.read_json(root / "merged" / "config.json")
    files.write_json(root / "merged" / "config.json", config | {"_name_or_path": str(root / "whole")})
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(root / "whole", max_shard_size="60KB")
    hf_longctx.patch(root / "whole", {"name": "ntk", "factor": 2}, out=root / "shards")
    return root


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def loading_lines(readme: bytes) -> str:
    """The Python of a card."""
    return re.search(r"## How to load it\n\n```python\n(.*?)```", readme.decode(), re.S)[1]


def one_line(run: Run, status: int, *parts: str) -> None:
    assert (run.status, run.out) == (status, ""), run
    assert run.err.startswith("longctx: ")
    assert run.err.count("\n") == 1, run.err
    for part in parts:
        assert part in run.err, run.err


MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"README.md", "recipe.yaml", "longctx.json", "adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_merged_model_loads_by_its_id_without_this_package(hub, client, environment, made, base, tmp_path):
    before = contents(made / "merged")
    hub.log.clear()
    results = evaluation(tmp_path / "results", str(made / "merged"), "tester/base")
    status, out, err = client("push", made / "merged", "tester/merged", "--base", "tester/base", "--results", results)
    assert (status, err) == (0, "")
    assert out == f"{made / 'merged'}: {hub.url}/tester/merged/commit/{hub.repos['tester/merged'].at('main').oid}\n"
    assert contents(made / "merged") == before
    found = hub.files("tester/merged")
    assert set(found) == MODEL | {"LICENSE", "recipe.yaml", "longctx/passkey.png", "longctx/perplexity.png"}
    assert "| tokens | 2 steps, 128 tokens |" in found["README.md"].decode()
    assert re.search(r"\| hardware \| 1 x \w+; hf_longctx \S+, transformers \S+, torch \S+ \|", found["README.md"].decode())
    assert found["model.safetensors"] == (made / "merged" / "model.safetensors").read_bytes()
    for name, data in found.items():
        assert str(made.parent).encode() not in data, name
        assert b"hf_write" not in data, name
    code = f"""
import sys
{loading_lines(found["README.md"])}
import torch
torch.save(model.eval()(torch.arange(3, 103)[None]).logits, {str(tmp_path / "logits.pt")!r})
print([name for name in sys.modules if name.startswith("hf_longctx")], tokenizer.model_max_length, model.config.max_position_embeddings)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment | {"HF_TOKEN": "hf_read"}, capture_output=True, text=True)
    assert done.stdout == "[] 256 256\n", done.stderr
    with torch.no_grad():
        wanted = hf_longctx.load(made / "merged", device="cpu").model(torch.arange(3, 103)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted)


def test_an_existing_repository_gets_a_commit_and_only_what_changed(hub, client, made):
    client("push", made / "merged", "tester/again")
    repo = hub.repos["tester/again"]
    assert [commit.message for commit in repo.branches["main"]] == ["initial commit", f"Upload a model with longctx {hf_longctx.__version__}"]
    hub.log.clear()
    assert client("push", made / "merged", "tester/again").status == 0
    assert len(repo.branches["main"]) == 2  # nothing changed
    others = {"hello.md": hub.keep(b"hello"), "README.md": hub.keep(b"# Mine\n"), "adapter_config.json": hub.keep(b"{}")}
    repo.commit("main", "on the web", repo.at("main").files | others)
    assert client("push", made / "shards", "tester/again").status == 0
    found = hub.files("tester/again")
    assert len(repo.branches["main"]) == 4
    assert found["hello.md"] == b"hello"
    assert b"# Mine" in found["README.md"]
    assert b"# again" in found["README.md"]
    assert "model.safetensors.index.json" in found
    assert not {"model.safetensors", "adapter_config.json"} & set(found)  # either would be loaded in place of the shards


def test_an_adapter_goes_up_without_the_path_of_its_base(hub, client, made, tmp_path):
    before = contents(made / "adapter")
    one_line(client("push", made / "adapter", "tester/adapter"), 2, "which nobody else has", "--base HUB_ID")
    one_line(client("push", made / "adapter", "tester/adapter", "--base", made), 2, "base must be the hub id")
    one_line(client("push", made / "adapter", "tester/adapter", "--base", "tester/typo"), 2, "there is no model 'tester/typo'")
    assert "tester/adapter" not in hub.repos
    assert client("push", made / "adapter", "tester/adapter", "--base", "tester/base").status == 0
    assert contents(made / "adapter") == before
    found = hub.files("tester/adapter")
    assert set(found) == ADAPTER
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "tester/base"
    assert json.loads(found["longctx.json"])["base"] == "tester/base"
    for name, data in found.items():
        assert str(made.parent).encode() not in data, name
        assert b"tokens.npz" not in data, name
    assert b"# What I think of it" in found["README.md"]
    code = f"""
{loading_lines(found["README.md"])}
import torch
torch.save(model(torch.arange(3, 103)[None].to(model.device)).logits.cpu(), {str(tmp_path / "logits.pt")!r})
"""
    assert client("python", code).status == 0
    with torch.no_grad():
        wanted = hf_longctx.load(made / "adapter", device="cpu").model(torch.arange(3, 103)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted)


def test_a_state_space_model_with_changed_step_sizes(hub, client, tmp_path):
    """Its thresholds go up with the weights, and whoever has the plugin gets the same model by its id."""
    tiny_model("mamba2", hidden_size=16, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=8).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    tokens = write_tokens(tmp_path, 2, 100)
    hf_longctx.patch(tmp_path / "base", {"name": "delta_filter", "trained": 20, "target": 80}, tmp_path / "filtered", data=tokens)
    assert client("push", tmp_path / "filtered", "tester/filtered").status == 0
    code = "import hf_longctx, torch; m, _ = hf_longctx.load('tester/filtered', device='cpu'); print(type(m).__name__, m(torch.arange(9)[None]).logits.sum().item())"
    with torch.no_grad():
        want = hf_longctx.load(tmp_path / "filtered", device="cpu").model(torch.arange(9)[None]).logits.sum().item()
    run = client("python", code)
    assert run.out.split()[0] == "LongctxMamba2ForCausalLM", run.err
    assert float(run.out.split()[1]) == pytest.approx(want, rel=1e-5)


def test_private_branch_and_pull_request(hub, client, made):
    assert client("push", made / "merged", "private", "--private").status == 0  # without a name before it, the user's own
    assert hub.repos["tester/private"].private
    one_line(client("push", made / "merged", "tester/base", "--private"), 2, "tester/base is there already and is public")
    assert client("push", made / "merged", "tester/branches", "--revision", "v2").status == 0
    repo = hub.repos["tester/branches"]
    assert set(hub.files("tester/branches", "v2")) == MODEL | {"LICENSE", "recipe.yaml"}
    assert not hub.files("tester/branches")
    assert b'revision="v2"' in hub.files("tester/branches", "v2")["README.md"]
    status, out, _ = client("push", made / "merged", "tester/branches", "--create-pr")
    assert (status, out) == (0, f"{made / 'merged'}: {hub.url}/tester/branches/discussions/1\n")
    assert set(hub.files("tester/branches", "refs/pr/1")) == MODEL | {"LICENSE", "recipe.yaml"}
    assert len(repo.branches["main"]) == 1


@pytest.mark.parametrize(
    ("words", "token", "parts"),
    [
        ("MERGED tester/x", "hf_bad", ["refuses your token", "hf auth login", "HF_TOKEN"]),
        ("MERGED tester/x", "hf_read", ["your token may not write to tester/x", "don't have the rights"]),
        ("MERGED someone/x", "hf_write", ["your token may not write to someone/x", "name of your own"]),
        ("MERGED a/b/c", "hf_write", ["'a/b/c' cannot be the name of a repository", "NAME/MODEL"]),
        ("MERGED tester/x --revision v2 --create-pr", "hf_write", ["default branch"]),
        ("MERGED tester/x --results MERGED", "hf_write", ["holds no finished evaluation"]),
        ("nothing tester/x", "hf_write", ["nothing is not a folder"]),
        ("EMPTY tester/x", "hf_write", ["holds no model"]),
    ],
)
def test_what_cannot_be_pushed_is_one_line(hub, client, made, tmp_path, words, token, parts):
    places = {"MERGED": made / "merged", "EMPTY": tmp_path}
    one_line(client("push", *(places.get(word, word) for word in words.split()), token=token), 2, *parts)
    assert "tester/x" not in hub.repos


def weights_new_to(hub: FakeHub, folder: Path) -> set[str]:
    """The hashes of the weight files in `folder`, once the hub has forgotten them."""
    found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    assert len(found) >= 3
    hub.blobs = {key: data for key, data in hub.blobs.items() if key not in found}
    return found


def test_an_upload_that_fails_below_http_is_explained_too():
    """Xet raises Python's own ConnectionError."""
    with pytest.raises(ConnectionError, match=r"broke off .*Network error.*`longctx push folder a/b` once more goes on"), _explained(Path("folder"), "a/b"):
        raise ConnectionError("Network error: 404")


def test_a_repository_without_files_holds_no_model(hub, client, tmp_path):
    hub.add("tester/empty", tmp_path)
    one_line(client("inspect", "tester/empty"), 2, "tester/empty holds no model")


def test_a_push_that_broke_off_goes_on(hub, client, made):
    weights = weights_new_to(hub, made / "shards")
    hub.log.clear()
    hub.breaks = {"blob": 1, "commit": 1}
    failed = client("push", made / "shards", "tester/broken")
    one_line(failed, 1, "ConnectionError", "broke off", f"`longctx push {made / 'shards'} tester/broken` once more goes on")
    assert set(hub.sent()) == weights  # the blob that broke off was sent again at once
    assert not hub.files("tester/broken")  # a commit is there whole or not at all
    hub.log.clear()
    assert client("push", made / "shards", "tester/broken").status == 0
    assert hub.sent() == []
    assert weights <= {hashlib.sha256(data).hexdigest() for data in hub.files("tester/broken").values()}


def test_a_killed_push_goes_on(hub, client, environment, made):
    weights = weights_new_to(hub, made / "shards")
    hub.log.clear()
    reached = threading.Event()
    hub.breaks, hub.on_break = {"blob": 1}, reached.set
    words = ["push", str(made / "shards"), "tester/killed"]
    process = subprocess.Popen([sys.executable, "-m", "hf_longctx.cli", *words], env=environment, stderr=subprocess.DEVNULL)
    try:
        assert reached.wait(100)
    finally:
        process.kill()
        process.wait()
        hub.on_break = lambda: None
    first = set(hub.sent())
    assert not hub.files("tester/killed")
    assert client(*words).status == 0
    second = hub.sent()[len(first) :]
    assert not first & set(second)
    assert first | set(second) == weights
    assert second  # it was killed in time


def test_a_gated_model_is_named_as_such(hub, client, base):
    hub.add("tester/gated", base, gated=True)
    for words in (("inspect", "tester/gated"), ("eval", "tester/gated", "--lengths", "64", "--out", "nowhere")):
        one_line(client(*words), 2, "tester/gated is gated: accept its terms on the hub", "hf auth login")
    hub.add("tester/secret", base, private=True)
    assert client("inspect", "tester/secret").status == 0
    one_line(client("inspect", "tester/other"), 2, "'tester/other' is neither a folder here nor a repository on the hub")


def test_offline_is_said_in_a_line(hub, client, environment, made):
    assert client("inspect", "tester/base").status == 0  # it is in the cache from now on
    offline = Client(environment | {"HF_HUB_OFFLINE": "1"})
    try:
        hub.log.clear()
        one_line(offline("inspect", "tester/merged2"), 2, "'tester/merged2'", "HF_HUB_OFFLINE")
        one_line(offline("push", made / "merged", "tester/offline"), 2, "HF_HUB_OFFLINE is set", "unset it")
        assert hub.log == []
        assert offline("inspect", "tester/base").status == 0
    finally:
        offline.close()


def test_finetune_pushes_its_result_and_then_what_was_measured(hub, client, recipe, tmp_path):
    recipe["model"]["name"] = "tester/base"
    recipe["eval"] = {"tasks": [{"name": "passkey", "n": 1, "depths": 2}], "lengths": [320]}
    recipe["train"] |= {"max_steps": 2, "save_steps": 1, "push_to_hub": True, "hub_model_id": "tester/tuned", "hub_private_repo": True, "hub_revision": "run1"}
    dump_recipe(parse_recipe(recipe), tmp_path / "recipe.yaml")
    hub.log.clear()
    one_line(client("finetune", tmp_path / "recipe.yaml", "--out", tmp_path / "out", token="hf_read"), 2, "your token may not write to tester/tuned")
    assert not (tmp_path / "out").exists()  # before anything was trained
    status, out, err = client("finetune", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    lines = out.splitlines()
    assert (status, lines[-1]) == (0, f"{tmp_path / 'out'}: its evaluation is in the card"), err
    assert f"{tmp_path / 'out'}: pushed to the hub" in lines
    repo = hub.repos["tester/tuned"]
    assert repo.private
    assert [len(commits) for commits in repo.branches.values()] == [1, 3]  # main: made; run1: made, the result, its evaluation
    found = hub.files("tester/tuned", "run1")
    assert set(found) == ADAPTER | {"longctx/passkey.png"}
    assert b"| tuned | passkey:" in found["README.md"]
    commit = hub.repos["tester/base"].at("main").oid
    assert json.loads(found["longctx.json"]) | {"base": "tester/base", "revision": commit} == json.loads(found["longctx.json"])
    for named in (json.loads(found["adapter_config.json"]), json.loads((tmp_path / "out" / "adapter_config.json").read_text())):
        assert (named["base_model_name_or_path"], named["revision"]) == ("tester/base", commit)  # not the folder of the cache
    assert b"tester/tuned" not in found["recipe.yaml"]
    assert f"`tester/base` at `{commit}`".encode() in found["README.md"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"hub_token": "hf_x"}, "hub_token would be saved"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "pushed once, at the end"),
        ({"push_to_hub": True}, "needs a base that others can find"),
    ],
)
def test_trainer_options_that_cannot_work_are_refused_first(recipe, tmp_path, train, message):
    recipe["train"] |= train
    with pytest.raises(ValueError, match=message):
        hf_longctx.finetune(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trainer_options_as_arguments_of_push(recipe, tmp_path):
    recipe["model"]["name"] = "org/base"
    assert trainer_options(parse_recipe(recipe), tmp_path / "out") == {}
    recipe["train"] |= {"push_to_hub": True, "hub_strategy": "end"}
    assert trainer_options(parse_recipe(recipe), tmp_path / "out") == {"repo_id": "out", "private": False, "revision": None}


BIAS = [{"name": "nope", "target": 128}, {"name": "mkl_alibi", "preset": "mep_learned"}]
ROPE = [{"name": "yarn", "factor": 4}, {"name": "pose"}]


@pytest.mark.parametrize(("methods", "flags"), [(ROPE, ["-m", "yarn:factor=4"]), (BIAS, ["-m", "nope:target=128", "-m", "mkl_alibi:preset=mep_learned"])])
def test_from_a_hub_id_to_a_hub_id(hub, client, recipe, tmp_path, methods, flags):
    """The README's commands in their order, from one repository to another: patch, finetune, merge, eval, push, load."""
    own = f"tester/{methods[-1]['name']}"
    recipe |= {"model": {"name": "tester/base"}, "methods": methods}
    recipe["train"]["max_steps"] = 2
    dump_recipe(parse_recipe(recipe), tmp_path / "recipe.yaml")
    patched, adapter, merged, results = (tmp_path / name for name in ("patched", "adapter", "merged", "results"))
    for words in (
        ["inspect", "tester/base"],
        ["patch", "tester/base", *flags, "--out", patched],
        ["finetune", tmp_path / "recipe.yaml", "--out", adapter],
        ["merge", adapter, "--out", merged],
        ["eval", merged, "--baseline", "tester/base", "--lengths", "320", "--task", "passkey:n=1,depths=2", "--task", "perplexity", "--out", results],
        ["push", merged, own, "--results", results],
        ["push", adapter, f"{own}-lora"],
    ):
        done = client(*words)
        assert done.status == 0, done
    card = hub.files(own)["README.md"].decode()
    assert "base_model: tester/base" in card
    assert f"`tester/base` at `{hub.repos['tester/base'].at('main').oid}`" in card
    assert methods[-2 if methods is ROPE else -1]["name"] in card
    assert ("import hf_longctx" in loading_lines(hub.files(own)["README.md"])) == (methods is BIAS)
    load = """
import torch, hf_longctx
from transformers import AutoModelForCausalLM
ids = torch.arange(5, 105)[None]
with torch.no_grad():
    logits = [model(ids, use_cache=False).logits for model in (
        AutoModelForCausalLM.from_pretrained("OWN", dtype=torch.float32), hf_longctx.load("OWN-lora", device="cpu").model,
        hf_longctx.load("MERGED", device="cpu").model)]
assert max((logits[0] - other).abs().max() for other in logits[1:]) < 1e-4
assert logits[0].isfinite().all()
"""
    done = client("python", load.replace("OWN", own).replace("MERGED", str(merged)))
    assert done.status == 0, done
