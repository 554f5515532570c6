"""Whole runs of the four algorithms on a tiny chat model: what they leave, and that they resume."""

import json
import math
import shutil

import chatmodel
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxalign
from jaxalign import algorithms
from jaxalign.commands import cli
from jaxalign.hf import load_pretrained
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.run import export, loop, reporter, tasks
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge, read_yaml
from jaxalign.run.metrics import JsonlWriter

pytestmark = pytest.mark.usefixtures("kept_programs")

ALGORITHMS = ("sft", "reward", "dpo", "ppo")
SPREAD = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}


def run(algorithm, models, folder, changes=None, **options):
    values = chatmodel.settings(algorithm, models, folder, **options)
    return loop.train(load_config(algorithm, merge(values, changes or {})))


def held_out(tmp_path, algorithm):
    rows = chatmodel.ROWS[algorithm][:9]  # 9 rows are two batches, the second nearly empty
    return {"data": {"eval": [chatmodel.write_rows(tmp_path / "held_out.jsonl", rows)]}}


RESUMED = {
    "sft": {"data": {"packing": True}, "optimizer": {"schedule": "linear", "warmup_steps": 1}},
    # A target far from the measured KL and a short horizon, so that β moves every iteration.
    # With all else that PPO carries along: score statistics, calibration, texts, a late policy.
    "ppo": {
        "ppo": {
            "kl_target": 0.5,
            "kl_horizon": 20.0,
            "normalize_scores": True,
            "reward_clip": 2.0,
            "ptx_coef": 0.1,
        },
        "ppo_epochs": 2,
        "minibatches": 1,
        "critic_warmup": 1,
        "target_kl": 1e-3,
        "calibrate_reward": "mean_std",
        "dump_every": 1,
        "dump_samples": 2,
    },
}


@pytest.fixture(scope="module")
def runs(chat_models, tmp_path_factory):
    """One run of each algorithm with held-out data, made when first asked for."""
    made = {}

    def get(algorithm):
        if algorithm not in made:
            folder = tmp_path_factory.mktemp(algorithm)
            changes = held_out(folder, algorithm)
            if algorithm == "ppo":
                texts = chatmodel.write_rows(folder / "texts.jsonl", chatmodel.ROWS["sft"])
                ptx = {"train": [texts], "rows": 8, "length": 32, "epochs": None}
                changes = merge(changes, RESUMED["ppo"]) | {"ptx": ptx}
            made[algorithm] = run(
                algorithm, chat_models, folder / "run", changes, save_every=2, eval_every=2
            )
        return made[algorithm]

    return get


# What a run leaves

FIGURES = {
    "sft": {"loss/nll"},
    "reward": {"accuracy", "margin", "loss/preference"},
    "dpo": {"rewards/accuracies", "rewards/margins", "logps/chosen"},
    "ppo": {"objective/scores", "objective/kl", "response/length"},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_leaves_its_metrics_config_versions_and_model(runs, algorithm):
    result = runs(algorithm)
    rows = chatmodel.lines(result.folder)

    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["compiles"] == 1 for row in training)
    assert all(row["time/step"] > 0 and row["time/data"] >= 0 for row in training)
    assert chatmodel.timeless(training) == [
        {"step": number} | metrics for number, metrics in enumerate(result.history, start=1)
    ]

    again = load_config(algorithm, result.folder / "config.yaml")
    assert again.run.folder == str(result.folder)
    assert again.run.steps == 4

    versions = json.loads((result.folder / "versions.json").read_text(encoding="utf-8"))
    assert versions["jax"] == jax.__version__
    assert versions["devices"].startswith("8 ×")

    model, params = jaxalign.load_pretrained(result.model)
    assert type(model) is (Scorer if algorithm == "reward" else Decoder)
    assert all(np.isfinite(leaf).all() for leaf in chatmodel.leaves(params).values())
    tok = jaxalign.load_tokenizer(result.model)
    assert tok.chat_template == chatmodel.CHATML
    assert tok.pad_token == "<pad>"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_held_out_figures_are_taken_at_the_start_the_end_and_between(runs, algorithm):
    result = runs(algorithm)
    evaluations = [r for r in chatmodel.lines(result.folder) if "loss" not in r]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    for row, figures in zip(evaluations[::2], (result.before, result.after), strict=True):
        assert row == {"step": row["step"]} | {f"eval/{k}": v for k, v in figures.items()}
        assert set(figures) >= FIGURES[algorithm]
    assert result.before != result.after


