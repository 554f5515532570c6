"""Nothing that a person or another run made is overwritten unless they say so: the matrix."""

import re
import shutil

import chatmodel
import pytest
import yaml

from jaxalign.commands import cli
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture(scope="module")
def made(chat_models, tmp_path_factory):
    """A finished run in `run`, its YAML beside it."""
    folder = tmp_path_factory.mktemp("made")
    values = chatmodel.settings("sft", chat_models, folder / "run", steps=1)
    (folder / "sft.yaml").write_text(yaml.safe_dump(values))
    loop.train(load_config("sft", folder / "sft.yaml"))
    return folder


@pytest.fixture
def place(made, chat_models, tmp_path):
    """Copies of the run (`run`) and of a model (`chat`), and files of a person's."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "sft.yaml", tmp_path / "sft.yaml")
    shutil.copytree(chat_models / "chat", tmp_path / "chat")
    shutil.copytree(chat_models / "scorer", tmp_path / "scorer")
    for name in ("mine", "notes", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes/thesis.tex").write_text("precious")
    shutil.copytree(tmp_path / "run/model", tmp_path / "other/model")
    config = yaml.safe_load((made / "sft.yaml").read_text())
    config["run"]["folder"] = str(tmp_path / "mine")
    (tmp_path / "mine/config.yaml").write_text("# my notes\n" + yaml.safe_dump(config))
    chatmodel.write_rows(tmp_path / "pairs.jsonl", chatmodel.PAIRS)
    chatmodel.write_rows(tmp_path / "scores.jsonl", [{"mine": 1}])
    return tmp_path


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


SFT = "sft {}/sft.yaml run.folder={}/"
# What is refused, and what the message names. {} is the place.
REFUSED = {
    "a finished run": (SFT + "run", r"holds checkpoints, model, run\.json.*run\.resume=true"),
    "a finished run, without checkpoints": (
        SFT + "run run.checkpoint=false", r"holds checkpoints, model.*--overwrite"),
    "a model": (SFT + "other", r"holds model; these are of an earlier run"),
    "a configuration of one's own": (
        "sft {}/mine/config.yaml", r"holds a config\.yaml that no run wrote.*another name"),
    "a model that is its own source": (
        SFT + "other model.source={}/other/model", r"other/model' is read from there"),
    "the same, overwriting": (
        SFT + "other model.source={}/other/model --overwrite", r"other/model' is read from there"),
    "the same, resuming": (
        SFT + "run model.source={}/run/model run.resume=true", r"run/model' is read from there"),
    "data that would be replaced": (
        SFT + "run data.train={}/run/metrics.jsonl --overwrite", r"metrics.jsonl' is read from"),
    "a file as the folder": (SFT + "sft.yaml", r"sft\.yaml': it is a file; wanted a folder"),
    "a folder below a file": (SFT + "sft.yaml/a/b", r"sft\.yaml is a file; wanted a folder"),
    "an address": ("sft {}/sft.yaml run.folder=ftps://box/run", r"ftps:// is neither read nor"),
    "an address of data": (
        SFT + "new data.train=https://b/x.jsonl", r"data='https://.*https:// is neither"),
    "an address of a model": (
        SFT + "new model.source=ftps://b/x", r"model='ftps://.*ftps:// is neither"),
    "resuming and overwriting": (
        SFT + "run run.resume=true --overwrite", r"run\.overwrite=True: wanted false"),
    "export over a model": (
        "export {}/run --out {}/chat", r"--out='.*chat' holds .*config\.json.*--overwrite"),
    "export over notes": ("export {}/run --out {}/notes", r"holds thesis\.tex"),
    "export over notes, overwriting": (
        "export {}/run --out {}/notes --overwrite", r"holds thesis\.tex, which a saved model"),
    "export to an address": ("export {}/run --out gs://b/m", r"--out='gs://b/m'.*gs:// is neither"),
    "import over a model": ("import {}/chat --out {}/scorer", r"--out='.*scorer' holds"),
    "import over itself": (
        "import {}/chat --out {}/chat --overwrite", r"chat' is read from there"),
    "import to an address": ("import {}/chat --out s3://b/m", r"s3:// is neither"),
    "a report over notes": (
        "report {}/run --out {}/notes/thesis.tex", r"no page of `jaxalign report`.*--overwrite"),
    "scores over a file": (
        "score {}/scorer {}/pairs.jsonl --out {}/scores.jsonl", r"scores\.jsonl' exists;"),
    "scores over what is scored": (
        "score {}/scorer {}/pairs.jsonl --out {}/pairs.jsonl --overwrite", r"is read from there"),
    "scores to an address": (
        "score {}/scorer {}/pairs.jsonl --out gs://b/s.jsonl", r"gs:// is neither"),
    "rows of synth over a file": (
        "synth {}/synth.yaml out={}/scores.jsonl", r"no scores\.jsonl\.journal beside it"),
    "rows of synth to an address": ("synth {}/synth.yaml out=gs://b/x.jsonl", r"gs:// is neither"),
    "a pipeline over runs": (
        "pipeline {}/pipeline.yaml folder={}", r"run' holds checkpoints, model"),
    "a pipeline to an address": ("pipeline {}/pipeline.yaml folder=ftps://b/p", r"ftps:// is"),
}  # fmt: skip

SYNTH = """
out: x
instruct: {seeds: ["${examples}/seed_tasks.jsonl"], count: 1}
writer: {model: none, server: {address: "http://127.0.0.1:9/v1", key_variable: NO_KEY}}
"""


@pytest.mark.parametrize(("command", "told"), REFUSED.values(), ids=REFUSED)
def test_what_is_there_stays(place, capsys, monkeypatch, command, told):
    monkeypatch.setenv("NO_KEY", "none")
    (place / "synth.yaml").write_text(SYNTH)
    stage = yaml.safe_load((place / "sft.yaml").read_text())
    stage |= {"name": "run", "algorithm": "sft"}
    del stage["run"]["folder"]
    (place / "pipeline.yaml").write_text(yaml.safe_dump({"folder": "x", "stages": [stage]}))
    before = snapshot(place)
    status = cli.main([part.replace("{}", str(place)) for part in command.split()])
    error = capsys.readouterr().err
    assert status == 2, error
    assert re.search(told, error), error
    assert snapshot(place) == before
    assert not (place / "new").exists()


def run(place, command):
    return cli.main([part.replace("{}", str(place)) for part in command.split()])


def test_overwriting_replaces_the_run_and_nothing_else(place, capsys):
    (place / "run/notes.txt").write_text("mine")
    (place / "run/config.yaml").write_text("# edited by hand\n")
    before = snapshot(place / "run")
    assert run(place, SFT + "run run.seed=3 run.steps=2 run.export=false --overwrite") == 0
    after = snapshot(place / "run")
    assert after["notes.txt"] == b"mine"
    assert after["config.before.yaml"] == b"# edited by hand\n"
    assert "kept as config.before.yaml" in capsys.readouterr().out
    assert not any(name.startswith("model/") for name in after)
    assert after["metrics.jsonl"] != before["metrics.jsonl"]
    assert [row["step"] for row in chatmodel.lines(place / "run")] == [1, 2]
    assert {name.split("/")[1] for name in after if name.startswith("checkpoints/")} == {"2"}


def test_a_mistake_does_not_remove_what_was_to_be_overwritten(place, capsys):
    before = snapshot(place / "run")
    assert run(place, SFT + "run data.train={}/absent.jsonl --overwrite") == 2
    assert "absent.jsonl" in capsys.readouterr().err
    assert snapshot(place / "run") == before


def test_exports_imports_and_scores_replace_what_they_may(place):
    old = chatmodel.weights(place / "chat")
    assert run(place, "export {}/run --out {}/chat --overwrite") == 0
    assert chatmodel.weights(place / "chat") == chatmodel.weights(place / "run/model") != old
    assert run(place, "import {}/chat --out {}/scorer --overwrite") == 0
    assert (place / "scorer/params").is_dir()


def test_home_is_expanded_wherever_a_run_writes(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    options = "run.steps=1 run.export=false data.train=~/rows.jsonl model.source=~/chat"
    chatmodel.write_rows(place / "rows.jsonl", chatmodel.CONVERSATIONS)
    assert run(place, "sft {}/sft.yaml run.folder=~/new " + options) == 0
    assert (place / "new/checkpoints/1").is_dir()
    assert run(place, "export ~/new --out ~/exported") == 0
    assert (place / "exported/model.safetensors").is_file()
    assert not (place / "~").exists()
