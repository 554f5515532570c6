"""Tasks measured during training: the figures of `jaxalign eval`, at the evaluation's steps."""

import json

import chatmodel
import pytest

from jaxalign.commands import cli
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import to_values

pytestmark = pytest.mark.usefixtures("kept_programs")

CHOICES = [
    {"question": q, "choices": ["yes", "no", "ok"], "answer": i % 3}
    for i, q in enumerate(chatmodel.QUESTIONS)
]
SUMS = [{"question": q, "answer": f"so #### {i}"} for i, q in enumerate(chatmodel.QUESTIONS[:3])]


def settings(algorithm, chat_models, folder, **run):
    """A run of 4 steps with two tasks and no held-out data; learning fast, so that figures move."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    choices = chatmodel.write_rows(folder.parent / "choices.jsonl", CHOICES)
    sums = chatmodel.write_rows(folder.parent / "sums.jsonl", SUMS)
    tasks = [
        {"task": "choice", "files": [choices], "name": "letters", "batch": 4, "length": 64},
        {"task": "gsm8k", "files": [sums], "max_new_tokens": 6, "limit": 2, "length": 64},
    ]
    rows = chatmodel.write_rows(folder.parent / "rows.jsonl", chatmodel.CONVERSATIONS)
    tasks.append({"task": "loss", "files": [rows], "name": "text", "batch": 8, "length": 64})
    run = {"eval_every": 2, "eval_tasks": tasks} | run
    values = chatmodel.settings(algorithm, chat_models, folder, **run)
    values["optimizer"]["learning_rate"] = 3e-2
    return values


def train(algorithm, values, *overrides):
    return loop.train(load_config(algorithm, values, overrides))


def evaluations(folder):
    return {
        row["step"]: {k: v for k, v in row.items() if k != "step"}
        for row in chatmodel.lines(folder)
        if any(k.startswith("eval/") for k in row)
    }


@pytest.fixture(scope="module")
def trained(chat_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "run"
    values = settings("sft", chat_models, folder)
    return values, train("sft", values)


NAMES = {
    *("eval/letters/accuracy", "eval/letters/accuracy_norm"),
    *("eval/gsm8k/strict", "eval/gsm8k/flexible"),
    *("eval/text/nll", "eval/text/perplexity"),
}


def test_figures_are_in_the_metrics_at_every_evaluation(trained):
    _, result = trained
    found = evaluations(result.folder)
    assert list(found) == [0, 2, 4]
    assert all(set(row) == NAMES for row in found.values())
    assert result.after == {name.removeprefix("eval/"): v for name, v in found[4].items()}


def test_they_are_those_of_the_command_on_the_exported_model(trained, tmp_path):
    values, result = trained
    choices, sums, rows = (task["files"][0] for task in values["run"]["eval_tasks"])
    out = tmp_path / "out.json"
    command = ["eval", str(result.model), "--choice", choices, "--gsm8k", sums, "--loss", rows]
    command += ["--length", "64", "--batch", "4", "--max-new-tokens", "6", "--out", str(out)]
    assert cli.main(command) == 0
    figures = json.loads(out.read_text())["results"]
    for name in ("accuracy", "accuracy_norm"):
        assert result.after[f"letters/{name}"] == figures["choice"]["figures"][name]["value"]
    loss = figures["loss"]["figures"]["nll"]["value"]
    assert result.after["text/nll"] == pytest.approx(loss, rel=1e-5)
    # The command measured all 3 rows, the run 2; a model of random weights knows none of them.
    assert figures["gsm8k"]["figures"]["strict"]["count"] == 3
    # What is measured is the policy of that step: training moved it.
    assert result.after["text/nll"] < 0.9 * result.before["text/nll"]


def test_killed_and_resumed_it_is_the_same(trained, chat_models, tmp_path):
    _, whole = trained
    values = settings("sft", chat_models, tmp_path / "run")
    train("sft", values, "run.steps=2", "run.export=false")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "eval/let')
    resumed = train("sft", values, "run.resume=true", "run.allow_changes=true")
    ours, theirs = evaluations(resumed.folder), evaluations(whole.folder)
    assert ours == theirs


def test_of_adapters_and_of_ppo_the_whole_policy_is_measured(chat_models, tmp_path):
    values = settings("ppo", chat_models, tmp_path / "ppo", steps=1, eval_every=1)
    values["model"]["lora"] = {"rank": 2}
    result = train("ppo", values, "run.checkpoint=false")
    out = tmp_path / "out.json"
    task = values["run"]["eval_tasks"][0]
    command = ["eval", str(result.model), "--choice", task["files"][0], "--length", "64"]
    assert cli.main([*command, "--batch", "4", "--out", str(out)]) == 0
    figure = json.loads(out.read_text())["results"]["choice"]["figures"]["accuracy"]
    assert result.after["letters/accuracy"] == figure["value"]


def test_a_task_of_lm_eval_without_the_package_names_the_extra(chat_models, tmp_path, monkeypatch):
    values = chatmodel.settings("sft", chat_models, tmp_path / "run", eval_tasks=["hellaswag"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run.eval_tasks needs lm-eval.*jaxalign\[eval\]"):
        train("sft", values)


def test_a_name_alone_is_a_section(chat_models, tmp_path):
    values = chatmodel.settings("sft", chat_models, tmp_path / "run", eval_tasks=["hellaswag"])
    tasks = to_values(load_config("sft", values))["run"]["eval_tasks"]
    assert [task["task"] for task in tasks] == ["hellaswag"]


@pytest.mark.parametrize(
    ("algorithm", "task", "message"),
    [
        ("sft", {"task": "gsm8k"}, r"files of gsm8k=\[\]: wanted files of rows"),
        ("sft", {"task": "hellaswag", "files": ["x"]}, r"files of hellaswag.*wanted no files"),
        ("sft", {"task": "gsm8k", "files": ["x"], "limit": 0}, r"limit=0: wanted positive"),
        ("sft", {"task": "loss", "files": ["x"]}, r"name of loss=None: wanted a name of its own"),
        (
            "sft",
            {"task": "ifeval", "files": ["x"], "num_fewshot": 3},
            r"num_fewshot=3: wanted null",
        ),
        ("sft", {"task": ""}, r"task='': wanted the name"),
        ("sft", {"task": "gsm8k", "file": ["x"]}, r"file: unknown key; did you mean"),
        ("reward", {"task": "arc"}, r"run.eval_tasks=\['arc'\]: wanted none"),
    ],
)
def test_wrong_tasks_are_refused(chat_models, tmp_path, algorithm, task, message):
    values = chatmodel.settings(algorithm, chat_models, tmp_path / "run", eval_tasks=[task])
    with pytest.raises(ValueError, match=message):
        load_config(algorithm, values)


def test_two_tasks_of_one_name_are_refused(chat_models, tmp_path):
    values = chatmodel.settings("sft", chat_models, tmp_path / "run", eval_tasks=["arc", "arc"])
    with pytest.raises(ValueError, match="wanted each task once"):
        load_config("sft", values)
