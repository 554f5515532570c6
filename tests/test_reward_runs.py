"""Whole runs of a reward model: every objective, every start, what is left in the folder."""

import json

import chatmodel
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.commands.report.runs import make_page
from jaxalign.models.scorer import Scorer
from jaxalign.plan import run_shapes, step_shapes
from jaxalign.run.config.runs import load_config
from jaxalign.run.loop import train
from jaxalign.run.tasks import make_task

pytestmark = pytest.mark.usefixtures("kept_programs")

QUESTIONS = chatmodel.QUESTIONS
ROWS = {
    "pairs": chatmodel.PAIRS,
    "ranking": [
        {"prompt": q, "answers": ["yes" + q[0], "no", "so"][:n], "ranks": [1, 2, 2][:n]}
        for q, n in zip(QUESTIONS, [2, 3] * 6, strict=True)
    ],
    "regression": [
        {"prompt": q, "response": "ok", "scores": {"kind": i % 5, "long": None if i % 3 else 1}}
        for i, q in enumerate(QUESTIONS)
    ],
    "steps": [
        {"prompt": q, "completions": ["a", "b"], "labels": [True, i % 2 == 0]}
        for i, q in enumerate(QUESTIONS)
    ],
}
FIGURES = {
    "pairs": {"accuracy", "accuracy_low", "accuracy_high", "ece", "margin", "loss/preference"},
    "ranking": {"accuracy", "best", "best_low", "best_high", "loss/preference"},
    "regression": {"loss/mse", "mse/kind", "mse/long", "pearson/kind", "pearson/long"},
    "steps": {"accuracy", "accuracy_low", "f1/right", "f1/wrong", "ece", "loss/steps"},
}


def settings(models, folder, objective, sources=None, **changes):
    """Two steps on 12 rows of one objective, held out: the same."""
    values = chatmodel.settings("reward", models, folder, checkpoint=False, steps=2)
    data = chatmodel.write_rows(folder.parent / f"{folder.name}.jsonl", ROWS[objective])
    values["data"] |= {"train": [data], "eval": [data] if sources is None else sources}
    values["reward"] = {"objective": objective}
    if objective == "regression":
        values["reward"]["attributes"] = ["kind", "long"]
    return values | changes


def run(*arguments, **changes):
    return train(load_config("reward", settings(*arguments, **changes)))


@pytest.fixture(scope="module")
def grades(chat_models, tmp_path_factory):
    """A regression started from a language model."""
    return run(chat_models, tmp_path_factory.mktemp("runs") / "regression", "regression")


def look(result, objective):
    assert set(result.after) >= FIGURES[objective]
    assert all(np.isfinite(value) for value in result.after.values())
    told = json.loads((result.folder / "evaluation.json").read_text(encoding="utf-8"))
    assert told["objective"] == objective
    assert told["step"] == 2
    assert result.history[-1]["compiles"] == 1
    page = make_page(result.folder)
    assert 'aria-label="scores"' in page
    assert ('aria-label="calibration"' in page) == (objective in ("pairs", "steps"))
    return told, page


def test_regression(grades):
    told, page = look(grades, "regression")
    assert [row["count"] for row in told["attributes"]] == [12, 4]
    assert "<td>kind</td>" in page
    model, _ = jaxalign.load_pretrained(grades.model)
    assert model.attributes == ("kind", "long")


def test_ranking_goes_on_from_a_reward_model_with_its_head(chat_models, tmp_path):
    source = {"source": str(chat_models / "scorer")}
    result = run(chat_models, tmp_path / "run", "ranking", model=source)
    told, _ = look(result, "ranking")
    assert sum(told["histogram"]["counts"]["best"]) == 12
    before = chatmodel.leaves(jaxalign.load_pretrained(chat_models / "scorer")[1])
    after = chatmodel.leaves(jaxalign.load_pretrained(result.model)[1])
    moved = {name: np.abs(after[name] - before[name]).max() for name in before}
    # Two steps of 3e-3: the head is the old one, a little further on.
    assert 0 < moved["['score']['kernel']"] < 0.01


def test_steps(chat_models, tmp_path):
    told, _ = look(run(chat_models, tmp_path / "run", "steps"), "steps")
    assert sum(row["count"] for row in told["calibration"]) == 24


def test_pairs_of_several_sources(chat_models, tmp_path):
    files = [
        chatmodel.write_rows(tmp_path / f"{name}.jsonl", chatmodel.PAIRS[part])
        for name, part in (("ours", slice(0, 8)), ("theirs", slice(8, 12)))
    ]
    result = run(chat_models, tmp_path / "run", "pairs", files)
    told, page = look(result, "pairs")
    by_source = {row["source"]: row["count"] for row in told["sources"]}
    assert sorted(by_source.values()) == [4, 8]
    shares = [result.after[f"accuracy/{name}"] * count for name, count in by_source.items()]
    assert sum(shares) / 12 == pytest.approx(result.after["accuracy"])
    for name in by_source:
        assert f"<td>{name}</td>" in page


def test_another_objective_needs_a_fresh_head(chat_models, tmp_path, grades):
    source = {"source": str(grades.model)}
    with pytest.raises(ValueError, match=r"attributes=\[\].*has \['kind', 'long'\].*head=fresh"):
        run(chat_models, tmp_path / "a", "pairs", model=source)
    result = run(chat_models, tmp_path / "b", "pairs", model=source, head="fresh")
    model, _ = jaxalign.load_pretrained(result.model)
    assert model == Scorer(model.base)


def test_ppo_against_weighted_attributes(chat_models, tmp_path, grades):
    """The reward model, and the critic that starts from it, have the weighted sum as their head."""
    values = chatmodel.settings("ppo", chat_models, tmp_path / "run")
    values["reward_model"] = str(grades.model)

    def task(*overrides):
        return make_task(load_config("ppo", values, overrides))

    with pytest.raises(ValueError, match=r"kind, long and no single score.*reward_weights"):
        task()
    with pytest.raises(ValueError, match=r"kind, long, got size"):
        task("reward_weights={size: 1.0}")
    critic = task("reward_weights={kind: 1.0, long: -0.5}").state.params["critic"]
    kernel = np.asarray(jaxalign.load_pretrained(grades.model)[1]["score"]["kernel"])
    want = kernel[:, :1] - 0.5 * kernel[:, 1:]
    np.testing.assert_allclose(critic["score"]["kernel"], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", ROWS)
def test_a_plan_knows_the_batch_of_each_objective(chat_models, tmp_path, objective):
    config = load_config("reward", settings(chat_models, tmp_path / "run", objective))
    mesh = config.mesh.make()
    state, parts = run_shapes("reward", config, mesh)
    batch = step_shapes("reward", config, mesh, state, parts)
    assert "loss" in parts.step.lower(state, batch).out_info[1]
    made = make_task(config)
    real = next(iter(made.batches))
    shapes = jax.tree.map(lambda x: (x.ndim, np.dtype(x.dtype)), (batch, real))
    assert shapes[0] == shapes[1]
