"""The commands, called as a user calls them."""

import io
import json
import pathlib
import re
import subprocess
import sys

import chatmodel
import jax
import pytest
import yaml

import jaxalign
from jaxalign.commands import cli

pytestmark = pytest.mark.usefixtures("kept_programs")

COMMANDS = [
    *("sft", "reward", "dpo", "kto", "ppo", "pipeline", "quickstart", "init", "options"),
    *(
        "convert-trl",
        "generate",
        "score",
        "chat",
        "eval",
        "export",
        "import",
        "fetch",
        "plan",
        "bench",
        "report",
    ),
    *("data", "explain", "verify", "synth", "doctor", "completion"),
]


def write_config(path, values):
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("module", ["jaxalign", "jaxalign.commands.cli"])
def test_as_a_module_it_lists_its_commands(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\b", done.stdout, re.MULTILINE), command
    assert done.stderr == ""


def test_the_table_has_every_command_once():
    assert [command.name for command in cli.commands()] == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: jaxalign {name}" in capsys.readouterr().out


def test_as_a_module_wrong_input_is_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxalign.commands.cli", "sft", str(tmp_path / "absent.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"jaxalign sft: error: config '{tmp_path / 'absent.yaml'}': no such file; "
    )


@pytest.mark.parametrize(
    "arguments", [[], ["sfft"], ["sft"], ["export", "folder"], ["quickstart", "--language", "fr"]]
)
def test_a_wrong_command_line_is_explained(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: jaxalign")


def test_sft_then_export_then_generate(chat_models, tmp_path, capsys):
    folder = tmp_path / "run"
    values = chatmodel.settings("sft", chat_models, folder)
    values["data"]["eval"] = values["data"]["train"]
    config = write_config(tmp_path / "sft.yaml", values)

    assert cli.main(["sft", config, "run.steps=2", "run.save_every=1"]) == 0
    output = capsys.readouterr().out
    rows = chatmodel.lines(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    first, last = rows[0]["eval/loss/nll"], rows[-1]["eval/loss/nll"]
    assert f"held out: loss/nll {last:.4g} (at the start {first:.4g})" in output
    assert f"run folder: {folder}" in output
    assert f"model: {folder / 'model'}" in output

    out = tmp_path / "exported"
    assert cli.main(["export", str(folder), "--out", str(out), "--step", "2"]) == 0
    assert "checkpoint 2 of" in capsys.readouterr().out
    assert chatmodel.weights(out) == chatmodel.weights(folder / "model")

    model, params = jaxalign.load_pretrained(out)
    tok = jaxalign.load_tokenizer(out)
    expected = jaxalign.generate(model, params, tok, ["hi"], max_new_tokens=5, temperature=0.0)
    command = ["generate", str(out), "hi", "--max-new-tokens", "5", "--temperature", "0"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"> hi\n{expected[0]}\n\n"


def test_sampling_flags_are_the_options_of_generate(chat_models, monkeypatch, capsys):
    """A new option of the function is a new flag of both commands, with its type and help."""
    passed = []

    def generate(
        model, params, tok, prompts, *, max_new_tokens: "int" = 64, min_p: "float" = 0.0, key=None
    ):
        """Answers prompts.

        Args:
          max_new_tokens: longest answer.
          min_p: keep tokens of at least this
            share of the largest probability.
          key: PRNG key.
        """
        passed.append((max_new_tokens, min_p, key))
        return ["answer" for _ in prompts]

    monkeypatch.setattr(sys.modules["jaxalign.sampling.generate"], "generate", generate)
    model = str(chat_models / "chat")
    assert cli.main(["generate", model, "hi", "--min-p", "0.25", "--seed", "3"]) == 0
    assert passed == [(128, 0.25, jax.random.key(3))]
    for command in ("generate", "chat"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "--min-p MIN_P keep tokens of at least this share of the largest probability" in text
        assert "--top-k" not in text
    with pytest.raises(SystemExit):
        cli.main(["generate", model, "hi", "--min-p", "many"])
    assert "invalid float value: 'many'" in capsys.readouterr().err


def test_generate_reads_prompts_from_standard_input(chat_models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    command = ["generate", str(chat_models / "chat"), "--max-new-tokens", "5", "--seed", "1"]
    assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert re.findall(r"^> (.*)$", output, re.MULTILINE) == ["one", "two"]

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert cli.main(command) == 0
    assert capsys.readouterr().out == output  # the same seed
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert cli.main([*command[:-1], "2"]) == 0
    assert capsys.readouterr().out != output


def test_chat_remembers_the_conversation(chat_models, monkeypatch, capsys):
    seen = []

    def answer(model, params, tok, prompts, **options):
        seen.append(json.loads(json.dumps(prompts)))
        return [f"answer {len(seen)}"]

    inputs = iter(["hello", "again", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(inputs))
    # The package has a function of the module's name, so that only this finds the module.
    monkeypatch.setattr(sys.modules["jaxalign.sampling.generate"], "generate", answer)
    assert cli.main(["chat", str(chat_models / "chat")]) == 0
    assert "answer 1\nanswer 2\n" in capsys.readouterr().out
    assert seen[1] == [
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "answer 1"},
            {"role": "user", "content": "again"},
        ]
    ]


def test_pipeline_takes_overrides_by_stage(chat_models, tmp_path, capsys):
    stage = chatmodel.settings("sft", chat_models, tmp_path / "x")
    stage |= {"name": "only", "algorithm": "sft", "run": {"log_every": 100}}
    config = write_config(
        tmp_path / "pipeline.yaml", {"folder": str(tmp_path / "out"), "stages": [stage]}
    )
    assert cli.main(["pipeline", config, "only.run.steps=1", "only.run.seed=7"]) == 0
    assert f"only: {tmp_path / 'out' / 'only'}" in capsys.readouterr().out
    written = yaml.safe_load((tmp_path / "out" / "only" / "config.yaml").read_text())
    assert written["run"]["seed"] == 7
    assert len(chatmodel.lines(tmp_path / "out" / "only")) == 1


def test_a_diverged_run_ends_with_status_2(chat_models, tmp_path, capsys):
    config = write_config(
        tmp_path / "sft.yaml", chatmodel.settings("sft", chat_models, tmp_path / "run")
    )
    given = ["optimizer.learning_rate=1e30", "run.checkpoint=false"]
    assert cli.main(["sft", config, *given]) == 2
    error = capsys.readouterr().err
    assert re.search(r"^jaxalign sft: error: step 4: .*loss=", error, re.MULTILINE)
    assert "Traceback" not in error


def test_a_folder_that_is_a_file_is_named(chat_models, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    config = write_config(
        tmp_path / "sft.yaml", chatmodel.settings("sft", chat_models, tmp_path / "run")
    )
    assert cli.main(["sft", config]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "run") in error
    assert "Traceback" not in error


def test_a_traceback_is_there_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["sft", str(tmp_path / "absent.yaml")])


def test_interrupted_is_status_130(monkeypatch, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxalign.run.config.runs.load_config", interrupt)
    assert cli.main(["sft", str(tmp_path / "x.yaml")]) == 130
    assert capsys.readouterr().err == "interrupted\n"


CONFIGS = sorted(pathlib.Path(__file__).parents[2].glob("configs/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_recipes_are_valid(path):
    from jaxalign.commands.synth.config import load_synth
    from jaxalign.run.config.runs import RUNS, load_config
    from jaxalign.run.pipeline import load_stages

    algorithm = path.stem.partition("_")[0]  # reward_steps.yaml is for `jaxalign reward`
    if algorithm == "synth":
        load_synth(path)
    elif algorithm in RUNS:
        load_config(algorithm, path)
    else:
        assert load_stages(path)


def test_every_command_has_a_recipe():
    assert {path.stem for path in CONFIGS} >= {"sft", "reward", "dpo", "ppo", "pipeline"}
