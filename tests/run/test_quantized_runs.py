"""Runs over a quantised base: all algorithms, resuming, exports, references and plans."""

import shutil

import chatmodel
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.models.lora import LoraConfig, merge_lora
from jaxalign.models.quantized import is_quantized
from jaxalign.plan.make import resident_bytes, run_shapes
from jaxalign.run import loop
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.export import export_run, load_run
from jaxalign.run.export_as import ExportOptions, export
from jaxalign.run.tasks.loader import FileLoader, KeepingLoader
from jaxalign.run.tasks.parts import unread_data
from jaxalign.run.tasks.ppo import build_ppo

pytest.importorskip("qwix", reason="a quantised base needs qwix")
pytestmark = pytest.mark.usefixtures("kept_programs")

NF4 = {"model": {"quantize": "nf4", "lora": {"rank": 2, "targets": ["query", "down"]}}}


def train(algorithm, models, folder, changes, **run):
    values = merge(chatmodel.settings(algorithm, models, folder, **run), changes)
    return loop.train(load_config(algorithm, values))


@pytest.fixture(scope="module")
def finished(chat_models, tmp_path_factory):
    """A run of 4 steps of SFT, and what it printed in the end."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    return train("sft", chat_models, folder, NF4, save_every=2)


def test_a_run_that_is_resumed_is_the_same(finished, chat_models, tmp_path):
    """Killed after two steps: the base is quantised again, to the same bits."""
    again = train("sft", chat_models, tmp_path / "run", NF4, steps=2)
    again = train("sft", chat_models, tmp_path / "run", NF4, steps=4, resume=True)
    whole = chatmodel.timeless(chatmodel.lines(finished.folder))
    parts = chatmodel.timeless(chatmodel.lines(again.folder))
    assert [row["loss"] for row in whole] == [row["loss"] for row in parts]
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert chatmodel.weights(finished.model) == chatmodel.weights(again.model)


def test_a_checkpoint_holds_adapters_alone(finished):
    store = Checkpoints(finished.folder / "checkpoints", keep=None)
    _, shapes = store.param_shapes()
    store.close()
    names = {path.rpartition("[")[2] for path in chatmodel_paths(shapes)}
    assert names == {"'lora_a']", "'lora_b']"}


def chatmodel_paths(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_an_export_has_the_floats_of_the_source(finished, chat_models, tmp_path, capsys):
    export_run(str(finished.folder), str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert "in nf4, and are exported with its floats" in said
    assert "--dequantize" in said
    assert chatmodel.weights(tmp_path / "out") == chatmodel.weights(finished.model)
    start, end = (jaxalign.load_pretrained(p)[1] for p in (chat_models / "chat", tmp_path / "out"))
    start, end = chatmodel.leaves(start), chatmodel.leaves(end)
    moved = {name for name in start if np.any(start[name] != end[name])}
    assert moved == {
        "['blocks']['attention']['query']['kernel']",
        "['blocks']['mlp']['down']['kernel']",
    }
    # By hand: the float matrix and α/r · A·B.
    params = load_run(str(finished.folder)).params
    node = jax.tree.map(np.asarray, params["blocks"]["mlp"]["down"])
    name = "['blocks']['mlp']['down']['kernel']"
    want = start[name] + 16 * node["lora_a"] @ node["lora_b"]
    np.testing.assert_allclose(end[name], want, 0, 1e-6)


def test_an_export_may_be_the_model_that_was_trained(finished, tmp_path, capsys):
    export_run(str(finished.folder), str(tmp_path / "out"), dequantize=True)
    assert "floats" not in capsys.readouterr().out
    model, got = jaxalign.load_pretrained(tmp_path / "out")
    base, params = jaxalign.load_pretrained(
        load_config("sft", finished.folder / "config.yaml").model.source, quantize="nf4"
    )
    trained = load_run(str(finished.folder), dequantize=True)
    adapters = jax.tree.map(lambda x: x, _adapters(trained.params))
    config = LoraConfig(rank=2, targets=("query", "down"))
    adapted = jaxalign.models.decoder.Decoder(base.config, lora=config, quantize="nf4")
    _, want = merge_lora(adapted, jaxalign.combine(adapters, params), dequantize=True)
    for path, value in chatmodel.leaves(want).items():
        np.testing.assert_allclose(chatmodel.leaves(got)[path], value, 0, 1e-6, path)
    assert model.quantize is None
    options = ExportOptions(formats=("peft",), dequantize=True)
    with pytest.raises(ValueError, match="--dequantize --to peft"):
        export(str(finished.folder), str(tmp_path / "no"), options)


def test_a_model_is_not_dequantised(chat_models, tmp_path):
    with pytest.raises(ValueError, match=r"--dequantize is of a run with model\.quantize"):
        export(str(chat_models / "chat"), str(tmp_path / "no"), ExportOptions(dequantize=True))


def _adapters(node):
    kept = {k: _adapters(v) if isinstance(v, dict) else v for k, v in node.items()}
    return {
        k: v for k, v in kept.items() if (isinstance(v, dict) and v) or k in ("lora_a", "lora_b")
    }


def test_adapters_travel_to_peft_and_are_verified(finished, tmp_path):
    done = export(str(finished.folder), str(tmp_path / "out"), ExportOptions(("hf", "peft")))
    assert [line.partition(":")[0] for line in done.checks] == [
        "hf, read by jaxalign",
        "peft, read by jaxalign",
    ]
    wrong = [d["verified"]["jaxalign"]["largest"] for d in done.notes.values()]
    assert max(wrong) < 1e-4


def test_where_the_source_is_gone_the_rounding_stays(chat_models, tmp_path, monkeypatch, capsys):
    shutil.copytree(chat_models / "chat", tmp_path / "base")
    changes = merge(NF4, {"model": {"source": str(tmp_path / "base")}})
    make = loop.make_task

    def losing(config):
        task = make(config)
        shutil.rmtree(tmp_path / "base")
        return task

    monkeypatch.setattr(loop, "make_task", losing)
    monkeypatch.setattr(loop, "source_paths", lambda config: [], raising=False)
    result = train("sft", chat_models, tmp_path / "run", changes, steps=1, checkpoint=False)
    said = capsys.readouterr().out
    assert "cannot be read again" in said
    assert "whose rounding stays in the weights" in said
    _, floats = jaxalign.load_pretrained(chat_models / "chat")
    _, end = jaxalign.load_pretrained(result.model)
    up = [p["blocks"]["mlp"]["up"]["kernel"] for p in (floats, end)]
    assert 0.01 < np.abs(np.asarray(up[0]) - up[1]).mean() / np.abs(up[0]).mean() < 0.1


ALGORITHMS = [
    ("reward", {}),
    ("dpo", {}),
    ("kto", {}),
    ("ppo", {"critic": "adapter"}),
    ("ppo", {"reward_model": None, "rewards": [{"kind": "length", "target": 4}],
             "ppo": {"advantage_estimator": "rloo", "samples": 2}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "changes"), ALGORITHMS, ids=["rm", "dpo", "kto", "ppo", "rloo"]
)
def test_every_algorithm_trains_over_it(algorithm, changes, chat_models, tmp_path, monkeypatch):
    kept, make = {}, loop.make_task

    def spying(config):
        task = make(config)
        kept["state"] = task.state
        return task

    monkeypatch.setattr(loop, "make_task", spying)
    result = train(
        algorithm, chat_models, tmp_path / "run", merge(NF4, changes), steps=1, checkpoint=False
    )
    frozen = kept["state"].frozen
    base = frozen["policy"] if algorithm == "ppo" else frozen
    assert is_quantized(base["blocks"]["mlp"]["up"]["kernel"])
    first = chatmodel.lines(result.folder)[0]
    if algorithm == "dpo":  # the reference is the base without adapters
        assert first["loss"] == pytest.approx(np.log(2), rel=1e-5)
    if algorithm == "ppo":
        assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
        if "critic" in changes:
            critic = frozen["critic"]["blocks"]["mlp"]["up"]["kernel"]
            assert critic["packed"] is base["blocks"]["mlp"]["up"]["kernel"]["packed"]
    assert (result.model / "config.json").is_file()


def test_four_roles_share_one_quantised_base(chat_models, tmp_path):
    """The reward model is an adapter too: its base is the policy's, in 4 bits."""
    base = str(chat_models / "chat")
    model, params = jaxalign.load_pretrained(base)
    model, trained, frozen = jaxalign.add_lora(
        model, params, jax.random.key(5), LoraConfig(rank=3, targets=("up",))
    )
    scorer, whole = jaxalign.with_scalar_head(
        model, jaxalign.combine(trained, frozen), jax.random.key(6)
    )
    jaxalign.save_adapter(scorer, whole, tmp_path / "reward", base=base)
    changes = merge(NF4, {"critic": "adapter", "reward_model": str(tmp_path / "reward")})
    values = merge(chatmodel.settings("ppo", chat_models, tmp_path / "run"), changes)
    config = load_config("ppo", values)
    state, parts = build_ppo(config, config.mesh.make(), FileLoader(), unread_data(config))
    codes = [
        params["blocks"]["mlp"]["up"]["kernel"]["packed"]
        for params in (*state.frozen.values(), parts.reward_models[0].params, parts.reference.held)
    ]
    assert len(codes) == 4
    assert all(one is codes[0] for one in codes)


