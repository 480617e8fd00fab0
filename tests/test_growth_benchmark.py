"""benchmarks/growth.py: its rows, one of them measured, the attention it compares with, and its report."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_parameters import random_parameters


@pytest.fixture(scope="module")
def growth(benchmarks):
    import growth

    return growth


def test_a_selected_row_is_measured_and_kept_beside_the_others(growth, tmp_path, monkeypatch):
    file = tmp_path / "growth.json"
    other = {"row": {"cache": "cold"}, "measured": {"first_step_s": 1.0}}
    file.write_text(json.dumps({"parts": {"first-step": [other]}}))
    selection = ["--where", "model=w2v-bert-2.0", "--where", "kind=forward", "--where", "layers=2"]
    monkeypatch.setattr(sys, "argv", ["growth.py", "cpu-depth", *selection, "--results", str(file)])
    growth.main()
    results = json.loads(file.read_text())["parts"]
    assert results["first-step"] == [other]
    (row,) = results["cpu-depth"]
    assert (row["row"]["model"], row["row"]["kind"], row["row"]["layers"]) == ("w2v-bert-2.0", "forward", 2)
    measured = row["measured"]
    assert measured["step_s"] > 0
    # 50 million float32 parameters are 0.19 GiB; a second copy of them would be too much
    assert 0.19 < measured["peak_gib"] < 0.5
    assert 0.19 < measured["needed_gib"] < 0.5


def test_the_plain_attention_gives_the_same_numbers(growth, monkeypatch):
    import growth_sides

    import speech_flax.layers.attention as layers
    from speech_flax import Wav2Vec2BertConfig, Wav2Vec2BertForCTC

    config = Wav2Vec2BertConfig(
        vocab_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1
    )
    model = Wav2Vec2BertForCTC(config)
    features = jnp.asarray(np.random.default_rng(0).standard_normal((1, 40, 160)), jnp.float32)
    params = random_parameters(model, features)

    def logits() -> jax.Array:
        return jax.jit(lambda: model.apply({"params": params}, features).logits)()

    library = logits()
    monkeypatch.setattr(layers, "fused_attention", layers.fused_attention)  # restores what the next line changes
    growth_sides.use_plain_attention()
    monkeypatch.setattr(layers, "over_shards", lambda function, *_: lambda *states: 1 + function(*states))
    assert np.abs(logits() - library).max() > 1e-3  # it is the patched attention that is called
    monkeypatch.setattr(layers, "over_shards", lambda function, *_: function)
    # float32 sums in another order
    np.testing.assert_allclose(logits(), library, atol=1e-5)


def test_every_part_has_a_table_and_every_picture_is_drawn(growth, tmp_path, capsys):
    parts = {
        part: [{"row": row, "measured": _invented(part, row)} for row in growth.rows_of(part)]
        for part in growth.MEASURES
    }
    growth.write_report({"parts": parts}, tmp_path)
    printed = capsys.readouterr().out
    for part, rows in parts.items():
        section = printed.split(f"### {part}\n")[1].split("###")[0]
        assert section.count("\n| ") == 2 + len(rows)
    assert "does not fit" in printed and "[4.0]" in printed
    pictures = {"cpu_length", "cpu_batch", "cpu_depth", "cpu_vocabulary", "tpu", "compilation"}
    assert {file.name for file in tmp_path.iterdir()} == {f"growth_{name}.png" for name in pictures}


def _invented(part: str, row: dict) -> dict:
    """Results of a row; the largest of a part do not fit."""
    if part == "first-step":
        return {"first_step_s": 4.0, "data_planned_s": 1.0}
    if part.startswith("compile"):
        return {"lowering_s": 1.0, "compilation_s": 2.0}
    step = {"step_s": 0.1 * row["rows"] * row["seconds"]}
    if part.startswith("tpu"):
        fits = {"mfu": 0.5, "exposed_communication_s": 0.01, "audio_seconds_per_second_per_chip": 9.0, **step}
        memory = {"peak_gib": 4.0, "usable_gib": 15.75, "parameters_gib": 1.0, "optimizer_gib": 2.0}
        return memory | (fits if row["layers"] < 48 else {})
    ran = {"peak_gib": 1.0, "needed_gib": 1.0, **step}
    if part != "cpu-length":
        return ran
    return {"library": ran, "plain": ran if row["seconds"] < 300 else {"needed_gib": 4.0}}
