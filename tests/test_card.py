"""The model card: what it says, what of a person's it keeps, and that no path of this machine is in it."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_longctx import files, patch
from hf_longctx.card import BEGIN, END, Base, is_hub_id, make_card, public_recipe
from hf_longctx.recipe import parse_recipe

ROW = {
    "revision": None, "method": "yarn:factor=4", "depth": None, "n": 20, "seed": 0, "ci_low": 0.7, "ci_high": 0.97, "seconds": 1.0, "peak_memory": None,
    "tokens": 100, "tokenizer": "T 259", "dtype": "float32", "error": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(base, tmp_path_factory) -> Path:
    """A patched checkpoint, window 64 -> 256."""
    return patch(base, {"name": "yarn", "factor": 4}, out=tmp_path_factory.mktemp("card") / "patched")


def evaluation(folder: Path, model: str, baseline: str, **changes) -> Path:
    """A folder as `longctx eval` leaves it: passkey with depths and perplexity of a model, and of a baseline."""
    folder.mkdir()
    rows = []
    for name, method in ((model, "yarn:factor=4"), (baseline, "")):
        for length in (64, 256):
            row = ROW | {"model": name, "method": method, "length": length, "task": "passkey:n=2"} | changes
            rows += [row | {"depth": depth, "metric": "accuracy", "value": 0.9} for depth in (0.0, 1.0, None)]
            rows.append(row | {"task": "perplexity", "metric": "perplexity", "value": 12.34567})
    files.write_json(folder / "results.json", rows)
    run = {"arguments": {"models": [[model, "x"], [baseline, "y"]], "data": {"path": "/home/me/books.npz"}}, "machine": "Some GPU", "versions": {"torch": "2.11"}}
    files.write_json(folder / "run.json", run)
    return folder


def test_the_card_says_what_was_made_and_measured(model, tmp_path):
    results = evaluation(tmp_path / "results", "/home/me/runs/tuned", "/home/me/runs/other")
    recipe = parse_recipe({
        "model": {"name": "org/base"}, "methods": [{"name": "yarn", "factor": 4}, {"name": "pose", "chunks": 3}], "window": 32, "seed": 7,
        "data": {"path": "org/books"}, "lora": None,
    })  # fmt: skip
    card = make_card(model, "me/long", base=Base("org/base", "abc123"), recipe=recipe, results=[results], revision="v2")
    for part in (
        "# long\n\n`org/base` with a context window of 256 tokens instead of 64, by `yarn:factor=4`.",
        'from_pretrained("me/long", revision="v2")', "transformers>=5", "| base model | `org/base` at `abc123` |", "| training positions | `pose:chunks=3` |",
        "| data | org/books train |", "| seed | 7 |", "| model | task | metric | 64 | 256 |", "| long | passkey:n=2 | accuracy | 0.90 [0.70, 0.97] |",
        "| other | perplexity | perplexity | 12.35", "machine: Some GPU", "text: (local) .npz", "![passkey](longctx/passkey.png)", "## Limits",
    ):  # fmt: skip
        assert part in card.text, part
    assert set(card.pictures) == {"longctx/passkey.png", "longctx/perplexity.png"}
    assert all(image.startswith(b"\x89PNG") for image in card.pictures.values())
    assert "/home/me" not in card.text

    data = ModelCard(card.text).data
    assert (data.base_model, data.base_model_relation, data.library_name, data.pipeline_tag) == ("org/base", "finetune", "transformers", "text-generation")
    assert (data.tags, data.datasets, data.get("license")) == (["hf-longctx", "long-context", "yarn"], ["org/books"], None)
    assert [(e.dataset_config, e.metric_type, e.metric_value, e.metric_args["n"]) for e in data.eval_results] == [
        ("64 tokens", "accuracy", 0.9, 20), ("64 tokens", "perplexity", 12.3457, 20), ("256 tokens", "accuracy", 0.9, 20), ("256 tokens", "perplexity", 12.3457, 20)
    ]  # fmt: skip  (the baseline's numbers are not this model's)


def test_numbers_without_a_length_are_in_the_table_and_not_in_the_metadata(model, tmp_path):
    results = evaluation(tmp_path / "results", "/x/tuned", "/x/plain")
    short = ROW | {"model": "/x/tuned", "length": None, "task": "lm_eval/lambada", "metric": "perplexity", "value": 9.5}
    files.write_json(results / "results.json", [short, *files.read_json(results / "results.json")])
    card = make_card(model, "me/long", results=[results])
    assert "| model | task | metric | no length | 64 | 256 |" in card.text
    assert "| long | lm_eval/lambada | perplexity | 9.50 [0.70, 0.97] |" in card.text
    assert len(ModelCard(card.text).data.eval_results) == 4


def test_numbers_of_another_method_are_not_this_models(model, tmp_path):
    results = evaluation(tmp_path / "results", "/x/plain", "/y/plain", method="ntk:factor=2")
    card = make_card(model, "me/long", results=[results])
    assert "| plain | passkey" in card.text
    assert "| plain' | passkey" in card.text  # the same name for two folders
    assert "Not measured at 256 tokens" in card.text
    assert ModelCard(card.text).data.eval_results is None


def test_results_in_several_folders_keep_their_pictures_apart(model, tmp_path):
    folders = [evaluation(tmp_path / name, "/x/a", "org/base") for name in ("one", "two")]
    card = make_card(model, "me/long", results=folders)
    assert set(card.pictures) == {f"longctx/{n}-{task}.png" for n in (1, 2) for task in ("passkey", "perplexity")}
    assert all(f"({place})" in card.text for place in card.pictures)
    assert "| org/base | passkey" in card.text
    with pytest.raises(ValueError, match=r"holds no finished evaluation.*results\.json"):
        make_card(model, "me/long", results=[tmp_path])


def test_a_card_is_made_anew_around_what_a_person_added(model, tmp_path):
    first = make_card(model, "me/long", results=[evaluation(tmp_path / "results", "/x/a", "/x/b")]).text
    assert make_card(model, "me/long", results=[tmp_path / "results"], existing=first).text == first
    edited = first.replace(BEGIN, "Before \\1.\n\n" + BEGIN).replace("# long\n", "# Changed\n").replace("- yarn\n", "- yarn\n- mine\nextra: {a: 1}\nlicense: mit\n") + "\nAfter.\n"
    again = make_card(model, "me/long", base=Base("org/base"), existing=edited).text
    before, inside, after = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", again)
    assert before.endswith("Before \\1.\n\n")
    assert after == "\n\nAfter.\n"
    assert "# long\n" in inside
    data = ModelCard(again).data
    assert (data.tags, data.extra, data.license, data.base_model) == (["hf-longctx", "long-context", "yarn", "mine"], {"a": 1}, "mit", "org/base")
    assert data.eval_results is None  # numbers belong to the weights that were measured
    assert "No evaluation came with" in inside


@pytest.mark.parametrize("head", ["", "---\nlicense: mit\ntags: [mine]\npipeline_tag: text-classification\nlanguage: de\n---\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_card_without_our_part_is_kept_whole(model, head, end):
    theirs = f"{head}# Mine\n\nAll of this.\n".replace("\n", end)
    text = make_card(model, "me/long", existing=theirs).text
    body = "# Mine\n\nAll of this.".replace("\n", end)
    assert body in text
    assert text.index(body) < text.index(BEGIN)
    data = ModelCard(text).data
    assert data.library_name == "transformers"
    if head:
        assert (data.license, data.pipeline_tag, data.language, data.tags[0]) == ("mit", "text-classification", "de", "mine")


def test_results_that_a_person_put_into_the_metadata_stay(model, tmp_path):
    theirs = "---\nmodel-index:\n- name: x\n  results:\n  - task: {type: text-generation}\n    dataset: {type: mmlu, name: MMLU}\n    metrics: [{type: acc, value: 0.5}]\n---\n"
    text = make_card(model, "me/long", results=[evaluation(tmp_path / "results", "/x/a", "/x/b")], existing=theirs).text
    assert [e.dataset_type for e in ModelCard(text).data.eval_results] == ["mmlu", *2 * ["passkey:n=2", "perplexity"]]
    assert [e.dataset_type for e in ModelCard(make_card(model, "me/long", existing=text).text).data.eval_results] == ["mmlu"]


@pytest.mark.parametrize(
    ("existing", "message"),
    [
        (f"{BEGIN}\nmine", "once each"),
        (f"{END}\n{BEGIN}", "once each"),
        (f"{BEGIN}{END}{BEGIN}{END}", "once each"),
        ("---\na: [\n---\n", "metadata cannot be read"),
        ("---\n- a\n---\n", "metadata cannot be read"),
    ],
)
def test_a_broken_card_is_refused(model, existing, message):
    with pytest.raises(ValueError, match=message):
        make_card(model, "me/long", existing=existing)


def test_the_licence_is_the_bases(model, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama\nlicense_link: LICENSE\nlanguage: en\n---\n")
    data = ModelCard(make_card(model, "me/long", license_from=[model, tmp_path]).text).data
    assert (data.license, data.license_name, data.license_link, data.get("language")) == ("other", "llama", "LICENSE", None)
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    assert ModelCard(make_card(model, "me/long", license_from=[tmp_path]).text).data.get("license") is None


@pytest.mark.parametrize(
    ("name", "known"),
    [("gpt2", True), ("org/model-1.5", True), ("/org/model", False), ("~/model", False), ("./model", False), ("a/b/c", False), ("org/x.npz", False), ("here", False), ("C:\\x", False)],
)
def test_a_hub_id_is_no_path(name, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id(name) is known


def test_a_recipe_goes_up_without_paths_and_tokens():
    values = {
        "model": {"name": "/home/me/base"}, "methods": [{"name": "yarn", "factor": 4}], "window": 32,
        "data": [{"path": "/home/me/a.npz"}, {"path": "~/b.txt"}, {"path": "org/books"}], "eval": {"data": "./c.npz"},
        "probe": {"data": "/home/me/d.npz"},
        "train": {"max_steps": 3, "hub_token": "hf_secret", "hub_model_id": "me/x", "push_to_hub": True, "deepspeed": "/home/me/ds.json", "lr_scheduler_kwargs": {"a": 1}},
    }  # fmt: skip
    found = public_recipe(parse_recipe(values), "org/base").to_dict()
    assert found["model"]["name"] == "org/base"
    assert [source["path"] for source in found["data"]] == ["(local)", "(local)", "org/books"]
    assert found["eval"]["data"] == found["probe"]["data"] == "(local)"
    assert "/home" not in str(found)
    assert found["train"] == {"max_steps": 3, "lr_scheduler_kwargs": {"a": 1}}
    assert public_recipe(parse_recipe(values), None).model.name == "(local)"
