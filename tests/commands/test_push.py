"""`jaxalign export --push` against a hub that only notes what it is told, and the model card."""

import json
import pathlib

import chatmodel
import huggingface_hub
import pytest
import yaml

from jaxalign.commands import cli
from jaxalign.commands.model_card import model_card
from jaxalign.commands.push import files_to_push


class Hub:
    """A hub of one repository: no network."""

    files: list[str] | None = None  # None: there is no repository
    fails = False

    def __init__(self):
        self.calls = []

    def repo_exists(self, name):
        self.calls.append(("exists", name))
        if self.fails:
            raise ConnectionError("no route")
        return self.files is not None

    def list_repo_files(self, name):
        return self.files

    def create_repo(self, name, *, private, exist_ok):
        assert exist_ok
        self.calls.append(("create", name, private))

    def create_commit(self, name, operations, *, commit_message):
        self.calls.append(("commit", name, {op.path_in_repo: op for op in operations}))
        return type("Done", (), {"repo_url": f"https://hub/{name}"})()


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def command(chat_models, out, *options):
    source = str(chat_models / "chat")
    return ["export", source, "--out", str(out), "--no-verify", "--push", "me/tiny", *options]


def test_an_adapter_is_pushed_for_peft_alone_or_beside_a_model(tmp_path):
    for name in ("hf", "peft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    places = {name: tmp_path / name for name in ("hf", "peft")}
    names = dict.fromkeys(places)
    assert files_to_push(places, names) == {
        "weights": tmp_path / "hf/weights",
        "peft/weights": tmp_path / "peft/weights",
    }
    assert files_to_push({"peft": tmp_path / "peft"}, names).keys() == {"weights"}
    note = {"weights": {"float32": 1}}
    for formats, library in (
        ({"peft": note}, "peft"),
        ({"hf": note, "peft": note}, "transformers"),
    ):
        card = model_card("me/tiny", "org/base", formats, step=1, scorer=False)
        assert f"library_name: {library}" in card


def test_all_formats_and_a_card_are_one_commit(chat_models, tmp_path, hub, capsys):
    out = tmp_path / "out"
    assert cli.main(command(chat_models, out, "--to", "hf", "gguf", "orbax")) == 0
    assert f"{out} → https://hub/me/tiny" in capsys.readouterr().out
    exists, create, (kind, name, operations) = hub.calls
    assert exists == ("exists", "me/tiny")
    assert create == ("create", "me/tiny", True)  # private
    assert (kind, name) == ("commit", "me/tiny")
    assert {"README.md", "config.json", "model.safetensors", "model-F16.gguf"} <= set(operations)
    assert {"tokenizer.json", "orbax/config.json", "orbax/params/_METADATA"} <= set(operations)
    for path, place in (("model.safetensors", "hf"), ("model-F16.gguf", "gguf")):
        sent = pathlib.Path(operations[path].path_or_fileobj)
        assert sent.read_bytes() == (out / place / path).read_bytes()
    card = operations["README.md"].path_or_fileobj.decode()
    assert "| gguf | 32,000 float16 + 160 float32 | – | not measured |" in card
    assert str(tmp_path) not in card
    assert str(chat_models) not in card


def test_a_public_repository_is_asked_for(chat_models, tmp_path, hub):
    hub.files = [".gitattributes"]  # a new one
    assert cli.main(command(chat_models, tmp_path / "out", "--public")) == 0
    assert hub.calls[1] == ("create", "me/tiny", False)


def test_what_is_in_a_repository_stays(chat_models, tmp_path, hub, capsys):
    hub.files = [".gitattributes", "README.md", "model.safetensors"]
    assert cli.main(command(chat_models, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "the repository holds README.md, model.safetensors; give another name" in error
    assert [call[0] for call in hub.calls] == ["exists"]
    assert not (tmp_path / "out").exists()  # asked before anything was written
    assert cli.main(command(chat_models, tmp_path / "out", "--overwrite")) == 0
    assert hub.calls[-1][0] == "commit"


def test_wrong_names_and_a_hub_that_does_not_answer(chat_models, tmp_path, hub, capsys):
    arguments = command(chat_models, tmp_path / "out")
    wrong = [*arguments[:-1], "tiny"]
    assert cli.main(wrong) == 2
    assert "--push='tiny': wanted OWNER/NAME" in capsys.readouterr().err
    hub.fails = True
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "the hub says no (ConnectionError: no route); log in with `hf auth login`" in error
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_a_run_has_its_data_settings_curves_and_figures(chat_models, tmp_path):
    folder = tmp_path / "run"
    values = chatmodel.settings("sft", chat_models, folder)
    values["model"]["source"] = "org/base@main"
    values["data"]["eval"] = ["org/questions:test"]
    values["sft"] = {}  # the section by which a run's own config.yaml tells the algorithm
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    rows = [{"step": 0, "eval/loss/nll": 2.5}]
    rows += [{"step": step, "loss": 2.0 / step, "grad_norm": 1.0} for step in range(1, 101)]
    rows.append({"step": 100, "eval/loss/nll": 0.75})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    note = {
        "weights": {"bfloat16": 1000},
        "unit": "nats",
        "verified": {"jaxalign": {"largest": 0.0123, "rejected": False}},
    }
    card = model_card("me/tiny", str(folder), {"hf": note}, step=100, scorer=False)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxalign", "sft"],
        "base_model": "org/base",
        "datasets": ["org/questions"],
    }
    assert "# tiny\n\nTrained by `jaxalign sft` from org/base@main, 100 steps." in body
    assert "| hf | 1,000 bfloat16 | jaxalign | 0.0123 nats |" in body
    assert "| data.train | run-sft.jsonl |" in body
    assert "| loss/nll | 2.5 | 0.75 | 100 |" in body
    curves = body[body.index("## Curves") : body.index("## Settings")].strip().splitlines()
    assert curves[2:5] == ["| step | loss | grad_norm |", "| --- | --- | --- |", "| 1 | 2 | 1 |"]
    assert curves[-1] == "| 100 | 0.02 | 1 |"
    assert 8 < len(curves) < 20
    settings = yaml.safe_load(body[body.index("```yaml\n") + 8 : body.rindex("```")])
    assert settings["optimizer"] == values["optimizer"]
    assert settings["run"]["folder"] == "run"  # no folder of this machine
    assert str(tmp_path) not in card


def test_addresses_of_servers_are_not_in_the_card(chat_models, tmp_path):
    folder = tmp_path / "run"
    values = chatmodel.settings("ppo", chat_models, folder)
    values["rewards"] = [{"kind": "http", "url": "http://secret.host:8000/score"}]
    del values["reward_model"]
    assert "ppo" in values
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    card = model_card("me/tiny", str(folder), {}, step=1, scorer=True)
    assert "(an address)" in card
    assert "secret" not in card
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == "text-classification"
