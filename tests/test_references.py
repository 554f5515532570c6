"""Runs whose reference is asked once and kept, follows the policy, or does not exist; KTO runs."""

import json
import shutil

import chatmodel
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign.algorithms.moving_reference import (
    MovingReferenceState,
    ReferenceSync,
    with_moving_reference,
)
from jaxalign.run import loop as loop
from jaxalign.run import tasks
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge, read_yaml
from jaxalign.run.digests import weights_digest
from jaxalign.run.export import export_run
from jaxalign.run.tasks import reference
from jaxalign.run.tasks.reference_cache import ReferenceCache, pair_keys
from jaxalign.types import PairBatch, SharedPairBatch, TokenBatch

pytestmark = pytest.mark.usefixtures("kept_programs")


def config(algorithm, models, folder, changes=None, **options):
    values = chatmodel.settings(algorithm, models, folder, **options)
    return load_config(algorithm, merge(values, changes or {}))


def run(*args, **options):
    return loop.train(config(*args, **{"export": False, "steps": 2} | options))


def resumed(result, folder, at):
    """The run gone on with in another folder, as if it had been cut off after step `at`."""
    shutil.copytree(result.folder, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name != str(at):
            shutil.rmtree(path)
    given = [f"run.folder={folder}", "run.resume=true"]
    algorithm = "kto" if "kto" in read_yaml(folder / "config.yaml") else "dpo"
    return loop.train(load_config(algorithm, folder / "config.yaml", given))


@pytest.fixture(scope="module")
def other_model(chat_models, tmp_path_factory):
    """A reference that is not the policy."""
    folder = tmp_path_factory.mktemp("reference")
    model, params = jaxalign.load_pretrained(chat_models / "chat")
    rng = np.random.default_rng(5)
    moved = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), params)
    jaxalign.save_pretrained(model, moved, folder, tokenizer=chatmodel.make_tokenizer())
    return str(folder)


# Asked once


@pytest.fixture(scope="module")
def cached(chat_models, other_model, tmp_path_factory):
    """(cache folder, the run that made it, the same run with the reference held)."""
    base = tmp_path_factory.mktemp("cached")
    held = [chatmodel.write_rows(base / "held_out.jsonl", chatmodel.PAIRS[:5])]
    common = {"reference": other_model, "data": {"eval": held}}
    cache = {"reference_cache": str(base / "cache")}
    made = run("dpo", chat_models, base / "first", common | cache)
    # The one that is asked at every batch waits in the host's memory meanwhile.
    plain = run("dpo", chat_models, base / "plain", common | {"offload_frozen": True})
    return base / "cache", made, plain, common


def test_a_run_with_a_cache_gives_the_figures_of_one_with_the_reference(cached):
    _, made, plain, _ = cached
    assert made.history[0].keys() == plain.history[0].keys()
    for one, other in zip(made.history, plain.history, strict=True):
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert made.after == pytest.approx(plain.after, rel=1e-5, abs=1e-6)
    assert made.history[0]["rewards/margins"] != 0


def test_a_made_cache_is_read_packed_or_not_and_the_reference_is_not_loaded(
    cached, chat_models, tmp_path, monkeypatch
):
    folder, made, _, common = cached

    def never(*args, **options):
        raise AssertionError("the reference was loaded")

    monkeypatch.setattr(reference, "load_frozen", never)
    monkeypatch.setattr(reference.dpo, "make_prepare", never)
    cache = {"reference_cache": str(folder)}
    again = run("dpo", chat_models, tmp_path / "again", common | cache)
    assert again.history == made.history
    changes = merge(common | cache, {"data": {"packing": True, "length": 64, "eval": []}})
    task = tasks.make_task(config("dpo", chat_models, tmp_path / "packed", changes))
    ((batch,), _) = task.prepare_updates(
        jax.random.key(0), task.state, next(iter(task.batches)), {}, iter(())
    )
    assert batch.mask.shape == (8, 2)
    assert batch.mask.all()
    assert (batch.ref_chosen_logps < 0).all()


def test_without_a_reference_nothing_is_held_beside_the_state(chat_models, tmp_path):
    """All arrays that live once the task is made are its state's: no reference, no second copy."""
    changes = {"reference_cache": str(tmp_path / "cache")}
    made = tasks.make_task(config("dpo", chat_models, tmp_path / "a", changes))
    del made
    before = {id(x) for x in jax.live_arrays()}
    task = tasks.make_task(config("dpo", chat_models, tmp_path / "b", changes))
    ours = {id(x) for x in jax.tree.leaves(task.state)}
    embedding = jax.tree.leaves(task.state.params["embed"])[0].shape
    beside = [x for x in jax.live_arrays() if id(x) not in before | ours and x.shape == embedding]
    assert not beside


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reference": None}, "other model"),
        ({"dpo": {"ld_alpha": 0.5}}, "other ld_alpha .cache None, run 0.5"),
        ({"model": {"chat_template": "chatml"}}, "other chat_template"),
        ({"model": {"compute_dtype": "bfloat16"}}, "other compute_dtype"),
        (
            {"data": {"length": 22}},
            "belongs to other data: 3 of the run's pairs are not among its 12",
        ),
    ],
)
def test_a_stale_cache_is_refused_and_says_what_differs(
    cached, chat_models, tmp_path, changes, told
):
    folder, _, _, common = cached
    values = merge(common | {"reference_cache": str(folder)}, changes)
    with pytest.raises(ValueError, match=told):
        tasks.make_task(config("dpo", chat_models, tmp_path / "run", values))


