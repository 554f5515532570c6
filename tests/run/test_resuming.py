"""Going on with a run: under which changes it does, and what its folder says of them."""

import datetime
import json
import pathlib
import re
import shutil
import types
import typing

import chatmodel
import jax
import pytest

from jaxalign.commands import cli
from jaxalign.run import inputs, loop
from jaxalign.run.changes import FREE, flat_values
from jaxalign.run.config.runs import RUNS, load_config
from jaxalign.run.config.yaml import merge, read_yaml, yaml_text
from jaxalign.run.folder import open_folder
from jaxalign.run.replay import open_replay

pytestmark = pytest.mark.usefixtures("kept_programs")

TEXTS = {"tokenizer": "a" * 64, "chat_template": "b" * 64}


# --- the matrix: what changed × outcome, without training anything --------------------------------


def task(total=4, **texts):
    """As much of a task as the folder looks at."""
    return types.SimpleNamespace(total=total, inputs=TEXTS | texts)


@pytest.fixture
def place(chat_models, tmp_path):
    """A folder with models of its own, so that their files can be changed."""
    shutil.copytree(chat_models, tmp_path / "models")
    return tmp_path


def settings(algorithm, place, changes=None):
    values = chatmodel.settings(algorithm, place / "models", place / "run")
    held_out = chatmodel.write_rows(place / "held.jsonl", chatmodel.ROWS[algorithm][:3])
    values["data"]["eval"] = [held_out]
    return merge(values, changes or {})


def begin(config, begun_with):
    """Leaves what a run of two steps leaves."""
    with open_folder(config) as opened:
        opened.check_task(begun_with)
        opened.begin(begun_with, 0)
        checkpoint = place_of(config) / "checkpoints" / "2"
        checkpoint.mkdir(parents=True)
        (checkpoint / "x").touch()


def place_of(config):
    return pathlib.Path(config.run.folder)