def test_training_moves_the_right_way(runs):
    losses = [row["loss"] for row in runs("sft").history]
    assert losses[0] == pytest.approx(5.56, abs=1.5)  # about log 260
    assert losses == sorted(losses, reverse=True)
    assert runs("sft").after["loss/nll"] < 0.8 * runs("sft").before["loss/nll"]

    # At the start the policy is the reference: a loss of log 2, no margin.
    assert runs("dpo").history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert runs("dpo").before["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert runs("dpo").after["rewards/margins"] > 0.1
    assert runs("reward").after["margin"] > runs("reward").before["margin"] + 0.1
    assert runs("ppo").before["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(runs("ppo").after["objective/kl"]) > 1e-3


def test_the_first_sft_loss_is_that_of_the_model_in_numpy(runs, chat_models):
    """Through files, tokenizer, packing, mesh and step: the mean NLL of all held-out answers."""
    from plain_llama import logits as plain_logits

    model, params = jaxalign.load_pretrained(chat_models / "chat")
    tok = chatmodel.make_tokenizer()
    total = count = 0
    for row in chatmodel.CONVERSATIONS[:9]:
        question, answer = (turn["content"] for turn in row["messages"])
        head = tok.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        ids = np.array(head + tok.encode(f"{answer}<|im_end|>"))
        logits = np.asarray(plain_logits(model.config, params, ids[:-1]), np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        trained = np.arange(len(head) - 1, len(ids) - 1)
        total -= logprobs[trained, ids[trained + 1]].sum()
        count += len(trained)
    assert runs("sft").before["loss/nll"] == pytest.approx(total / count, rel=1e-4)


def test_the_models_own_weights_are_the_start(runs, chat_models):
    """Training moved the exported weights, and left the source as it was."""
    _, start = jaxalign.load_pretrained(chat_models / "chat")
    _, end = jaxalign.load_pretrained(runs("sft").model)
    start, end = chatmodel.leaves(start), chatmodel.leaves(end)
    assert start.keys() == end.keys()
    moved = {name: np.abs(start[name] - end[name]).max() for name in start}
    # 4 updates of Adam at 3e-3 move nothing by more than a little over 4 × 3e-3.
    assert all(0 < distance < 0.02 for distance in moved.values())


# Resuming


class Killed(BaseException):
    """Stands for the end of the process."""


def killing_writer(at):
    class Writer(JsonlWriter):
        def write(self, step, metrics):
            if step == at and "loss" in metrics:
                self._file.write('{"step": ')  # a line cut off in the middle
                self._file.flush()
                raise Killed
            super().write(step, metrics)

    return Writer


@pytest.mark.parametrize("algorithm", RESUMED)
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(
    runs, tmp_path, chat_models, monkeypatch, algorithm
):
    if algorithm == "ppo":
        whole = runs("ppo")
    else:
        changes = merge(RESUMED[algorithm], held_out(tmp_path, algorithm))
        options = {"save_every": 2, "eval_every": 2}
        whole = run(algorithm, chat_models, tmp_path / "whole", changes, **options)

    def again(*given):
        folder = f"run.folder={tmp_path / 'killed'}"
        return loop.train(load_config(algorithm, whole.folder / "config.yaml", [folder, *given]))

    with monkeypatch.context() as patch:
        patch.setattr(reporter, "JsonlWriter", killing_writer(at=4))
        with pytest.raises(Killed):
            again()
    assert not (tmp_path / "killed" / "model").exists()
    resumed = again("run.resume=true")

    assert len(resumed.history) == 2  # it went on from step 2
    ours, theirs = (chatmodel.lines(r.folder) for r in (resumed, whole))
    assert chatmodel.timeless(ours) == chatmodel.timeless(theirs)
    assert chatmodel.weights(resumed.model) == chatmodel.weights(whole.model)
    assert resumed.after == whole.after
    if algorithm == "ppo":
        coefficients = [row["kl_coef"] for row in whole.history]
        assert coefficients[0] == 0.05
        assert len(set(coefficients)) == 4  # so that a forgotten one would show
        # Calibrated, the reference's answers score 0 ± 1 on average.
        assert abs(whole.history[0]["objective/scores"]) < 1
        # The first iteration trained the critic alone.
        far = [row["policy/approxkl_avg"] > 1e-6 for row in whole.history]
        assert far == [False, True, True, True]
        assert [row["updates"] for row in whole.history] == [2] * 4
        for name in ("rollouts.jsonl", "histograms.jsonl"):
            ours, theirs = ((r.folder / name).read_text("utf-8") for r in (resumed, whole))
            assert ours == theirs
            steps = [json.loads(line)["step"] for line in ours.splitlines()]
            assert sorted(set(steps)) == [1, 2, 3, 4]


def test_killed_before_the_first_checkpoint_it_starts_anew_if_it_may(
    tmp_path, chat_models, monkeypatch
):
    changes = held_out(tmp_path, "sft")
    with monkeypatch.context() as patch:
        patch.setattr(reporter, "JsonlWriter", killing_writer(at=2))
        with pytest.raises(Killed):
            run("sft", chat_models, tmp_path / "run", changes, steps=2)
    with pytest.raises(ValueError, match=r"holds no checkpoint; run\.resume=auto starts"):
        run("sft", chat_models, tmp_path / "run", changes, steps=2, resume=True)
    run("sft", chat_models, tmp_path / "run", changes, steps=2, resume="auto", export=False)
    steps = [row["step"] for row in chatmodel.lines(tmp_path / "run")]
    assert steps == [0, 1, 2, 2]  # held out, two updates, held out


def test_a_finished_run_resumes_to_nothing_and_is_refused_without_resume(runs, chat_models):
    result = runs("sft")
    before = chatmodel.lines(result.folder), chatmodel.weights(result.model)
    config = load_config("sft", result.folder / "config.yaml")
    with pytest.raises(ValueError, match=r"run\.folder=.*checkpoints.*run\.resume=true"):
        loop.train(config)
    assert (chatmodel.lines(result.folder), chatmodel.weights(result.model)) == before
    again = loop.train(load_config("sft", result.folder / "config.yaml", ["run.resume=true"]))
    assert again.history == []
    assert (chatmodel.lines(result.folder), chatmodel.weights(result.model)) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": {"length": 30}}, r"data\.length: 32 → 30\n"),
        ({"run": {"seed": 1}}, r"run\.seed: 0 → 1\n"),
        ({"optimizer": {"max_grad_norm": None}}, r"optimizer\.max_grad_norm: 1\.0 → null\n"),
    ],
    ids=["length", "seed", "optimizer"],
)
def test_resuming_with_another_config_is_refused(runs, changes, told):
    folder = runs("sft").folder
    before = chatmodel.lines(folder)
    values = merge(read_yaml(folder / "config.yaml"), {"run": {"resume": True, "steps": 6}})
    with pytest.raises(ValueError, match=told):
        loop.train(load_config("sft", merge(values, changes)))
    assert chatmodel.lines(folder) == before


# Options of the loop


def test_layout_does_not_change_a_run(runs, chat_models, tmp_path):
    """Micro-batches and another mesh: the same figures as the plain run on 8 × 1."""
    changes = merge(SPREAD, held_out(tmp_path, "sft"))
    split = run("sft", chat_models, tmp_path / "run", changes, micro_batches=2, checkpoint=False)
    for ours, theirs in zip(split.history, runs("sft").history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert split.after == pytest.approx(runs("sft").after, rel=1e-4)
    assert not (split.folder / "checkpoints").exists()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_reach_the_step(chat_models, tmp_path, monkeypatch, algorithm):
    """The results are the same with and without, so this looks at what the step is built with."""
    given = []
    room = getattr(algorithms, algorithm)
    make = room.make_step

    def spying(*arguments, micro_batches, **options):
        given.append(micro_batches)
        return make(*arguments, micro_batches=micro_batches, **options)

    monkeypatch.setattr(room, "make_step", spying)
    values = chatmodel.settings(algorithm, chat_models, tmp_path / "run", micro_batches=2)
    tasks.make_task(load_config(algorithm, merge(values, SPREAD)))
    assert given == [2]


@pytest.mark.parametrize("head", ["pretrained", "zero"])
def test_the_critic_starts_from_the_reward_model_with_or_without_its_head(
    chat_models, tmp_path, head
):
    values = chatmodel.settings("ppo", chat_models, tmp_path / "run")
    task = tasks.make_task(load_config("ppo", values | {"critic_head": head}))
    _, scorer = jaxalign.load_pretrained(chat_models / "scorer")
    critic, scorer = chatmodel.leaves(task.state.params["critic"]), chatmodel.leaves(scorer)
    if head == "zero":
        scorer["['score']['kernel']"] = np.zeros((32, 1), np.float32)
    assert critic.keys() == scorer.keys()
    for name, value in scorer.items():
        np.testing.assert_array_equal(critic[name], value)


def test_keep_says_how_many_checkpoints_stay(chat_models, tmp_path):
    result = run("sft", chat_models, tmp_path / "run", save_every=1, keep=2, export=False)
    assert result.model is None
    assert not (result.folder / "model").exists()
    kept = [path.name for path in (result.folder / "checkpoints").iterdir() if path.is_dir()]
    assert sorted(kept) == ["3", "4"]


def test_without_steps_the_data_ends_the_run(chat_models, tmp_path):
    changes = {"data": {"epochs": 2}}
    options = {"steps": None, "checkpoint": False, "export": False}
    result = run("sft", chat_models, tmp_path / "run", changes, **options)
    assert len(result.history) == 3  # 2 epochs of 12 rows are 3 batches of 8
    trained = sum(row["weight/nll"] for row in result.history)
    assert trained == 2 * 12 * 4  # "ok" and a letter, and the end of turn


def test_an_endless_epoch_needs_steps(chat_models, tmp_path):
    with pytest.raises(ValueError, match=r"run\.steps=None.*data\.epochs is null"):
        run("sft", chat_models, tmp_path / "run", steps=None)


def test_a_loss_that_is_no_number_stops_the_run(chat_models, tmp_path):
    changes = {"optimizer": {"learning_rate": 1e30}}
    with pytest.raises(FloatingPointError, match=r"step 4: .*loss=.*lower learning rate"):
        run("sft", chat_models, tmp_path / "run", changes, checkpoint=False)
    rows = chatmodel.lines(tmp_path / "run")
    assert [row["bad_steps"] for row in rows] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "send 1, send 2, read 1, send 3, read 2, send 4, read 3, read 4"),
        # What is saved was found sound before.
        ({"save_every": 3}, "send 1, send 2, read 1, send 3, read 2, read 3, send 4, read 4"),
        ({"eval_every": 2}, "send 1, send 2, read 1, read 2, send 3, send 4, read 3, read 4"),
    ],
    ids=["plain", "saved", "judged"],
)
def test_the_next_step_is_sent_before_metrics_are_read(
    chat_models, tmp_path, monkeypatch, options, wanted
):
    """Else the devices would wait for the loop between steps."""
    events = []
    make, check = loop.make_task, reporter.check_finite

    def make_task(config):
        task = make(config)

        def prepare_updates(*given):
            events.append(f"send {sum(event.startswith('send') for event in events) + 1}")
            return task.prepare_updates(*given)

        return task._replace(prepare_updates=prepare_updates)

    def check_finite(metrics, step):
        events.append(f"read {step}")
        check(metrics, step)

    monkeypatch.setattr(loop, "make_task", make_task)
    monkeypatch.setattr(reporter, "check_finite", check_finite)
    changes = held_out(tmp_path, "sft")
    run("sft", chat_models, tmp_path / "run", changes, steps=4, export=False, **options)
    assert ", ".join(events) == wanted


