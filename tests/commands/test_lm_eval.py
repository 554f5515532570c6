"""lm-eval on our model gives what its own `hf` model gives on the exported folder."""

import itertools
import json

import chatmodel
import pytest

from jaxalign.commands import cli
from jaxalign.commands.eval.harness import check_harness
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytest.importorskip("accelerate")

CHOICE = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = {"letters": CHOICE, "texts": ROLLING, "answers": ANSWERS}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    words = ("one", "two", "a blue sea", "no", "yes", "what?", "x y z", "night", "9", "end")
    rows = [
        {
            "question": f"{a} and",
            "choices": [b, words[i - 3], words[i - 5]],
            "gold": i % 3,
            "text": " ".join(words[i:]) + " " + a,
        }
        for i, (a, b) in enumerate(itertools.pairwise(words))
    ]
    file = chatmodel.write_rows(folder / "rows.jsonl", rows)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return folder


def test_the_same_as_on_the_exported_folder(chat_models, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, out = str(chat_models / "chat"), tmp_path / "out.json"
    command = ["eval", model, "--tasks", ",".join(TASKS), "--include-path", str(tasks)]
    command += ["--length", "48", "--batch", "4", "--out", str(out)]  # texts have several windows
    assert cli.main(command) == 0
    ours = json.loads(out.read_text())["results"]
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32", "max_length": 48, "device": "cpu"},
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)),
        batch_size=4,
        log_samples=True,
    )
    compared = 0
    for name in TASKS:
        for key, value in theirs["results"][name].items():
            metric = key.partition(",")[0]
            if not key.endswith(",none") or metric.endswith("_stderr"):
                continue
            assert ours[name]["figures"][metric]["value"] == pytest.approx(value, rel=1e-4), key
            compared += 1
    assert compared == 5
    # Nothing is compared with nothing: they differ between rows.
    values = [sample["filtered_resps"][0] for sample in theirs["samples"]["letters"]]
    assert len({value[0] for value in values}) > 5
    assert ours["letters"]["figures"]["acc"]["count"] == 9


def test_an_unknown_task_is_named(chat_models, tasks, capsys):
    command = ["eval", str(chat_models / "chat"), "--tasks", "no-such-task"]
    assert cli.main([*command, "--include-path", str(tasks)]) == 2
    assert "lm-eval has no no-such-task" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jaxalign\[eval\]"'):
        check_harness()


def test_a_run_measures_it_at_every_evaluation(chat_models, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = {"task": "letters", "include_path": str(tasks), "length": 48}
    options = {"eval_every": 1, "eval_tasks": [task]}
    values = chatmodel.settings("sft", chat_models, tmp_path / "run", steps=2, **options)
    values["data"]["eval"] = []
    loop.train(load_config("sft", values))
    found = {
        row["step"]: row["eval/letters/acc_norm"]
        for row in chatmodel.lines(tmp_path / "run")
        if "eval/letters/acc_norm" in row
    }
    assert found.keys() == {0, 1, 2}
    out = tmp_path / "out.json"
    command = ["eval", str(tmp_path / "run/model"), "--tasks", "letters", "--length", "48"]
    assert cli.main([*command, "--include-path", str(tasks), "--out", str(out)]) == 0
    assert (
        found[2]
        == json.loads(out.read_text())["results"]["letters"]["figures"]["acc_norm"]["value"]
    )
