"""The commands of README and docs run as printed, in order, in a folder of small files.

The folder holds what the pages take for granted: `configs/` in a small form, models, data. What is
typed is what is printed.
"""

import itertools
import pathlib
import shutil

import blocks
import chatmodel
import pytest
import test_blocks
import yaml

from jaxalign.commands import cli

pytestmark = pytest.mark.usefixtures("kept_programs")

# Commands that are not run here, and what runs them.
ELSEWHERE = {
    "plan": "needs the compilers of TPUs and GPUs: tests/plan runs it for CPUs",
    "bench": "takes minutes: tests/test_bench.py runs smaller sizes",
    "quickstart": "needs a real model: tests/commands/test_quickstart.py",
    "synth": "needs a server: tests/commands/test_synth.py runs it against one",
    "sft configs/sft.yaml": "two processes at once: tests/parallel/test_multihost.py",
    "data CONFIG [key=value …] [--as sft] [--examples 3] [--batches N] [--html page.html]": "form",
}

# Parts of lines that are not run here, and what runs such lines.
PARTS = {
    "owner/": "a model of the hub: tests/commands/test_adapter_commands.py",
    "exports/": "adapters: tests/commands/test_adapter_commands.py",
    "gs://": "a bucket: tests/run/test_remote_runs.py",
    "--tasks": "needs lm-eval: tests/commands/test_lm_eval.py",
    "run.trackers": "needs the trackers: tests/run/test_tracker_packages.py",
}


def printed():
    """(page, command line) of every `jaxalign …` in README and docs, in order."""
    for block in blocks.BLOCKS:
        if block.language == "bash":
            for words in test_blocks.commands_of(block.code):
                command = list(itertools.dropwhile(lambda word: "=" in word, words))  # variables
                if command[:1] == ["jaxalign"]:
                    yield block.name.partition(":")[0], command[1:]


def reason(words):
    """Why a command is not run here; an exception names a command, a part, or a whole line."""
    line = " ".join(words)
    part = next((found for part, found in PARTS.items() if part in line), "")
    return part or next((ELSEWHERE[start] for start in (words[0], line) if start in ELSEWHERE), "")


def small_configs(chat_models, folder):
    """`configs/*.yaml` with the folders and sources of the real ones, and small numbers."""
    configs = folder / "configs"
    configs.mkdir()
    for algorithm, rows in chatmodel.ROWS.items():
        real = yaml.safe_load((blocks.ROOT / f"configs/{algorithm}.yaml").read_text("utf-8"))
        values = chatmodel.settings(algorithm, chat_models, folder / "data" / algorithm, steps=1)
        chatmodel.write_rows(folder / "data" / f"{algorithm}-{algorithm}.jsonl", rows * 8)
        values.setdefault(algorithm, {})  # the section that tells the algorithm
        values["run"]["folder"] = real["run"]["folder"]
        if algorithm != "sft":  # SFT starts from a hub id; the others from what came before
            values["model"]["source"] = real["model"]["source"]
        if "reward_model" in real:
            values["reward_model"] = real["reward_model"]
        (configs / f"{algorithm}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    stage = chatmodel.settings("sft", chat_models, folder / "data" / "stage", steps=1)
    del stage["run"]["folder"]
    stages = {"folder": "runs/pipeline", "stages": [stage | {"name": "sft", "algorithm": "sft"}]}
    (configs / "pipeline.yaml").write_text(yaml.safe_dump(stages), encoding="utf-8")
    chatmodel.write_rows(folder / "pairs.jsonl", chatmodel.PAIRS)
    (folder / "trl-sft.yaml").write_text("packing: true\nlearning_rate: 1.0e-5\n", encoding="utf-8")
    (folder / "args.json").write_text('{"beta": 0.1, "max_length": 512}', encoding="utf-8")
    for name in ("answers.jsonl", "reward-bench.jsonl"):
        chatmodel.write_rows(folder / name, chatmodel.PAIRS)
    chatmodel.write_rows(folder / "held-out.jsonl", chatmodel.CONVERSATIONS)
    chatmodel.write_rows(folder / "prompts.jsonl", chatmodel.PROMPTS)
    choice = {"question": "1+1", "choices": ["two", "3"], "answer": 0}
    chatmodel.write_rows(folder / "arc.jsonl", [choice])
    chatmodel.write_rows(folder / "gsm8k-test.jsonl", [{"question": "1+1", "answer": "#### 2"}])
    (folder / "runs/synth").mkdir(parents=True)
    chatmodel.write_rows(folder / "runs/synth/tasks.jsonl", chatmodel.CONVERSATIONS)
    # A source is a folder or a file; this one is a folder under the file's name.
    shutil.copytree(chat_models / "chat", folder / "model.gguf")


def test_no_command_escapes():
    lines = list(printed())
    assert len(lines) > 25
    names = {words[0] for _, words in lines}
    assert names >= {command.name for command in cli.commands()} - {"quickstart"}
    for start in ELSEWHERE:  # each exception is still needed
        assert any(start in (words[0], " ".join(words)) for _, words in lines), start


@pytest.mark.slow
def test_they_run(chat_models, tmp_path, monkeypatch, capsys):
    small_configs(chat_models, tmp_path)
    monkeypatch.chdir(tmp_path)
    inputs = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(inputs))
    seen = set()
    for page, words in printed():
        if reason(words) or tuple(words) in seen:  # a second time its folder would not be free
            continue
        seen.add(tuple(words))
        words = ["hi" if word == "…" else word for word in words]
        try:
            status = cli.main(words)
        except SystemExit as end:  # of --help
            status = end.code
        assert status == 0, f"{page}: jaxalign {' '.join(words)}\n{capsys.readouterr().err}"
    for made in ("sft.yaml", "page.html", "out/config.json", "orbax/params", "scored.jsonl"):
        assert pathlib.Path(made).exists()
    assert {path.parent.name for path in pathlib.Path("runs").glob("*/model")} == {
        *("sft", "second", "dft", "reward", "scorer", "dpo", "ipo", "dpo_sft"),
        *("kto", "kto_weighted", "ppo", "ppo_target", "mine"),
    }