# LoRA


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo"])
def test_lora_trains_adapters_only_and_exports_them_merged(
    tmp_path, chat_models, monkeypatch, algorithm
):
    """The difference of each adapted kernel has the adapters' rank; all else stays bit for bit."""
    kept = {}
    make = loop.make_task

    def spying(config):
        task = make(config)
        kept["trained"] = set(chatmodel.leaves(task.state.params))
        kept["moments"] = sum(x.size for x in jax.tree.leaves(task.state.opt_state))
        return task

    monkeypatch.setattr(loop, "make_task", spying)
    changes = {"model": {"lora": {"rank": 2, "targets": ["query", "down"]}}}
    changes["optimizer"] = {"learning_rate": 0.03}
    changes |= held_out(tmp_path, algorithm)
    result = run(algorithm, chat_models, tmp_path / "run", changes, checkpoint=False)

    names = {f"['blocks']['{part}']['{name}']" for part, name in
             (("attention", "query"), ("mlp", "down"))}  # fmt: skip
    adapters = {f"{name}['{side}']" for name in names for side in ("lora_a", "lora_b")}
    head = {"['score']['kernel']"} if algorithm == "reward" else set()
    assert kept["trained"] == adapters | head
    # Two moments of A [L, in, r] and B [L, r, out] of both projections, and a few counters.
    values = 2 * 2 * (32 + 32 + 48 + 32) + (32 if head else 0)
    assert 2 * values <= kept["moments"] < 2 * values + 10

    _, start = jaxalign.load_pretrained(chat_models / "chat")
    _, end = jaxalign.load_pretrained(result.model)
    start, end = chatmodel.leaves(start), chatmodel.leaves(end)
    assert end.keys() - head == start.keys() - ({"['head']['kernel']"} if head else set())
    for name in end.keys() - head:
        difference = end[name] - start[name]
        if name.removesuffix("['kernel']") in names:
            for layer in difference.astype(np.float64):
                sizes = np.linalg.svd(layer, compute_uv=False)
                assert sizes[0] > 1e-3
                assert sizes[2] < 1e-3 * sizes[1]
        else:
            assert not difference.any(), name

    # The merged model says what the adapted one said.
    metric = {"sft": "loss/nll", "reward": "margin", "dpo": "logps/chosen"}[algorithm]
    check = {"model": {"source": str(result.model)}, "data": changes["data"]}
    options = {"steps": 1, "checkpoint": False, "export": False}
    merged = run(algorithm, chat_models, tmp_path / "merged", check, **options)
    assert merged.before[metric] == pytest.approx(result.after[metric], rel=1e-3, abs=1e-4)
    assert result.after[metric] != pytest.approx(result.before[metric], rel=1e-2)