def test_another_tokenizer_is_refused():
    one, other = chatmodel.make_tokenizer(), chatmodel.make_tokenizer()
    other.add_tokens(["extra"])
    digest = reference.tokenizer_digest
    assert digest(one) == digest(chatmodel.make_tokenizer()) != digest(other)


def test_every_byte_of_a_models_weights_counts(tmp_path):
    """Safetensors in a folder, or an Orbax checkpoint in one; the rest of the folder does not."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no weights"):
        weights_digest(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    seen = [weights_digest(str(tmp_path))]
    (tmp_path / "README.md").write_text("new")
    assert weights_digest(str(tmp_path)) == seen[0]
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    seen.append(weights_digest(str(tmp_path)))
    (tmp_path / "params" / "d").mkdir(parents=True)
    (tmp_path / "params" / "d" / "chunk").write_bytes(b"1")
    seen.append(weights_digest(str(tmp_path)))
    (tmp_path / "params" / "d" / "chunk").write_bytes(b"2")
    seen.append(weights_digest(str(tmp_path)))
    assert len(set(seen)) == 4


def test_a_damaged_cache_is_refused(tmp_path):
    fingerprint = {"model": "a"}
    assert ReferenceCache.load(tmp_path, fingerprint) is None
    ReferenceCache({b"k" * 16: (-1.0, -2.0)}).save(tmp_path, fingerprint)
    assert ReferenceCache.load(tmp_path, fingerprint).logps == {b"k" * 16: (-1.0, -2.0)}
    (tmp_path / "logps.npz").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"unreadable.*another folder"):
        ReferenceCache.load(tmp_path, fingerprint)
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == fingerprint


def tokens(ids, segments, mask, branches=None):
    ids = np.array([ids], np.int32)
    targets = np.append(ids[:, 1:], [[9]], axis=1).astype(np.int32)
    return TokenBatch(
        ids, targets, np.zeros_like(ids), np.array([segments], np.int32), np.array([mask], bool),
        None if branches is None else np.array([branches], np.int32),
    )  # fmt: skip


def test_a_pairs_key_does_not_depend_on_where_it_stands():
    alone = PairBatch(
        tokens([5, 6, 7, 2], [1, 1, 1, 1], [0, 1, 1, 0]),
        tokens([5, 6, 8, 0], [1, 1, 1, 0], [0, 1, 0, 0]),
    )
    packed = PairBatch(
        tokens([4, 4, 5, 6, 7, 2], [1, 1, 2, 2, 2, 2], [1, 0, 0, 1, 1, 0]),
        tokens([4, 3, 5, 6, 8, 0], [1, 1, 2, 2, 2, 0], [1, 0, 0, 1, 0, 0]),
        mask=np.array([[True, True, False]]),
    )
    shared = SharedPairBatch(
        tokens([5, 6, 7, 2, 6, 8], [1] * 6, [0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 2, 2]),
        mask=np.array([[True]]),
    )
    (key,) = pair_keys(alone)
    first, second, third = pair_keys(packed)[0]
    assert key == second != first
    assert third is None
    assert pair_keys(shared)[0, 0] == key
    other = alone._replace(chosen=alone.chosen._replace(loss_mask=np.array([[0, 0, 1, 0]], bool)))
    assert pair_keys(other)[0] != key


def test_shared_prompts_give_the_same_keys_and_log_probabilities(chat_models, tmp_path):
    model, params = jaxalign.load_pretrained(chat_models / "chat")
    path = [chatmodel.write_rows(tmp_path / "pairs.jsonl", chatmodel.PAIRS)]
    options = {"rows": 12, "shuffle": False, "packing": True}
    tok = chatmodel.make_tokenizer()
    plain = next(iter(jaxalign.preference_batches(path, tok, length=32, **options)))
    shared = next(
        iter(jaxalign.preference_batches(path, tok, length=64, shared_prefix=True, **options))
    )
    assert isinstance(shared, SharedPairBatch)
    prepare = jaxalign.dpo.make_prepare(model)
    seen = []
    for batch in (plain, shared):
        ready, keys = prepare(params, batch), pair_keys(batch)
        seen.append(
            {
                key: (float(ready.ref_chosen_logps[at]), float(ready.ref_rejected_logps[at]))
                for at, key in np.ndenumerate(keys)
                if key is not None
            }
        )
    assert len(seen[0]) == 12
    assert seen[0].keys() == seen[1].keys()
    for key, logps in seen[0].items():
        assert seen[1][key] == pytest.approx(logps, rel=1e-5)


# Following


def test_follow_moves_every_so_many_updates_by_hand():
    import optax

    tx = with_moving_reference(optax.sgd(1.0), ReferenceSync(every=2, alpha=0.25))
    params = {"w": np.float32(8.0)}
    state = tx.init(params)
    seen = []
    for _ in range(4):
        updates, state = tx.update({"w": np.float32(1.0)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((float(params["w"]), float(state.reference["w"])))
    # 8 + ¼ (6 − 8) = 7.5 after two updates; 7.5 + ¼ (4 − 7.5) after four.
    assert seen == [(7.0, 8.0), (6.0, 7.5), (5.0, 7.5), (4.0, 6.625)]


def test_a_synced_run_follows_and_resumes_exactly(chat_models, tmp_path):
    """A hard copy after every second update: the third batch sees policy = reference again."""
    changes = {"reference_sync": {"every": 2, "alpha": 1.0}}
    whole = run("dpo", chat_models, tmp_path / "whole", changes, steps=4, save_every=3)
    margins = [row["rewards/margins"] for row in whole.history]
    assert [margins[0], margins[2]] == pytest.approx([0, 0], abs=1e-5)
    assert abs(margins[1]) > 1e-3
    assert abs(margins[3]) > 1e-3

    assert resumed(whole, tmp_path / "cut", at=3).history == whole.history[3:]
    assert export_run(str(tmp_path / "cut"), str(tmp_path / "model")).step == 4


def test_another_models_weights_can_follow_and_start_as_they_are(
    chat_models, other_model, tmp_path
):
    changes = {"reference": other_model, "reference_sync": {"every": 8}}
    task = tasks.make_task(config("dpo", chat_models, tmp_path / "run", changes))
    _, params = jaxalign.load_pretrained(other_model)
    assert isinstance(task.state.opt_state, MovingReferenceState)
    held = task.state.opt_state.reference
    for one, other in zip(jax.tree.leaves(held), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_adapters_follow_over_their_base(chat_models, tmp_path):
    changes = {"reference_sync": {"every": 2, "alpha": 1.0}, "model": {"lora": {"rank": 2}}}
    task = tasks.make_task(config("dpo", chat_models, tmp_path / "run", changes))
    kept = task.state.opt_state.reference
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, task.state.params)
    batch = next(iter(task.batches))

    def reference_says(reference):
        state = task.state._replace(opt_state=task.state.opt_state._replace(reference=reference))
        ((ready,), _) = task.prepare_updates(jax.random.key(0), state, batch, {}, iter(()))
        return np.asarray(ready.ref_chosen_logps)

    at_first = reference_says(kept)
    np.testing.assert_array_equal(reference_says(kept), at_first)
    moved = jax.tree.map(lambda x: x + 0.1, kept)
    assert np.abs(reference_says(moved) - at_first).max() > 0.1


def test_a_run_without_a_reference_holds_none(chat_models, tmp_path, monkeypatch):
    def never(*args, **options):
        raise AssertionError("a reference was asked for")

    monkeypatch.setattr(reference.dpo, "make_prepare", never)
    monkeypatch.setattr(tasks.dpo, "make_reference", never)
    made = run("dpo", chat_models, tmp_path / "run", {"dpo": {"loss_type": "orpo"}})
    assert {"nll", "weight/sft"} <= made.history[0].keys()
    assert made.history[1]["loss"] < made.history[0]["loss"]


# KTO


def test_a_kto_run_starts_at_one_half_learns_and_resumes(chat_models, tmp_path):
    held = [chatmodel.write_rows(tmp_path / "held_out.jsonl", chatmodel.MARKED[:9])]
    changes = {"data": {"eval": held}, "kto": {"undesirable_weight": 2.0}}
    whole = run("kto", chat_models, tmp_path / "whole", changes, steps=4, save_every=2)
    first = whole.history[0]
    # Policy = reference: σ(0) = ½ of each answer's weight, no rewards, no KL.
    good = sum(row["label"] for row in chatmodel.MARKED[:9])
    assert whole.before["loss/kto"] == pytest.approx(0.5 * (good + 2 * (9 - good)) / 9, rel=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["weight/kto"] == 8
    after = whole.after
    assert after["loss/kto"] < whole.before["loss/kto"]
    assert after["rewards/chosen"] > after["rewards/rejected"]
    assert max(row["kl"] for row in whole.history) > 1e-3

    assert resumed(whole, tmp_path / "cut", at=2).history == whole.history[2:]