def edit(path):
    """Changes one byte of a file."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def edit_weights(place):
    edit(place / "models/chat/model.safetensors")


LORA = {"model": {"lora": {"rank": 2}}}
COSINE = {"optimizer": {"schedule": "cosine"}}
FUNCTION = {"reward_model": None, "critic": "policy"}

MATRIX = [
    # id, algorithm, begun with, changes of the configuration, of the place, of the task, outcome
    ("nothing", "sft", {}, {}, None, {}, []),
    ("log_every", "sft", {}, {"run": {"log_every": 7}}, None, {}, ["run.log_every: 100 → 7"]),
    ("save_every", "sft", {}, {"run": {"save_every": 3}}, None, {}, ["run.save_every: 0 → 3"]),
    ("clock", "sft", {}, {"run": {"save_minutes": None, "time_limit": 9}}, None, {},
     ["run.save_minutes: 10.0 → null", "run.time_limit: null → 9.0"]),
    ("kept", "sft", {}, {"run": {"keep": 5, "export": False}}, None, {},
     ["run.keep: 2 → 5", "run.export: True → False"]),
    ("early stopping", "sft", {},
     {"run": {"eval_every": 1, "early_stopping": {"metric": "loss/nll"}}}, None, {},
     ["run.eval_every: 0 → 1"]
     + [f"run.early_stopping.{name}: null → {value}" for name, value in
        (("metric", "loss/nll"), ("mode", "min"), ("patience", 3), ("min_delta", 0.0))]),
    ("layout", "sft", {},
     {"mesh": {"fsdp": 4, "data": 2}, "run": {"micro_batches": 1}, "model": {"remat": "block"}},
     None, {}, ["mesh.data: 1 → 2", "mesh.fsdp: -1 → 4", "model.remat: none → block"]),
    ("longer", "sft", {}, {"run": {"steps": 6}}, None, {"total": 6}, ["steps in all: 4 → 6"]),
    ("longer, with a schedule", "sft", COSINE, {"run": {"steps": 6}}, None, {"total": 6},
     r"steps in all, with which optimizer\.schedule=cosine ends: 4 → 6\n"),
    ("longer, with a schedule of its own", "sft",
     merge(COSINE, {"optimizer": {"total_steps": 9}}), {"run": {"steps": 6}}, None, {"total": 6},
     ["steps in all: 4 → 6"]),
    ("longer, with a critic's schedule", "ppo",
     {"critic_optimizer": {"schedule": "linear"}}, {"run": {"steps": 6}}, None, {"total": 6},
     r"steps in all, with which critic_optimizer\.schedule=linear ends: 4 → 6\n"),
    ("rate", "sft", {}, {"optimizer": {"learning_rate": 0.1}}, None, {},
     r"optimizer\.learning_rate: 0\.003 → 0\.1\n"),
    ("several", "sft", {}, {"run": {"seed": 1}, "data": {"length": 30, "rows": 16}}, None, {},
     r"data\.rows: 8 → 16\n  data\.length: 32 → 30\n  run\.seed: 0 → 1\n"),
    ("adapters", "sft", {}, LORA, None, {}, r"model\.lora\.rank: null → 2\n"),
    ("the algorithm's", "ppo", {}, {"ppo": {"kl_coef": 0.2}}, None, {}, r"ppo\.kl_coef: .* → 0\.2"),
    ("a row", "sft", {}, {}, lambda p: edit(p / "run-sft.jsonl"), {},
     r"data\.train\[0\]\.path \(contents\): \w{12}… → \w{12}…\n"),
    ("a held-out row", "sft", {}, {}, lambda p: edit(p / "held.jsonl"), {},
     r"data\.eval\[0\]\.path \(contents\)"),
    ("a row of a stream", "sft", {"data": {"streaming": True}}, {},
     lambda p: edit(p / "run-sft.jsonl"), {}, r"data\.train\[0\]\.path \(contents\)"),
    ("weights in the checkpoint", "sft", {}, {}, edit_weights, {}, []),
    ("shape of the model", "sft", {}, {}, lambda p: edit(p / "models/chat/config.json"), {},
     r"model\.source \(contents\)"),
    ("base under adapters", "sft", LORA, {}, edit_weights, {},
     r"model\.source \(contents\)"),
    ("start as the reference", "dpo", {}, {}, edit_weights,
     {}, r"model\.source \(contents\)"),
    ("start of a moving reference", "dpo", {"reference_sync": {"every": 1, "alpha": 0.5}}, {},
     edit_weights, {}, []),
    ("reward model", "ppo", {}, {}, lambda p: edit(p / "models/scorer/model.safetensors"), {},
     r"reward_model \(contents\)"),
    ("tokenizer", "sft", {}, {}, None, {"tokenizer": "c" * 64},
     r"tokenizer \(contents\): a{12}… → c{12}…\n"),
    ("template", "sft", {}, {}, None, {"chat_template": "c" * 64}, r"chat_template \(contents\)"),
    ("another way to a template", "sft", {}, {"model": {"chat_template": "chatml"}}, None, {},
     ["model.chat_template: null → chatml"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "begun_with", "changes", "act", "texts", "outcome"),
    [row[1:] for row in MATRIX],
    ids=[row[0] for row in MATRIX],
)
def test_what_changed_and_whether_the_run_goes_on(
    place, capsys, algorithm, begun_with, changes, act, texts, outcome
):
    values = settings(algorithm, place, begun_with)
    begin(load_config(algorithm, values), task())
    first = (place / "run/config.yaml").read_text()
    if act is not None:
        act(place)
    values = merge(values, changes)
    now = task(**texts)

    def resume(*given):
        config = load_config(algorithm, values, ["run.resume=true", *given])
        with open_folder(config) as opened:
            opened.check_task(now)
            opened.begin(now, 2)
        return json.loads((place / "run/run.json").read_text())

    refused = isinstance(outcome, str)
    if refused:
        with pytest.raises(ValueError, match=rf"(?s)begun with something else:\n.*{outcome}"):
            resume()
        # Nothing was touched.
        assert (place / "run/config.yaml").read_text() == first
        assert len(json.loads((place / "run/run.json").read_text())["starts"]) == 1
        record = resume("run.allow_changes=true")
    else:
        record = resume()
    said = capsys.readouterr().out
    assert f"resuming after step 2 of {now.total}, from {place / 'run/checkpoints/2'}" in said
    shown = [line.removeprefix("  changed: ") for line in said.splitlines() if "changed:" in line]
    if refused:
        assert re.search(outcome, "\n".join([*shown, ""]).replace("\n", "\n  "))
        names = {line.partition(": ")[0] for line in shown}
        assert names == set(record["starts"][-1]["changes"])
    else:
        assert sorted(shown) == sorted(outcome)
    # The first configuration is kept beside the new one, if that says anything else.
    assert [start["step"] for start in record["starts"]] == [0, 2]
    new, old = place / "run/config.yaml", place / "run/config.until-step-2.yaml"
    assert old.exists() == (new.read_text() != first)
    assert first == (old if old.exists() else new).read_text()
    assert load_config(algorithm, new) == load_config(algorithm, values)
    # Gone on with once, it goes on from there again without permission.
    values["run"].pop("allow_changes", None)
    assert resume()["starts"][-1]["changes"] == {}


def test_files_elsewhere_with_the_same_contents_are_the_same(place, capsys):
    changes = {"reference": str(place / "models/chat"), "model": {"lora": {"rank": 2}}}
    values = settings("dpo", place, changes)
    begin(load_config("dpo", values), task())
    for name in ("models", "run-dpo.jsonl"):
        (place / name).rename(place / f"moved-{name}")
    values["model"]["source"] = values["reference"] = str(place / "moved-models/chat")
    values["data"]["train"] = [str(place / "moved-run-dpo.jsonl")]
    with open_folder(load_config("dpo", values, ["run.resume=true"])) as opened:
        opened.check_task(task())
        opened.begin(task(), 2)
    said = capsys.readouterr().out
    assert said.count("changed: ") == 3
    edit(place / "moved-models/chat/model.safetensors")
    with (
        pytest.raises(ValueError, match=r"model\.source \(contents\).*\n *reference \(contents\)"),
        open_folder(load_config("dpo", values, ["run.resume=true"])),
    ):
        pass


def test_the_code_of_a_reward_is_part_of_a_run(place):
    (place / "rewards.py").write_text("def brief(prompt, answer):\n    return -len(answer)\n")
    rewards = {"rewards": [{"kind": "function", "path": f"{place / 'rewards.py'}:brief"}]}
    values = settings("ppo", place, rewards | FUNCTION)
    begin(load_config("ppo", values), task())
    edit(place / "rewards.py")
    config = load_config("ppo", values, ["run.resume=true"])
    with pytest.raises(ValueError, match=r"rewards\[0\]\.path \(contents\)"), open_folder(config):
        pass


def test_the_day_that_a_template_writes_is_part_of_a_run(place):
    tok = chatmodel.make_tokenizer("{{ strftime_now('%d') }}" + chatmodel.CHATML)
    config = load_config("sft", settings("sft", place))
    today = inputs.datetime.date.today().isoformat()
    found = inputs.text_inputs(config, tok)
    assert today in found.values()
    assert today not in inputs.text_inputs(config, chatmodel.make_tokenizer()).values()
    begin(config, task(**found))
    later = {name: "2027-01-01" if value == today else value for name, value in found.items()}
    told = rf"day that the template writes: {today} → 2027-01-01"
    resumed = load_config("sft", settings("sft", place), ["run.resume=true"])
    with open_folder(resumed) as opened, pytest.raises(ValueError, match=told):
        opened.check_task(task(**later))


def test_the_day_of_the_first_start_stays(chat_models, tmp_path, monkeypatch, capsys):
    """Rows, metrics and replays are those of a run that was never stopped."""
    template = tmp_path / "dated.jinja"
    template.write_text("{{ '<|im_start|>' + strftime_now('%Y-%m-%d') }}" + chatmodel.CHATML)

    def config(folder, steps, *more):
        values = chatmodel.settings("sft", chat_models, tmp_path / folder, steps=steps)
        values["model"]["chat_template"] = str(template)
        values["data"]["length"] = 64
        return load_config("sft", values, ["run.save_every=1", *more])

    class First(datetime.date):  # no day on which transformers' own clock could write the same
        @classmethod
        def today(cls):
            return cls(2024, 5, 6)

    class Later(First):
        @classmethod
        def today(cls):
            return cls(2031, 2, 3)

    first = "2024-05-06"
    monkeypatch.setattr(datetime, "date", First)
    loop.train(config("whole", 4))
    loop.train(config("parts", 2))
    monkeypatch.setattr(datetime, "date", Later)
    loop.train(config("parts", 4, "run.resume=true"))
    assert f"goes on writing {first}" in capsys.readouterr().out
    whole, parts = (
        [row["loss"] for row in chatmodel.lines(tmp_path / name) if "loss" in row]
        for name in ("whole", "parts")
    )
    assert len(whole) == 4
    assert whole == parts
    with open_replay(tmp_path / "parts", 4) as replay:
        assert replay.past.inputs[inputs.DAY] == first
        rows = next(iter(replay.built.task.batches))
        written = replay.built.tok.decode(rows.inputs[0])
    assert first in written
    # A run that begins on the later day writes that day.
    loop.train(config("later", 1))
    assert (
        json.loads((tmp_path / "later/run.json").read_text())["inputs"][inputs.DAY] == "2031-02-03"
    )


def test_other_versions_and_devices_are_said(place, capsys):
    values = settings("sft", place)
    begin(load_config("sft", values), task())
    path = place / "run/versions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"jax": "0.1", "devices": "3 × x"}))
    with open_folder(load_config("sft", values, ["run.resume=true"])) as opened:
        opened.begin(task(), 2)
    said = capsys.readouterr().out
    assert f"changed: jax: 0.1 → {jax.__version__}\n" in said
    assert "changed: devices: 3 × x → 8 × " in said
    assert said.count("changed: ") == 2


def test_an_option_of_a_later_version_is_no_change(place):
    values = settings("sft", place)
    begin(load_config("sft", values), task())
    record = json.loads((place / "run/run.json").read_text())
    del record["config"]["optimizer"]["max_grad_norm"], record["config"]["sft"]
    (place / "run/run.json").write_text(json.dumps(record))
    with open_folder(load_config("sft", values, ["run.resume=true"])):
        pass
    (place / "run/run.json").write_text("{")
    config = load_config("sft", values, ["run.resume=true"])
    with pytest.raises(ValueError, match=r"run\.json is damaged.*remove it"), open_folder(config):
        pass
    (place / "run/run.json").unlink()  # config.yaml serves instead
    config = load_config("sft", values, ["run.resume=true", "run.seed=4"])
    with pytest.raises(ValueError, match=r"run\.seed: 0 → 4"), open_folder(config):
        pass


def test_a_configuration_edited_in_the_folder_is_kept_and_compared(place):
    values = settings("sft", place)
    begin(load_config("sft", values), task())
    path = place / "run/config.yaml"
    mine = "# my notes\n" + path.read_text().replace("0.003", "0.5")
    path.write_text(mine)
    config = load_config("sft", path, ["run.resume=true"])
    with (
        pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.003 → 0\.5"),
        open_folder(config),
    ):
        pass
    allowed = load_config("sft", path, ["run.resume=true", "run.allow_changes=true"])
    with open_folder(allowed) as opened:
        opened.begin(task(), 2)
    assert (place / "run/config.until-step-2.yaml").read_text() == mine


def test_free_options_are_options():
    """A name that is misspelt in the table would let nothing pass."""
    known = set()
    for run in RUNS.values():
        known |= {field.name for field in run.__dataclass_fields__.values()}
    sections = {name: set() for name in ("run", "model", "optimizer", "data", "mesh")}
    for run in RUNS.values():
        for name in sections:
            hint = run.__dataclass_fields__[name]
            sections[name] |= set(flat_names(hint, run))
    for name in FREE:
        first, _, rest = name.partition(".")
        assert first in known
        if rest and first in sections:
            assert rest in sections[first], name


def flat_names(field, run):
    return typing.get_type_hints(run)[field.name].__dataclass_fields__


def test_nested_values_are_named_by_their_place():
    values = {"a": {"b": 1, "c": None}, "data": {"train": ["x", {"path": "y", "rows": 2}]}}
    values |= {"rewards": [{"weight": 0.5}], "list": [1, 2]}
    assert flat_values(values) == {
        "a.b": 1,
        "data.train[0].path": "x",
        "data.train[1].path": "y",
        "data.train[1].rows": 2,
        "rewards[0].weight": 0.5,
        "list": [1, 2],
    }


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(chat_models, tmp_path_factory):
    """A run of two steps, with held-out figures after each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = chatmodel.settings("sft", chat_models, folder, steps=2, save_every=1, eval_every=1)
    rows = chatmodel.write_rows(folder.parent / "held.jsonl", chatmodel.ROWS["sft"][:3])
    values["data"]["eval"] = [rows]
    return loop.train(load_config("sft", values))


