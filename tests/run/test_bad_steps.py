"""Runs with steps that are not finite: left out, told with their rows, ended after too many."""

import itertools

import chatmodel
import jax
import numpy as np
import pytest

from jaxalign.algorithms.guard import all_finite
from jaxalign.run import loop
from jaxalign.run.bad_steps import BadSteps, combine_updates, origins_of
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.tasks.ppo import check_blow_up

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the batches of some steps poisonous: their tokens get weights of NaN."""

    def poison(steps):
        make = loop.make_task

        def make_task(config):
            task, number = make(config), [0]

            def prepare_updates(key, state, batch, *rest):
                number[0] += 1
                value = np.nan if number[0] in steps else 1.0
                weights = np.full(batch.loss_mask.shape, value, np.float32)
                return task.prepare_updates(key, state, batch._replace(weights=weights), *rest)

            return task._replace(prepare_updates=prepare_updates)

        monkeypatch.setattr(loop, "make_task", make_task)

    return poison


def run(chat_models, folder, changes=None, **options):
    values = chatmodel.settings("sft", chat_models, folder, **options)
    return loop.train(load_config("sft", merge(values, changes or {})))


def test_a_poisoned_step_is_left_out_and_told_with_its_rows(
    chat_models, tmp_path, poisoned, capsys
):
    poisoned({2})
    result = run(chat_models, tmp_path / "run", steps=3, checkpoint=False)
    rows = chatmodel.lines(tmp_path / "run")
    assert [row["bad_steps"] for row in rows] == [0, 1, 0]
    assert [row["loss"] == "nan" for row in rows] == [False, True, False]
    text = capsys.readouterr().out
    assert "step 2: loss=nan, grad_norm=nan; 1 of 1 updates left out, 1 in a row" in text
    told = text.split("rows: ")[1].split("\n")[0].split(", ")
    assert len(told) == 8
    assert all(origin.partition(".jsonl:")[2].isdigit() for origin in told)
    assert result.model is not None


def test_too_many_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(
    chat_models, tmp_path, poisoned
):
    poisoned({3, 4, 5, 6})
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 5: loss=nan.*3 updates in a row.*rows: "):
        run(chat_models, folder, steps=6, save_every=1, bad_steps=3)
    store = Checkpoints(folder / "checkpoints")
    assert store.latest == 2  # nothing came after what was good
    store.close()
    assert not (folder / "model").exists()
    assert [row["step"] for row in chatmodel.lines(folder)] == [1, 2, 3, 4, 5]


def test_a_rate_beyond_all_numbers_exports_nothing(chat_models, tmp_path):
    changes = {"optimizer": {"learning_rate": 3e38, "weight_decay": 10.0}}
    with pytest.raises(FloatingPointError, match="no update was made"):
        run(chat_models, tmp_path / "run", changes, steps=1, checkpoint=False)
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_are_not_finite_are_refused_at_a_save_and_at_the_export():
    assert bool(all_finite({"a": np.ones(3, np.float32), "step": np.int32(1)}))
    for value in (np.nan, np.inf):
        tree = {"a": np.array([1, value], np.float32)}
        assert not bool(jax.jit(all_finite)(tree))
        with pytest.raises(FloatingPointError, match="step 7: some weights are not finite"):
            loop.check_weights(tree, "step 7")


def test_figures_at_the_end_must_be_finite():
    bad_steps = BadSteps(3, {})
    bad_steps.check_end(None, {"loss/nll": 2.0, "perplexity": np.inf})
    with pytest.raises(FloatingPointError, match=r"after the last step loss/nll=nan"):
        bad_steps.check_end(None, {"loss/nll": np.nan})


def test_updates_of_an_iteration_are_averaged_over_those_that_were_made():
    updates = [
        {"loss": 1.0, "bad_steps": 0.0},
        {"loss": np.nan, "bad_steps": 1.0},
        {"loss": 3.0, "bad_steps": 0.0},
    ]
    assert combine_updates(updates) == {"loss": 2.0, "bad_steps": 1.0}
    assert combine_updates(updates[1:2])["bad_steps"] == 1.0
    loop_state = {}
    counter = BadSteps(2, loop_state)
    counter.add(1, updates[:2], list)
    assert counter.in_a_row == 1
    assert loop_state == {"bad_steps": 1}
    with pytest.raises(FloatingPointError, match=r"step 2: loss=nan; 2 updates in a row"):
        counter.add(2, updates[1:], list)  # the second in a row
    counter.add(3, updates[:1], list)
    assert loop_state == {}


def test_ppo_stops_on_a_blow_up(chat_models, tmp_path):
    values = chatmodel.settings("ppo", chat_models, tmp_path / "run")
    values |= {"stop_kl": 10.0, "stop_score": 5.0}
    config = load_config("ppo", values)
    good = {"objective/kl": -9.0, "objective/scores": 4.0}
    check_blow_up(config, good)
    for name, option in (("objective/kl", "stop_kl"), ("objective/scores", "stop_score")):
        for value in (-11.0, np.nan, 11.0):
            with pytest.raises(FloatingPointError, match=f"{name}=.*beyond {option}="):
                check_blow_up(config, good | {name: value})


def test_spikes_are_an_option_of_the_run(chat_models, tmp_path):
    """The state holds the norms of the run, and a resumed run has them."""
    changes = {"run": {"skip_spikes": {"factor": 5.0, "window": 16}}}
    result = run(chat_models, tmp_path / "run", changes, steps=2, export=False)
    norms = [row["grad_norm"] for row in result.history]
    config = load_config(
        "sft", merge(chatmodel.settings("sft", chat_models, tmp_path / "run", steps=2), changes)
    )
    task = loop.make_task(config)
    store = Checkpoints(tmp_path / "run" / "checkpoints")
    state, _ = store.restore(task.state)
    store.close()
    np.testing.assert_allclose(np.asarray(state.opt_state.norms)[:2], norms, rtol=1e-6)
    assert np.isnan(np.asarray(state.opt_state.norms)[2:]).all()


def test_the_rows_that_are_named_are_those_of_the_batch(chat_models, tmp_path):
    config = load_config("sft", chatmodel.settings("sft", chat_models, tmp_path / "run", steps=3))
    task, tok = loop.make_task(config), chatmodel.make_tokenizer()
    for number, batch in enumerate(itertools.islice(task.batches, 3), start=1):
        origins = origins_of(task, batch, number)
        assert len(origins) == len(batch.inputs)
        for row, origin in zip(batch.inputs, origins, strict=True):
            question = chatmodel.QUESTIONS[int(origin.rpartition(":")[2]) - 1]
            assert f"user\n{question}<|im_end|>" in tok.decode(row)
    task.batches.close()
