"""The teacher is the base as it was trained, inside the model that is trained."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_longctx import patch, planning, training
from hf_longctx.distillation import Teacher
from tests.conftest import FAMILIES, WINDOW, tiny_model

IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)


def hidden(model, **positions):
    with torch.no_grad():
        return model.get_decoder()(input_ids=IDS, attention_mask=MASK, use_cache=False, **positions)[0]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral"])
def test_the_teacher_is_the_base_and_leaves_the_student_as_it_was(family):
    base = tiny_model(family)
    wanted = hidden(base)
    patch(base, {"name": "yarn", "factor": 4})
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    student = hidden(model.get_base_model())
    assert (student - wanted).abs().max() > 1e-2
    torch.testing.assert_close(Teacher(model)(IDS, MASK), wanted)
    torch.testing.assert_close(hidden(model.get_base_model()), student)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("methods", [[{"name": "yarn", "factor": 4}, {"name": "mkl_alibi"}], [{"name": "nope", "target": 128}, {"name": "t5", "init": "normal"}, {"name": "ssmax", "init": 1}]])
def test_the_teacher_has_no_bias_and_no_scaling(methods):
    base = tiny_model()
    wanted = hidden(base)
    patch(base, methods)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    student = hidden(model.get_base_model())
    assert (student - wanted).abs().max() > 1e-2
    torch.testing.assert_close(Teacher(model)(IDS, MASK), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(hidden(model.get_base_model()), student)


def test_a_teacher_cannot_stand_beside_a_position_embedding(recipe):
    with pytest.raises(ValueError, match=r"^distill: sinusoidal adds to the token embeddings"):
        planning.plan(planning.as_recipe(recipe | {"methods": [{"name": "sinusoidal"}], "distill": 0.5}))


def test_the_teacher_reads_with_its_own_embeddings():
    base = tiny_model(tie_word_embeddings=True)
    wanted = hidden(base)
    patch(base, {"name": "linear", "factor": 2})
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.5)
    torch.testing.assert_close(Teacher(model)(IDS, MASK), wanted)


def losses(recipe, folder, **changes) -> list[float]:
    what = planning.plan(planning.as_recipe(recipe | changes))
    model, _ = training._build_model(what)
    trainer = training._trainer(what, model, training._arguments(what.recipe, folder))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_loss_is_the_divergence_from_the_base_and_falls(recipe, tmp_path):
    """A student without a RoPE change is its own teacher; one with interpolated positions is not, and learns to be."""
    assert abs(losses(recipe, tmp_path / "same", distill=1.0, methods=[])[0]) < 1e-5
    steps = recipe["train"] | {"max_steps": 60, "learning_rate": 5e-3, "per_device_train_batch_size": 8, "save_strategy": "no"}
    found = losses(recipe, tmp_path / "moved", distill=1.0, methods=[{"name": "linear", "factor": 4}], train=steps)
    assert found[0] > 0.5
    assert sum(found[-5:]) < 0.75 * sum(found[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": 1.5}, "between 0 and 1"),
        ({"distill": 0.5, "lora": None}, "needs lora"),
        ({"distill": 0.5, "loss": "model"}, "loss: blocks"),
        ({"distill": 0.5, "window": WINDOW + 1}, f"knows {WINDOW} tokens"),
    ],
)
def test_what_cannot_be_distilled_is_refused(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        planning.plan(planning.as_recipe(recipe | changes))