def test_stages_of_a_pipeline_quantise_what_they_are_handed(chat_models, tmp_path):
    """A model in memory becomes what its files would."""
    values = merge(chatmodel.settings("sft", chat_models, tmp_path / "run"), NF4)
    config = load_config("sft", values)
    mesh = config.mesh.make()
    model, params = jaxalign.load_pretrained(chat_models / "chat", mesh=mesh)
    loader = KeepingLoader()
    loader.keep("kept", model, params)
    one = loader.load("kept", config.model, mesh, remat="none")[1]
    other = loader.load(config.model.source, config.model, mesh, remat="none")[1]
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.map(lambda x: x.sharding, one) == jax.tree.map(lambda x: x.sharding, other)


def test_a_plan_counts_few_bits(chat_models, tmp_path):
    """Parts only, nothing compiled: bytes of the base on each of 8 devices."""
    sizes = {}
    for kind in (None, "nf4", "nf4-double", "int8"):
        changes = merge(NF4, {"model": {"quantize": kind, "dtype": "bfloat16"}})
        values = merge(chatmodel.settings("dpo", chat_models, tmp_path / "run"), changes)
        config = load_config("dpo", values)
        state, parts = run_shapes("dpo", config, config.mesh.make())
        sizes[kind] = resident_bytes(state, parts)
        assert sizes[kind]["models"] == 0
    # 2 layers of 32 × (32 + 16 + 16 + 32) and 3 × 32 × 48 weights on 8 devices.
    weights = 2 * (32 * 96 + 3 * 32 * 48) // 8
    rest = sizes[None]["frozen"] - 2 * weights
    assert sizes["int8"]["frozen"] - rest > weights
    # Blocks are 32 or 48 rows, one a column: scales are whole on the devices, or cut by columns.
    columns = 2 * (32 + 16 + 16 + 48 + 48) + 2 * (32 + 32) // 8
    assert sizes["nf4"]["frozen"] - rest == weights // 2 + 4 * columns
    assert sizes["nf4"]["params"] == sizes[None]["params"]


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        (
            "sft",
            {"model": {"quantize": "nf4"}},
            r"model\.quantize='nf4': wanted null without model",
        ),
        (
            "sft",
            {"model": {"quantize": "int4", "lora": {}}},
            r"wanted one of nf4, nf4-double, int8",
        ),
        (
            "sft",
            {"model": {"quantize": "nf4", "lora": {"init": "pissa"}}},
            r"null with model\.lora",
        ),
        ("ppo", merge(NF4, {"critic": "policy"}), r"critic='policy': wanted adapter, or a model"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(algorithm, changes, message, tmp_path):
    values = merge(chatmodel.settings(algorithm, tmp_path / "nowhere", tmp_path / "run"), changes)
    with pytest.raises(ValueError, match=message):
        load_config(algorithm, values)


def test_only_a_quantised_run_is_dequantised(chat_models, tmp_path):
    result = train("sft", chat_models, tmp_path / "run", {"model": {"lora": {"rank": 2}}}, steps=1)
    with pytest.raises(ValueError, match="has no quantised base"):
        export_run(str(result.folder), str(tmp_path / "out"), dequantize=True)
