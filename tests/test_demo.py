"""The demo: its shipped model is what it claims to be, and the pipeline runs end to end (few steps, short lengths here)."""

import numpy as np
import pytest

from hf_longctx import checkpoint, demo
from hf_longctx.evaluation import evaluate


@pytest.fixture(scope="module")
def model():
    return checkpoint.load(demo.MODEL, device="cpu")


def test_the_shipped_model_finds_passkeys_in_its_window_and_none_past_it(tmp_path):
    rows = evaluate(demo.MODEL, [{"name": "passkey", "n": 1}], [256, 1024], out=tmp_path / "out", device="cpu")
    overall = {row["length"]: row["value"] for row in rows if row["depth"] is None}
    assert overall[256] >= 0.9
    assert overall[1024] <= 0.1


def test_repeated_spans_are_a_function_of_the_seed_and_do_repeat(model):
    first, again, other = (demo.repeated_spans(model.tokenizer, 1, 2, 256, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(first) == 512
    assert not np.array_equal(first, other)
    # Some run of five tokens comes again within one window; in the plain text that is rare.
    windows = [first[:256], first[256:]]
    runs = [{tuple(w[i : i + 5]) for i in range(252)} for w in windows]
    assert any(len(r) < 252 - 3 for r in runs)


def test_the_pipeline_runs_and_says_what_it_did(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LENGTHS", (256, 512))
    lines: list[str] = []
    rows = demo.run(tmp_path / "demo", lines.append, steps=2)
    assert {row["model"] for row in rows} == {"as it is", "patched (yarn)", "and fine-tuned with PoSE"}
    assert (tmp_path / "demo" / "passkey.png").stat().st_size > 10_000
    text = "\n".join(lines)
    assert "pydoc_data.topics of Python" in text
    assert "longctx finetune" in text
    assert checkpoint.inspect_model(tmp_path / "demo" / "tuned")["window"] == 5120
    with pytest.raises(ValueError, match="already holds something"):
        demo.run(tmp_path / "demo", lines.append)