# Exporting a checkpoint


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_exported_checkpoint_is_the_runs_own_model(runs, tmp_path, algorithm):
    result = runs(algorithm)
    assert export.export_run(str(result.folder), str(tmp_path / "newest")).step == 4
    assert chatmodel.weights(tmp_path / "newest") == chatmodel.weights(result.model)
    if algorithm == "sft":
        assert export.export_run(str(result.folder), str(tmp_path / "older"), step=2).step == 2
        assert chatmodel.weights(tmp_path / "older") != chatmodel.weights(result.model)


def test_the_critic_of_a_run_is_exported_as_a_scorer(runs, chat_models, tmp_path, capsys):
    folder, out = str(runs("ppo").folder), tmp_path / "critic"
    assert cli.main(["export", folder, "--out", str(out), "--part", "critic"]) == 0
    model, _ = load_pretrained(out)
    assert isinstance(model, Scorer)
    start = load_file(chat_models / "scorer/model.safetensors")
    trained = load_file(out / "model.safetensors")
    assert trained.keys() == start.keys()
    assert np.any(trained["score.weight"] != start["score.weight"])  # updates moved it
    # The table: every tensor once, bytes adding up to what is in the file.
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["tensors", "shape", "dtype", "bytes"]
    name = "model.layers.{0…1}.mlp.down_proj.weight"
    assert [name, "2", "×", "[32×48]", "float32", "12,288"] in lines
    total = sum(value.nbytes for value in trained.values())
    assert [str(len(trained)), "in", "all", "float32", f"{total:,}"] in lines
    assert sum(int(line[-1].replace(",", "")) for line in lines[1:-2]) == total


