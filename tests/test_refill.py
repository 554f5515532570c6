"""Queues: fewer slots than answers where lengths differ, with the same answers."""

import chatmodel
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.data.chat import encode_prompt, stop_token_ids
from jaxalign.data.packing import prompt_rows
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.rules import use_rules
from jaxalign.parallel.sharding import param_shardings
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.tasks import ppo as task
from jaxalign.sampling import generate as generating
from jaxalign.sampling.refill import refilled_slots

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.mark.parametrize(
    ("answers", "mean", "longest", "wanted"),
    [
        # On a CPU n0 = 8, so S = 16. A queue: (64 · 64 / 16 + 64) · 24 = 7,680 against 128 · 72.
        (64, 64.0, 128.0, 16),
        # (64 · 96 / 16 + 64) · 24 = 10,752 against 9,216.
        (64, 96.0, 128.0, None),
        (64, 128.0, 128.0, None),  # all as long as the longest
        (31, 4.0, 128.0, None),  # too few for a queue
        (32, 16.0, 128.0, 16),  # (32 + 64) · 24 = 2,304 against 128 · 40
    ],
)
def test_a_queue_is_chosen_where_it_takes_less(answers, mean, longest, wanted):
    assert refilled_slots(answers, mean, longest) == wanted
    whole = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    assert refilled_slots(answers, mean, longest, whole) == wanted
    # Rows on several devices: a queue would gather their prompts on each of them.
    assert refilled_slots(answers, mean, longest, make_mesh(data=2, fsdp=4)) is None
    with use_rules({"cache_rows": ("tensor",)}):
        assert refilled_slots(answers, mean, longest, make_mesh(fsdp=1, tensor=8)) is None


def in_group(model, params, tok, prompts, start, *, key, max_new_tokens, temperature):
    """The answers to up to two prompts that follow `start` others."""
    ids = [np.asarray(encode_prompt(tok, prompt), np.int32) for prompt in prompts]
    rows = prompt_rows(ids, list(range(len(ids))), 2, 64, tok.pad_token_id)
    out = generating.sample(
        model, params, rows, jax.random.fold_in(key, start), max_new_tokens=max_new_tokens,
        temperature=temperature, stop_tokens=stop_token_ids(tok, None, model),
        pad_token=tok.pad_token_id,
    )  # fmt: skip
    return [
        tok.decode(np.asarray(out.tokens)[row][np.asarray(out.mask)[row]], skip_special_tokens=True)
        for row in range(len(ids))
    ]


def test_texts_are_answered_from_one_queue(chat_models, monkeypatch):
    """More prompts than rows: one call, and the answers of groups."""
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    model, params = jaxalign.load_pretrained(chat_models / "chat", mesh=mesh)
    tok = jaxalign.load_tokenizer(chat_models / "chat")
    prompts = [f"{'why ' * number}is the sky blue" for number in range(5)]
    options = {"max_new_tokens": 7, "temperature": 1.0, "key": jax.random.key(3)}
    # In groups of two, as they were answered before there was a queue.
    pairs = [prompts[:2], prompts[2:4], prompts[4:]]
    grouped = [
        answer
        for start, pair in zip((0, 2, 4), pairs, strict=True)
        for answer in in_group(model, params, tok, pair, start, **options)
    ]
    calls, sample = [], generating.sample

    def counted(*args, **kwargs):
        calls.append((args[2].tokens.shape[0], kwargs["slots"]))
        return sample(*args, **kwargs)

    monkeypatch.setattr(generating, "sample", counted)
    assert jaxalign.generate(model, params, tok, prompts, rows=2, **options) == grouped
    assert calls == [(8, 2)]
    # Split over devices, or with drafts, groups follow each other.
    calls.clear()
    spread = make_mesh(data=2, fsdp=1, tensor=1, devices=jax.devices()[:2])
    both = jax.device_put(params, param_shardings(model.axes, spread))
    assert jaxalign.generate(model, both, tok, prompts, rows=2, **options) == grouped
    assert jaxalign.generate(model, params, tok, prompts, rows=2, speculate=2, **options) == grouped
    assert calls == [(2, None)] * 6


def test_a_run_gives_the_next_rollout_the_slots_of_its_lengths(chat_models, tmp_path, monkeypatch):
    """Only the layout of sampling changes; stopped and resumed, it stays the same."""
    asked = []

    def slots(answers, mean, longest, mesh):
        asked.append((answers, mean, longest))
        return 8

    values = chatmodel.settings("ppo", chat_models, tmp_path / "plain", steps=3, checkpoint=False)
    changes = {"data": {"rows": 16}}
    monkeypatch.setattr(task, "refilled_slots", lambda *_, mesh: None)
    plain = loop.train(load_config("ppo", merge(values, changes)))
    monkeypatch.setattr(task, "refilled_slots", slots)
    folder = str(tmp_path / "queue")
    run = {"folder": folder, "checkpoint": True, "save_every": 1, "steps": 2}
    loop.train(load_config("ppo", merge(values, changes | {"run": run})))
    # Resumed, it knows the lengths of the last rollout before the stop.
    run |= {"steps": 3, "resume": True}
    queue = loop.train(load_config("ppo", merge(values, changes | {"run": run})))
    rows = chatmodel.lines(folder)
    for a, b in zip(plain.history, rows, strict=True):
        assert a["response/length"] == b["response/length"]
        np.testing.assert_allclose(a["objective/kl"], b["objective/kl"], 1e-4, 1e-5)
    assert len(queue.history) == 1
    # The first rollout has nothing to go by.
    lengths = [(row["response/length"], row["response/length_max"]) for row in rows]
    assert asked == [(16, *pair) for pair in lengths[:-1]]
