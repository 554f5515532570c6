"""The moving average of the weights, and the noise of NEFTune, in whole runs and by hand."""

import pathlib

import chatmodel
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxalign as ja
from jaxalign.algorithms import ppo
from jaxalign.algorithms.averages import averaged_params
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.export import export_run
from jaxalign.run.loop import train

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_by_hand(dtype):
    tx = make_optimizer(OptimizerConfig(learning_rate=0.5, max_grad_norm=None, ema=0.75))
    params = {"kernel": jax.numpy.asarray([1.0, -2.0], dtype)}
    state = ja.init_state(params, tx)
    want = np.array([1.0, -2.0])
    for sign in (1, 1, -1):
        grads = {"kernel": jax.numpy.full(2, sign, dtype)}
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + u, state.params, updates)
        state = state._replace(params=params, opt_state=opt_state)
        want = 0.75 * want + 0.25 * np.asarray(params["kernel"], np.float64)
    got = averaged_params(state)["kernel"]
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(np.float32), want, 1e-6 if dtype == "float32" else 4e-3)
    np.testing.assert_allclose(state.opt_state.average["kernel"], want, 1e-6)


def test_policy_and_critic_have_averages_of_their_own():
    def optimizer(**options):
        return make_optimizer(OptimizerConfig(learning_rate=0.1, offload=True, **options))

    tx = ppo.make_optimizer(optimizer(ema=0.5), optimizer(name="schedule_free", b1=0.5))
    weights = {"up": {"kernel": np.full((8, 2), 1, np.float32)}}
    mesh = ja.make_mesh(1, 8, 1)
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    params = jax.device_put(ppo.init_params(weights, weights), layout)
    state = ja.init_state(params, tx)
    grads = jax.tree.map(np.ones_like, weights)

    @jax.jit
    def update(state):
        updates, opt_state = tx.update(ppo.init_params(grads, grads), state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + u, state.params, updates)
        return state._replace(params=params, opt_state=opt_state)

    state = update(update(state))
    averages = averaged_params(state)
    # Adam moves by the rate: 1 → 0.9 → 0.8, of which the average is 0.25 + 0.25 · 0.9 + 0.5 · 0.8.
    np.testing.assert_allclose(state.params["policy"]["up"]["kernel"], 0.8, 1e-5)
    np.testing.assert_allclose(averages["policy"]["up"]["kernel"], 0.875, 1e-5)
    # z: 1 → 0.9 → 0.8, x: their mean without the start, y: halfway between.
    np.testing.assert_allclose(averages["critic"]["up"]["kernel"], 0.85, 1e-5)
    np.testing.assert_allclose(state.params["critic"]["up"]["kernel"], 0.825, 1e-5)
    for leaf in jax.tree.leaves(averages):
        assert leaf.sharding == layout


def weights_of(folder):
    return load_file(pathlib.Path(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def runs(chat_models, tmp_path_factory):
    """Name → result of a run with noise and an average; `trained` exports what was trained."""
    place = tmp_path_factory.mktemp("runs")
    held_out = chatmodel.write_rows(place / "held.jsonl", chatmodel.CONVERSATIONS[:8])

    def run(name, steps=2, **changes):
        values = chatmodel.settings("sft", chat_models, place / name, steps=steps)
        values["data"]["eval"] = [held_out]
        values = merge(values, {"sft": {"neftune_alpha": 5.0}})
        return train(load_config("sft", merge(values, changes)))

    average = {"optimizer": {"ema": 0.75}}
    keeps = {"run": {"save_every": 1, "keep": 5}}
    trained = {"optimizer": {"ema": 0.75, "ema_for": ["eval"]}}
    results = {"whole": run("whole", **average), "trained": run("trained", **trained, **keeps)}
    run("parts", steps=1, **average)
    results["parts"] = run("parts", **merge(average, {"run": {"resume": True}}))
    results["quiet"] = run("quiet", steps=1, sft={"neftune_alpha": None})
    results["again"] = run("again", steps=1, model={"source": str(results["whole"].model)})
    return results


def test_a_run_exports_the_average(runs, chat_models, tmp_path):
    for step in (1, 2):
        export_run(str(runs["trained"].folder), str(tmp_path / str(step)), step)
    start, one, two = (
        weights_of(folder) for folder in (chat_models / "chat", tmp_path / "1", tmp_path / "2")
    )
    got = weights_of(runs["whole"].model)
    for name, value in got.items():
        want = 0.75 * (0.75 * start[name] + 0.25 * one[name]) + 0.25 * two[name]
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(two[name] - value).max() > 1e-3


def test_the_export_of_a_checkpoint_is_the_runs_own(runs, tmp_path):
    for name in ("whole", "trained"):
        export_run(str(runs[name].folder), str(tmp_path / name))
        assert chatmodel.weights(tmp_path / name) == chatmodel.weights(runs[name].model)


def test_the_average_is_evaluated(runs):
    assert runs["whole"].after == pytest.approx(runs["again"].before, rel=1e-5)
    assert runs["trained"].after == runs["whole"].after


def test_a_resumed_run_has_the_same_average_and_noise(runs):
    whole, parts = (chatmodel.timeless(runs[name].history) for name in ("whole", "parts"))
    assert parts[-1]["loss"] == whole[-1]["loss"]
    assert chatmodel.weights(runs["parts"].model) == chatmodel.weights(runs["whole"].model)


def test_noise_is_in_training_alone(runs):
    assert runs["quiet"].before == runs["whole"].before
    assert runs["quiet"].history[0]["loss"] != pytest.approx(runs["whole"].history[0]["loss"], 1e-4)


@pytest.mark.slow
def test_a_schedule_free_run_exports_its_average(chat_models, tmp_path):
    values = chatmodel.settings("sft", chat_models, tmp_path / "run")
    values["optimizer"] = {"name": "schedule_free", "learning_rate": 3e-3}
    result = train(load_config("sft", values))
    export_run(str(result.folder), str(tmp_path / "out"))
    assert chatmodel.weights(tmp_path / "out") == chatmodel.weights(result.model)