def test_an_export_has_the_dtype_asked_for(runs, tmp_path):
    folder = str(runs("sft").folder)
    export.export_run(folder, str(tmp_path / "half"), dtype="bfloat16")
    export.export_run(folder, str(tmp_path / "whole"))
    half = load_file(tmp_path / "half/model.safetensors")
    for name, value in load_file(tmp_path / "whole/model.safetensors").items():
        assert value.dtype == np.float32  # as the model that the run started from
        assert half[name].dtype.name == "bfloat16"
        assert half[name].tobytes() == value.astype(half[name].dtype).tobytes()
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_exported_is_named(runs, tmp_path):
    folder = str(runs("sft").folder)
    with pytest.raises(ValueError, match=r"part='critic': checkpoint 4 of .* has one model only"):
        export.export_run(folder, str(tmp_path / "out"), part="critic")
    with pytest.raises(ValueError, match=r"no checkpoint 99 in .*there are: 2, 4"):
        export.export_run(folder, str(tmp_path / "out"), step=99)
    with pytest.raises(ValueError, match=r"no config\.yaml in it"):
        export.export_run(str(tmp_path), str(tmp_path / "out"))


# Models that do not belong together


def test_a_tokenizer_of_another_model_is_refused(chat_models, tmp_path):
    bigger = chatmodel.make_tokenizer()
    bigger.add_tokens(["<extra>"])
    bigger.save_pretrained(tmp_path / "tok")
    changes = {"model": {"tokenizer": str(tmp_path / "tok")}}
    # One token more than rows is taken, unless it occurs.
    row = {"prompt": "an <extra>", "completion": "one"}
    data = chatmodel.write_rows(tmp_path / "extra.jsonl", [row] * 8)
    with pytest.raises(ValueError, match=r"the token 260 \('<extra>'\).*do not belong together"):
        run("sft", chat_models, tmp_path / "run", merge(changes, {"data": {"train": [data]}}))
    bigger.add_tokens([f"<extra{n}>" for n in range(20)])
    bigger.save_pretrained(tmp_path / "tok")
    with pytest.raises(ValueError, match=r"281 tokens.*only 260.*do not belong together"):
        run("sft", chat_models, tmp_path / "run", changes)


