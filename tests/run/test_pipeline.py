"""Pipelines: one YAML into checked stages, each starting from an earlier one's model."""

import pathlib

import chatmodel
import pytest
import yaml

import jaxalign
from jaxalign.models.scorer import Scorer
from jaxalign.run.pipeline import EXAMPLES, load_stages, run_stages

STAGES = {
    "folder": "runs/mine",
    "defaults": {
        "model": {"remat": "block"},
        "data": {"rows": 8, "train": ["rows.jsonl"]},
        "optimizer": {"learning_rate": 1e-4},
    },
    "stages": [
        {"name": "first", "algorithm": "sft", "model": {"source": "some/model"}},
        {
            "name": "rm",
            "algorithm": "reward",
            "model": {"source": "${first}", "remat": "none"},
            "data": {"train": ["${examples}/preferences.jsonl"]},
            "run": {"seed": 3},
        },
        {
            "name": "last",
            "algorithm": "ppo",
            "model": {"source": "${first}"},
            "reward_model": "${rm}",
        },
    ],
}


def changed(**changes):
    return STAGES | changes


def stage(number, **changes):
    stages = [dict(s) for s in STAGES["stages"]]
    stages[number] |= changes
    return changed(stages=stages)


def test_stages_are_runs_with_defaults_underneath():
    (first, one), (rm, two), (last, three) = load_stages(STAGES)
    assert (first, rm, last) == ("first", "rm", "last")
    assert [type(c).__name__ for c in (one, two, three)] == ["SFTRun", "RewardRun", "PPORun"]
    assert [c.run.folder for c in (one, two, three)] == [
        str(pathlib.Path("runs/mine") / name) for name in ("first", "rm", "last")
    ]
    assert one.model.source == "some/model"
    assert two.model.source == three.model.source == str(pathlib.Path("runs/mine/first/model"))
    assert three.reward_model == str(pathlib.Path("runs/mine/rm/model"))
    assert [c.model.remat for c in (one, two, three)] == ["block", "none", "block"]
    assert [c.run.seed for c in (one, two, three)] == [0, 3, 0]
    assert {c.optimizer.learning_rate for c in (one, two, three)} == {1e-4}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_example_data_is_in_the_package(language):
    rm = dict(load_stages(STAGES, language=language))["rm"]
    (path,) = map(pathlib.Path, rm.data.train)
    assert path.is_file()
    assert path == EXAMPLES / language / path.name


def test_overrides_reach_one_stage_all_stages_and_the_folder():
    given = ["rm.data.rows=16", "defaults.run.seed=1", "folder=elsewhere", "last.run.steps=2"]
    one, two, three = (config for _, config in load_stages(STAGES, given))
    assert [c.data.rows for c in (one, two, three)] == [8, 16, 8]
    assert [c.run.seed for c in (one, two, three)] == [1, 3, 1]  # a stage's own value wins
    assert [c.run.steps for c in (one, two, three)] == [None, None, 2]
    assert one.run.folder == str(pathlib.Path("elsewhere/first"))
    assert STAGES["stages"][1]["data"] == {"train": ["${examples}/preferences.jsonl"]}


@pytest.mark.parametrize(
    ("values", "assignments", "told"),
    [
        (changed(stages=[]), (), "wanted a list under 'stages'"),
        (changed(stages={"a": 1}), (), "wanted a list under 'stages'"),
        (changed(stages=["sft"]), (), r"stages\[0\] wants a name"),
        (stage(1, name=None), (), r"stages\[1\] wants a name"),
        (stage(1, name="folder"), (), r"stages\[1\] wants a name of its own, got 'folder'"),
        (stage(1, name="first"), (), "two stages are called 'first'"),
        (changed(default={}), (), r"unknown keys \['default'\].*defaults"),
        (changed(defaults=3), (), "defaults=3: wanted a section"),
        (changed(folder=None), (), "folder=None"),
        (
            stage(0, algorithm="sfft"),
            (),
            "stage 'first': algorithm='sfft'.*sft, reward, dpo, kto, ppo",
        ),
        (stage(0, model={"source": "${rm}"}), (), r"stage 'first': \$\{rm\} names no earlier"),
        (stage(0, run={"export": False}), (), r"stage 'rm': \$\{first\} names no earlier"),
        (stage(2, data={"rows": 0}), (), r"(?s)stage 'last': .*data: rows: got 0"),
        (stage(1, optimiser={}), (), r"(?s)stage 'rm': .*did you mean optimizer"),
        (STAGES, ("data.rows=8",), r"starts with no stage.*first, rm, last"),
        (STAGES, ("rm=3",), "rm=3: wanted a section"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(values, assignments, told):
    with pytest.raises(ValueError, match=told):
        load_stages(values, assignments)


def test_empty_defaults_are_none():
    values = changed(defaults=None, stages=[STAGES["stages"][1] | {"model": {"source": "x"}}])
    ((_, config),) = load_stages(values)
    assert config.data.rows == 32


def test_a_pipeline_file_runs_stage_after_stage(chat_models, tmp_path, kept_programs):
    values = {"folder": str(tmp_path / "out"), "defaults": {}, "stages": []}
    for name, algorithm in (("one", "sft"), ("two", "reward")):
        given = chatmodel.settings(algorithm, chat_models, tmp_path / "unused", steps=2)
        given["run"].pop("folder")
        values["stages"].append({"name": name, "algorithm": algorithm} | given)
    values["stages"][1]["model"] = {"source": "${one}"}
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values))

    results = run_stages(load_stages(path, ["defaults.run.checkpoint=false"]))
    assert list(results) == ["one", "two"]
    for name, result in results.items():
        assert result.folder == tmp_path / "out" / name
        assert [row["step"] for row in chatmodel.lines(result.folder)] == [1, 2]
        assert not (result.folder / "checkpoints").exists()
    scorer, params = jaxalign.load_pretrained(results["two"].model)
    assert isinstance(scorer, Scorer)
    # The second began where the first ended: 2 updates at 3e-3 are not far from there.
    _, start = jaxalign.load_pretrained(results["one"].model)
    _, source = jaxalign.load_pretrained(chat_models / "chat")
    start, source, end = map(chatmodel.leaves, (start, source, params))
    name = "['blocks']['mlp']['down']['kernel']"
    assert 0 < abs(end[name] - start[name]).max() < 0.01
    assert abs(end[name] - source[name]).max() > 1.5 * abs(end[name] - start[name]).max()