def again(finished, folder, *given, cut_to=None):
    """Resumes a copy of the run, as if it had been killed after the checkpoint `cut_to`."""
    if not folder.exists():
        shutil.copytree(finished.folder, folder)
    if cut_to is not None:
        for path in (folder / "checkpoints").iterdir():
            if path.name != str(cut_to):
                shutil.rmtree(path)
    options = [f"run.folder={folder}", "run.resume=true", "run.export=false", *given]
    return loop.train(load_config("sft", finished.folder / "config.yaml", options))


def test_a_run_that_goes_on_says_so_and_counts_on(finished, tmp_path, capsys):
    result = again(finished, tmp_path / "run", cut_to=1)
    assert "resuming after step 1 of 2, from " in capsys.readouterr().out
    ours, theirs = chatmodel.lines(result.folder), chatmodel.lines(finished.folder)
    assert chatmodel.timeless(ours) == chatmodel.timeless(theirs)


def test_data_under_another_seed_is_taken_if_it_may(finished, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"run\.seed: 0 → 5"):
        again(finished, tmp_path / "run", "run.seed=5", cut_to=1)
    result = again(finished, tmp_path / "run", "run.seed=5", "run.allow_changes=true")
    assert len(result.history) == 1
    assert "changed: run.seed: 0 → 5" in capsys.readouterr().out
    assert result.history[0]["loss"] != finished.history[1]["loss"]


