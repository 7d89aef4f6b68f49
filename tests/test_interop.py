"""Skip-wise positions in loops that are not ours: Trainer, TRL's SFTTrainer, a DataLoader."""

import contextlib
import copy
import pickle
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import hf_longctx
from hf_longctx import SkipWiseCollator
from hf_longctx.data import IGNORE
from tests.conftest import WINDOW, byte_tokenizer, tiny_model

SIZE, TARGET = 32, 4 * WINDOW
THREE_LINES = textwrap.dedent(re.search(r"^( +)hf_longctx\.patch\(.*\n(?:\1.*\n)*", SkipWiseCollator.__doc__, re.M)[0])
CHATS = [[{"role": "user", "content": f"{i}+{i}?"}, {"role": "assistant", "content": f"{2 * i}."}] for i in range(6)]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="needs TRL (pip install trl), which is not installed here")


def tokens(lengths=(40, 25, 32, 60, 32, 33), seed=0) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset.from_dict({"input_ids": [rng.integers(3, 259, n).tolist() for n in lengths], "source": ["book"] * len(lengths)})


def patched(factor=4.0, method="yarn"):
    return hf_longctx.patch(tiny_model(), {"name": method, "factor": factor})


def collator(sampler="pose", window=SIZE, **kwargs) -> SkipWiseCollator:
    return SkipWiseCollator(patched().config, sampler, window=window, **kwargs)


@contextlib.contextmanager
def forward_passes(model):
    """What the decoder is given in each training step, and the embeddings it sees."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen = []

    def keep(module, args, kwargs):
        seen.append({key: kwargs.get(key) for key in ("input_ids", "position_ids", "attention_mask")})

    hook = base.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def arguments(cls, folder, workers=0, **kwargs):
    keys = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "num_train_epochs": 2, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        "bf16": False, "save_strategy": "no", "dataloader_num_workers": workers, "logging_steps": 1, "seed": 0,
    }  # fmt: skip
    if workers:
        keys["dataloader_persistent_workers"] = True  # the hard case: their copy of the collator is older than the epoch
    return cls(**(keys | kwargs))


def train(trainer_class, model, arguments, dataset, resume=None, seen_by=None):
    """Run the three lines of the docstring as they stand there, at this test's window."""
    code = THREE_LINES.replace('"2k"', str(SIZE))
    assert code.count("\n") == 3, code
    names = {"hf_longctx": hf_longctx, "model": model, "SFTTrainer": trainer_class, "arguments": arguments, "dataset": dataset}
    exec(code, names)
    trainer = names["trainer"]
    if seen_by is not None:
        trainer.add_callback(seen_by)
    with forward_passes(trainer.model) as seen:
        trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def rows_of(seen) -> list[tuple]:
    """(token ids, positions) of each row, in the order of the run."""
    return [(tuple(ids), tuple(places)) for batch in seen for ids, places in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True)]


def check(seen, rows=6):
    """The promises: a mask of ones, positions that skip and come near the target, others in the second epoch."""
    for batch in seen:
        assert torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"]))
        assert batch["position_ids"].shape == batch["input_ids"].shape
    given = rows_of(seen)
    assert len(given) == 2 * rows
    skips = [np.diff(places)[np.diff(places) > 1] for _, places in given]
    assert sum(len(skip) == 1 for skip in skips) >= 10
    reach = max(places[-1] for _, places in given)
    assert WINDOW < reach < TARGET
    first, second = ({ids[:8]: places for ids, places in given[part]} for part in (slice(rows), slice(rows, None)))
    assert first.keys() == second.keys()  # each row once an epoch, and a row's first tokens are in the first chunk, nearly always
    assert sum(first[ids] != second[ids] for ids in first) >= rows - 1


def test_the_readme_shows_the_same_lines():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert "SkipWiseCollator" not in readme or THREE_LINES in readme


# --- in trainers


def test_trainer_gives_the_model_skip_wise_positions(tmp_path):
    runs = [train(Trainer, tiny_model(), arguments(TrainingArguments, tmp_path, workers), tokens())[1] for workers in (0, 2)]
    check(runs[0])
    assert rows_of(runs[0]) == rows_of(runs[1])


