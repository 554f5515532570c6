"""A device that runs out of memory, by an artificial error: what the message says."""

import re

import chatmodel
import jax
import pytest
import yaml

import jaxalign.plan
from jaxalign.commands import cli, out_of_memory
from jaxalign.run import loop, pipeline
from jaxalign.run.config.runs import load_config

pytestmark = pytest.mark.usefixtures("kept_programs")

ERROR = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.\nBuffers: …"


@pytest.fixture
def settings(chat_models, tmp_path):
    def make(algorithm, **sections):
        values = chatmodel.settings(algorithm, chat_models, tmp_path / "run")
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return values

    return make


def run_out(monkeypatch, text=ERROR):
    def train(*_args, **_keywords):
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(pipeline, "train", train)


def table(text):
    """Kind → (bytes, options)."""
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    lines = re.findall(r"^  (\S.*?) +([\d.]+) (B|KiB|MiB|GiB)(?: +less with (.*))?$", text, re.M)
    return {name: (float(size) * units[unit], options) for name, size, unit, options in lines}


def test_the_command_says_what_took_the_memory(monkeypatch, settings, tmp_path, capsys):
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings("sft")))
    run_out(monkeypatch)
    assert cli.main(["sft", str(tmp_path / "sft.yaml")]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert "when 2.00 GiB more were wanted (RESOURCE_EXHAUSTED: Out of memory" in text
    found = table(text)
    weights = sum(x.size * 4 for x in jax.tree.leaves(chatmodel.DECODER.shapes))
    # 8 devices hold an eighth each, but of what is too small to be cut; Adam has two moments.
    assert weights / 8 <= found["parameters"][0] <= weights / 4
    assert found["optimizer"][0] == pytest.approx(2 * found["parameters"][0], rel=0.01)
    assert found["gradients"][0] == found["parameters"][0]
    assert found["activations"][0] > 0
    parts = sum(size for name, (size, _) in found.items() if name != "in all")
    assert found["in all"][0] == pytest.approx(parts, rel=0.01)
    assert "optimizer.moments=int8, optimizer.offload=true, model.lora" in found["optimizer"][1]
    activations = "run.micro_batches=2 (now 1), model.remat=block, data.length below 32"
    assert found["activations"][1] == activations
    largest = max((name for name in found if name != "in all"), key=lambda name: found[name][0])
    assert f"{largest} take most" in text


def test_options_that_are_taken_already_are_not_advised(settings):
    sections = {
        "model": {"remat": "block", "lora": {"rank": 2}},
        "optimizer": {"moments": "int8", "offload": True},
        "run": {"micro_batches": 2, "folder": "x", "steps": 1},
    }
    config = load_config("sft", settings("sft", **sections))
    advice = {
        kind: " ".join(out_of_memory._remedies(kind, config))
        for kind in ("parameters", "optimizer", "activations", "gradients", "frozen")
    }
    assert "lora" not in " ".join(advice.values())
    assert advice["optimizer"] == "more devices (mesh.fsdp)"
    assert advice["activations"] == "run.micro_batches=4 (now 2) data.length below 32"


def test_a_rollout_has_a_cache(settings):
    config = load_config("ppo", settings("ppo"))
    cache = out_of_memory._remedies("cache", config)
    assert cache[0] == f"ppo.slots below {config.data.rows}"
    assert f"ppo.max_new_tokens below {config.ppo.max_new_tokens}" in cache
    assert "offload_frozen=true" in out_of_memory._remedies("models", config)


def test_programs_that_do_not_compile_leave_what_is_resident(monkeypatch, settings):
    def refuse(*_):
        raise ValueError("update wants 9 GiB of 8 GiB")

    monkeypatch.setattr(jaxalign.plan, "make_plan", refuse)
    config = load_config("sft", settings("sft"))
    text = out_of_memory.message(config, ERROR)
    assert set(table(text)) == {"parameters", "optimizer", "in all"}
    assert text.endswith("update wants 9 GiB of 8 GiB")


def test_a_stage_of_a_pipeline_is_explained_too(monkeypatch, settings, tmp_path, capsys):
    values = settings("sft")
    values["run"].pop("folder")
    stages = [{"name": "first", "algorithm": "sft"} | values]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"folder": str(tmp_path / "p"), "stages": stages}))
    run_out(monkeypatch)
    monkeypatch.setattr(out_of_memory, "_sizes", lambda _: ({"parameters": 8}, "then", ""))
    assert cli.main(["pipeline", str(path)]) == 2
    assert table(capsys.readouterr().err)["parameters"][0] == 8


def test_other_errors_of_the_runtime_pass(monkeypatch, settings, tmp_path):
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings("sft")))
    run_out(monkeypatch, "INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        cli.main(["sft", str(tmp_path / "sft.yaml")])