def test_fewer_steps_than_are_done_are_an_error(finished, tmp_path):
    with pytest.raises(ValueError, match=r"run\.steps=1: the newest checkpoint .* of step 2"):
        again(finished, tmp_path / "run", "run.steps=1")


def test_the_last_held_out_figures_are_measured_if_they_are_missing(finished, tmp_path):
    """A run may be killed between its last checkpoint and its last evaluation."""
    shutil.copytree(finished.folder, tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    whole = path.read_text()
    last = whole.splitlines(keepends=True)[-1]
    assert "eval/loss/nll" in last
    path.write_text(whole.removesuffix(last))
    result = again(finished, tmp_path / "run")
    assert path.read_text() == whole
    assert result.after == finished.after


def test_checkpoints_that_are_all_broken_are_no_new_run(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").iterdir():
        shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"run\.resume=true: .*holds no checkpoint; .*auto"):
        again(finished, tmp_path / "run")
    with pytest.raises(ValueError, match="holds model; it is of a run whose checkpoints are gone"):
        again(finished, tmp_path / "run", "run.resume=auto")


def test_the_flag_of_the_command_allows_changes(finished, tmp_path, capsys):
    shutil.copytree(finished.folder, tmp_path / "run")
    command = ["sft", str(finished.folder / "config.yaml"), f"run.folder={tmp_path / 'run'}"]
    command += ["run.resume=true", "run.export=false", "optimizer.learning_rate=0.1"]
    assert cli.main(command) == 2
    assert "optimizer.learning_rate: 0.003 → 0.1" in capsys.readouterr().err
    assert cli.main([*command, "--allow-changes"]) == 0
    values = read_yaml(tmp_path / "run/config.yaml")
    assert values["optimizer"]["learning_rate"] == 0.1
    # The permission was for once.
    assert values["run"]["allow_changes"] is values["run"]["resume"] is False
    assert yaml_text(values) == (tmp_path / "run/config.yaml").read_text()