def test_sft_trainer_gives_the_model_skip_wise_positions(trl, tmp_path):
    """From token ids and from chats, which TRL tokenises and masks itself. It drops every other column and would drop positions."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = Dataset.from_dict({"messages": CHATS, "id": list(range(6))})
    runs = []
    for workers in (0, 2):
        made = arguments(trl.SFTConfig, tmp_path, workers, assistant_only_loss=True, max_length=None)
        runs.append(train(with_tokenizer(trl, tokenizer), tiny_model(), made, data)[1])
    check(runs[0])
    assert rows_of(runs[0]) == rows_of(runs[1])
    trainer, seen = train(with_tokenizer(trl, tokenizer), tiny_model(), arguments(trl.SFTConfig, tmp_path, max_length=60), tokens())
    check(seen)
    assert np.isfinite(trainer.state.log_history[0]["loss"])


def with_tokenizer(trl, tokenizer, **more):
    """SFTTrainer, given a tokenizer in the way that users give it, beside what the three lines hold."""
    return lambda *args, **kwargs: trl.SFTTrainer(*args, processing_class=tokenizer, **more, **kwargs)


def gradient_before_skip(trainer_class, made, mask):
    """|d loss(labels behind the skip) / d embeddings before it| inside a trainer, for one row."""
    fed = []

    class OneRow(SkipWiseCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            self.skip = int(np.flatnonzero(np.diff(batch["position_ids"][0]) > 1)[0]) + 1
            batch["labels"][:, : self.skip + 1] = IGNORE
            return batch if mask else {key: value for key, value in batch.items() if key != "attention_mask"}

    model = patched()
    skips = OneRow(model, window=SIZE)
    trainer = trainer_class(model, args=made, train_dataset=tokens([50]), data_collator=skips, callbacks=[skips])
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: fed.append(output.detach().requires_grad_()) or fed[-1])
    trainer.train()
    gradient = fed[0].grad[0]
    assert gradient[skips.skip :].abs().max() > 0
    return float(gradient[: skips.skip].abs().max())


@pytest.mark.parametrize(("name", "mask"), [("Trainer", True), ("Trainer", False), ("SFTTrainer", True)])
def test_gradients_reach_across_the_skip_and_would_not_without_the_mask(name, mask, tmp_path, request):
    if name == "Trainer":
        trainer_class, config_class, extra = Trainer, TrainingArguments, {}
    else:
        trl = request.getfixturevalue("trl")
        trainer_class, config_class, extra = with_tokenizer(trl, byte_tokenizer()), trl.SFTConfig, {"max_length": None}
    made = arguments(config_class, tmp_path, per_device_train_batch_size=1, max_steps=1, gradient_checkpointing=True, **extra)
    found = gradient_before_skip(trainer_class, made, mask)
    assert found > 1e-6 if mask else found == 0


def test_a_resumed_run_sees_what_the_whole_one_saw(tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 4}
    _, whole = train(Trainer, tiny_model(), arguments(TrainingArguments, tmp_path / "a", **kwargs), tokens())
    _, rest = train(Trainer, tiny_model(), arguments(TrainingArguments, tmp_path / "a", **kwargs), tokens(), resume=str(tmp_path / "a/checkpoint-4"))
    assert rows_of(rest) == rows_of(whole)[8:]  # from the middle of the second epoch


def test_an_adapter_is_trained_as_well(trl, tmp_path):
    tokenizer = byte_tokenizer()
    made = arguments(trl.SFTConfig, tmp_path, max_length=None)
    lora = LoraConfig(r=2, target_modules="all-linear")
    trainer, seen = train(with_tokenizer(trl, tokenizer, peft_config=lora), tiny_model(), made, tokens())
    check(seen)
    assert SkipWiseCollator(trainer.model, window=SIZE).sampler.target == TARGET
    assert SkipWiseCollator(get_peft_model(patched(), lora), window=SIZE).sampler.target == TARGET


def test_trl_refuses_what_would_go_wrong(trl, tmp_path):
    """A transformed dataset, and packing by its own collator: both are in the docstring."""
    skips, data = collator(), tokens()
    make = with_tokenizer(trl, byte_tokenizer())
    with pytest.raises(ValueError, match="padding-free"):
        make(patched(), args=arguments(trl.SFTConfig, tmp_path, packing=True), train_dataset=data, data_collator=skips)
    data.set_transform(skips.transform)
    with pytest.raises(ValueError, match="skip_prepare_dataset"):
        make(patched(), args=arguments(trl.SFTConfig, tmp_path), train_dataset=data, data_collator=skips)
    made = arguments(trl.SFTConfig, tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = make(patched(), args=made, train_dataset=data, data_collator=skips, callbacks=[skips])
    with forward_passes(trainer.model) as seen:
        trainer.train()
    check(seen)


def test_wrapped_packing_works_in_trl(trl, tmp_path):
    made = arguments(trl.SFTConfig, tmp_path, packing=True, packing_strategy="wrapped", max_length=SIZE, max_steps=3)
    _, seen = train(with_tokenizer(trl, byte_tokenizer()), tiny_model(), made, tokens())
    assert all((batch["attention_mask"] == 1).all() for batch in seen)
    assert max(int(batch["position_ids"].max()) for batch in seen) > WINDOW


# --- in a loop of one's own


def test_a_row_is_a_function_of_seed_epoch_and_tokens_alone():
    rows = list(tokens())
    one, two, other = collator(), collator(), collator(seed=1)
    alone = [one([row])["position_ids"][0, : min(SIZE, len(row["input_ids"]))] for row in rows]
    batch = two(rows[::-1])
    for row, places, ids in zip(alone, batch["position_ids"].flip(0), batch["input_ids"].flip(0), strict=True):
        assert torch.equal(row, places[: len(row)])
        assert (ids[len(row) :] == 0).all()
    assert not torch.equal(other(rows)["position_ids"], one(rows)["position_ids"])
    before = one(rows)
    one.set_epoch(1)
    assert not torch.equal(before["position_ids"], one(rows)["position_ids"])
    one.set_epoch(0)
    assert all(torch.equal(before[key], value) for key, value in one(rows).items())


def test_text_comes_from_the_whole_row_and_labels_go_with_it():
    row = {"input_ids": list(range(3, 203)), "labels": [-100] * 50 + list(range(53, 203))}
    batch = collator()([row])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert (ids.diff() > 0).all()
    assert ids[0] == 3
    assert torch.equal(labels, torch.where(ids < 53, IGNORE, ids))
    free = collator()([{"input_ids": row["input_ids"]}])
    assert torch.equal(free["labels"][0, 1:], free["input_ids"][0, 1:])
    assert free["labels"][0, 0] == IGNORE
    masked, places = collator(mask_seams=True)([{"input_ids": row["input_ids"]}])["labels"][0], free["position_ids"][0]
    assert torch.equal(masked[1:] == IGNORE, places.diff() != 1)


def test_padding_goes_to_the_right_and_changes_nothing():
    """Rows padded by a tokenizer, on either side, are the rows without their padding; a padded row scores as it does alone."""
    short, long = tokens([9, 30])["input_ids"]
    left = {"input_ids": [0] * 21 + short, "attention_mask": [0] * 21 + [1] * 9}
    skips, model = collator(), patched()
    batch = skips([left, {"input_ids": long}])
    assert all(torch.equal(batch[key], value) for key, value in skips([{"input_ids": short}, {"input_ids": long}]).items())
    assert (batch["labels"][0, 9:] == IGNORE).all()
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0, :9]
        alone = model(**skips([left]), use_cache=False).logits[0]
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("sampler", ["pose", "cream", "random_positions", {"name": "pose", "form": "code"}, {"name": "pose", "chunks": 5}])
def test_rows_of_any_length_work_with_every_sampler(sampler):
    skips = collator(sampler)
    for n in (1, 2, 3, 5, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE, 10 * SIZE):
        for epoch in range(5):
            skips.set_epoch(epoch)
            batch = skips([{"input_ids": list(range(3, 3 + n))}])
            assert batch["input_ids"].shape == (1, min(n, SIZE))
            assert (batch["position_ids"].diff() > 0).all()
            assert 0 <= batch["position_ids"].min() <= batch["position_ids"].max() < TARGET


def test_a_transformed_dataset_is_fresh_in_every_epoch_for_any_number_of_workers():
    data, skips = tokens([SIZE] * 6), collator()
    data.set_transform(skips.transform)
    assert set(data[0]) == {"input_ids", "position_ids", "labels", "attention_mask"}

    def epochs(workers):
        loader = DataLoader(data, batch_size=2, num_workers=workers, persistent_workers=workers > 0, collate_fn=stack)
        for epoch in range(2):
            skips.set_epoch(epoch)
            yield torch.cat([batch["position_ids"] for batch in loader])

    alone, shared = list(epochs(0)), list(epochs(2))
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert not torch.equal(*alone)
    skips.set_epoch(0)
    bare = tokens([SIZE] * 6)
    assert torch.equal(skips(list(bare))["position_ids"], alone[0])  # the collator draws the same, and leaves what is drawn alone
    assert torch.equal(skips(list(data))["position_ids"], alone[0])


def stack(rows):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def test_rows_that_bring_positions_keep_them():
    plain = {"input_ids": list(range(3, 90)), "position_ids": list(range(87))}
    batch = collator()([plain])
    assert batch["position_ids"][0].tolist() == plain["position_ids"]
    assert (batch["attention_mask"] == 1).all()


def test_it_travels_to_workers_that_are_not_forked():
    skips = collator()
    rows = list(tokens())
    again = pickle.loads(pickle.dumps(skips))
    assert torch.equal(again(rows)["position_ids"], skips(rows)["position_ids"])
    assert torch.equal(copy.deepcopy(skips)(rows)["position_ids"], skips(rows)["position_ids"])


# --- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipWiseCollator(tiny_model(), window=WINDOW), "window 64 is the model's own.*patch the model first"),
        (lambda: collator(window=TARGET + 1), "target 256 is below the training window 257"),
        (lambda: collator({"name": "pose", "target": 512}), "target 512 is not the patched model's window 256"),
        (lambda: collator({"name": "yarn", "factor": 4}), "yarn does not choose positions"),
        (lambda: collator({"name": "pos"}), "unknown method 'pos'; did you mean 'pose'"),
        (lambda: collator(window="2q"), "expected a number of tokens"),
        (lambda: SkipWiseCollator(patched(method="dynamic_ntk"), window=SIZE), "frequencies of dynamic_ntk depend on the length seen"),
        (lambda: collator()([{"input_ids": []}]), "a row has no tokens"),
    ],
)
def test_mistakes_are_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
