"""The scripts that break runs: what they compare, count and plan. They run whole only by hand."""

import importlib
import json
import pathlib
import shutil

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "scripts/faults"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_a_plan_has_every_kind_and_moment(script):
    kills = script("kills")
    trials = kills.plan(200, seed=3)
    assert len(trials) == 200
    assert [trial["number"] for trial in trials] == list(range(200))
    assert {trial["kind"] for trial in trials[:20]} == set(kills.SHARES)
    assert {trial["moment"] for trial in trials} == {*kills.MOMENTS}
    assert len({trial["seed"] for trial in trials}) == 200
    assert kills.plan(200, seed=3) == trials


def make_run(folder, rows):
    (folder / "checkpoints/3/loop").mkdir(parents=True)
    (folder / "checkpoints/3/loop/metadata").write_text('{"done": 3}')
    (folder / "model").mkdir()
    (folder / "model/model.safetensors").write_bytes(b"weights")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


ROWS = [
    {"step": 0, "eval/loss": 3.0},
    {"step": 1, "loss": 2.0, "time/step": 0.5},
    {"step": 2, "loss": 1.0, "time/step": 0.25},
    {"step": 2, "eval/loss": 2.0},
]


@pytest.mark.parametrize(
    ("change", "lost", "doubled", "different"),
    [
        (lambda rows: rows, [], [], []),
        (lambda rows: [row | {"time/step": 9.0} for row in rows], [], [], []),
        (lambda rows: rows[:3], ["evaluation 2"], [], []),
        (lambda rows: [*rows, rows[1]], [], ["step 1"], []),
        (lambda rows: [*rows[:2], rows[2] | {"loss": 1.0000001}, rows[3]], [], [], ["step 2"]),
    ],
)
def test_lines_that_are_lost_doubled_or_others_are_seen(
    script, tmp_path, change, lost, doubled, different
):
    runs = script("_runs")
    make_run(tmp_path / "theirs", ROWS)
    make_run(tmp_path / "ours", change(ROWS))
    found = runs.compare(tmp_path / "ours", tmp_path / "theirs")
    assert found == (lost, doubled, different)
    assert found.equal == (not (lost or doubled or different))


def test_other_weights_positions_and_missing_files_are_seen(script, tmp_path):
    runs = script("_runs")
    make_run(tmp_path / "theirs", ROWS)
    shutil.copytree(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "ours/model/model.safetensors").write_bytes(b"weightz")
    (tmp_path / "ours/checkpoints/3/loop/metadata").write_text('{"done": 2}')
    (tmp_path / "theirs/rollouts.jsonl").write_text("{}\n")
    found = runs.compare(tmp_path / "ours", tmp_path / "theirs").different
    assert found == [
        "model/model.safetensors", "rollouts.jsonl missing", "checkpoints/3/loop/metadata"
    ]  # fmt: skip


def test_memory_that_grows_is_seen(script):
    flat = script("flat")
    steady = [(line, 300.0 + line % 2, 14) for line in range(1, 301)]
    assert flat.is_flat(steady)
    assert flat.growth(steady) == (0.0, 0.0)
    leaks = [(line, 300.0 + 0.1 * line, 14) for line in range(1, 301)]
    assert not flat.is_flat(leaks)  # 315 MiB in the middle, 325 in the end
    assert not flat.is_flat([(line, 300.0, 10 + line // 100) for line in range(1, 301)])


def test_results_are_written_by_the_line(script, tmp_path):
    runs = script("_runs")
    runs.write_json(tmp_path / "x.json", {"seed": 1}, "trials", [{"a": [1]}, {"b": 2}])
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"seed": 1, "trials": [{"a": [1]}, {"b": 2}]}
    assert '  {"a": [1]},\n' in text
