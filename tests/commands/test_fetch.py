"""`fetch`: what a run would download, once, from a stand-in for the hub."""

import json

import chatmodel
import pytest
import yaml

from jaxalign.commands import cli


@pytest.fixture
def hub(chat_models, monkeypatch):
    """Notes what is asked for; models are the tiny one, data has one row."""
    import datasets
    import huggingface_hub

    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, "*.safetensors" in allow_patterns or "config.json"))
        return str(chat_models / "chat")

    def load_dataset(name, **options):
        asked.append((name, options))
        return iter([{"prompt": "hi", "completion": "ok"}])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_models_and_data_are_fetched_once(hub, chat_models, tmp_path, capsys):
    values = chatmodel.settings("ppo", chat_models, tmp_path / "run")
    values["model"]["source"] = "org/policy@v2"
    values |= {"reference": "org/policy@v2", "critic": "policy", "reward_model": "org/judge"}
    values["data"]["train"] = ["org/prompts:train[:10]", "org/more:train"]
    values["data"]["eval"] = ["here.jsonl"]
    path = tmp_path / "ppo.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert cli.main(["fetch", "ppo", str(path)]) == 0
    told = capsys.readouterr().out
    assert {name for name, *_ in hub} == {"org/policy", "org/judge", "org/prompts", "org/more"}
    assert ("org/policy", "v2") in {asked[:2] for asked in hub if len(asked) == 3}
    assert ("org/prompts", {"split": "train[:10]"}) in hub
    assert "data.eval: here.jsonl is no hub id; left alone" in told
    assert told.count("org/policy@v2") == 1
    assert not (tmp_path / "run").exists()


def test_a_pipeline_is_fetched_whole(hub, chat_models, tmp_path, capsys):
    stage = chatmodel.settings("sft", chat_models, tmp_path / "x")
    stage["model"]["source"] = "org/base"
    later = stage | {"model": {"source": "${one}"}, "name": "two", "algorithm": "sft"}
    stages = {"folder": str(tmp_path / "out")}
    stages["stages"] = [stage | {"name": "one", "algorithm": "sft"}, json.loads(json.dumps(later))]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(stages), encoding="utf-8")
    assert cli.main(["fetch", "pipeline", str(path)]) == 0
    assert {name for name, *_ in hub} == {"org/base"}
    assert f"{tmp_path / 'out/one/model'} is no hub id" in capsys.readouterr().out