def test_models_of_the_wrong_kind_are_refused(chat_models, tmp_path):
    chat, scorer = str(chat_models / "chat"), str(chat_models / "scorer")
    for algorithm, changes, told in (
        ("ppo", {"reward_model": chat}, "language model without a score"),
        ("ppo", {"critic": chat}, "language model without a score"),
        ("ppo", {"reference": scorer}, "is a reward model; wanted a language model"),
        ("dpo", {"reference": scorer}, "is a reward model; wanted a language model"),
        ("sft", {"model": {"source": scorer}}, "is a reward model"),
        ("dpo", {"model": {"source": scorer}}, "is a reward model"),
        ("ppo", {"model": {"source": scorer}}, "is a reward model"),
        ("reward", {"model": {"source": scorer, "lora": {}}}, "start from a language model"),
    ):
        with pytest.raises(ValueError, match=told):
            run(algorithm, chat_models, tmp_path / "run", changes)


# Mixtures, held-out parts, streams


def _mixture(tmp_path, **data):
    """Two sources of conversations, one of them three times as often."""
    rows = chatmodel.ROWS["sft"]
    paths = [chatmodel.write_rows(tmp_path / f"{name}.jsonl", part)
             for name, part in (("first", rows[:6]), ("second", rows[6:]))]  # fmt: skip
    sources = [{"path": path, "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)]
    return {"data": {"train": sources} | data}


def test_a_mixture_logs_each_source_and_holds_rows_out(chat_models, tmp_path):
    changes = _mixture(tmp_path, validation=2, buckets=[16])
    result = run("sft", chat_models, tmp_path / "run", changes, checkpoint=False, export=False)
    for row in result.history:
        assert row["nll/first"] > 0
        assert row["share/first"] + row["share/second"] == pytest.approx(1)
        whole = sum(row[f"share/{s}"] * row[f"nll/{s}"] for s in ("first", "second"))
        assert whole == pytest.approx(row["loss"], rel=1e-5)
        assert 0.1 < row["data/fill"] <= 1
    assert 0.1 < np.mean([row["share/first"] for row in result.history]) < 0.45
    assert result.before["loss/nll"] > result.after["loss/nll"] > 0


def test_a_streamed_run_resumes_as_if_it_had_not_stopped(chat_models, tmp_path):
    changes = _mixture(tmp_path, streaming=True, window=4, packing=True)
    straight = run("sft", chat_models, tmp_path / "straight", changes, export=False, save_every=2)
    folder = tmp_path / "stopped"
    shutil.copytree(straight.folder, folder)
    shutil.rmtree(folder / "checkpoints/4")
    rest = run("sft", chat_models, folder, changes, export=False, resume=True)
    assert rest.history == straight.history[2:]
