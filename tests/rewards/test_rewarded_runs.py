"""PPO runs of a tiny model with `rewards:` in the configuration."""

import chatmodel
import pytest

from jaxalign.commands import cli
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import write_yaml
from jaxalign.run.loop import train

pytestmark = pytest.mark.usefixtures("kept_programs")

FUNCTIONS = """
def worth(prompt, completion, row):
    return row["worth"]

def length(prompt, completion):
    return float(len(completion))
"""
TRAIN = [{"prompt": q, "worth": 2.5} for q in chatmodel.QUESTIONS]
HELD_OUT = [{"prompt": q, "worth": -1.0} for q in chatmodel.QUESTIONS[:8]]


def settings(models, folder, rewards, **changes):
    """A short run whose critic starts from a reward model, even if none is a reward."""
    values = chatmodel.settings("ppo", models, folder, steps=2, export=False, checkpoint=False)
    del values["reward_model"]
    path = folder.parent / "my_rewards.py"
    path.write_text(FUNCTIONS)
    values["data"] |= {
        "train": [chatmodel.write_rows(folder.parent / "train.jsonl", TRAIN)],
        "eval": [chatmodel.write_rows(folder.parent / "eval.jsonl", HELD_OUT)],
    }
    for spec in rewards:
        if spec["kind"] == "function":
            spec["path"] = f"{path}:{spec['path']}"
    return values | {"rewards": rewards} | changes


def test_a_function_of_the_row_is_the_reward(chat_models, tmp_path):
    values = settings(
        chat_models,
        tmp_path / "run",
        [{"kind": "function", "path": "worth"}],
        critic=str(chat_models / "scorer"),
    )
    write_yaml(tmp_path / "ppo.yaml", values)
    assert cli.main(["ppo", str(tmp_path / "ppo.yaml")]) in (0, None)
    rows = chatmodel.lines(tmp_path / "run")
    # Mean of the rows' numbers: 2.5 in training, −1 held out.
    assert [row["objective/scores"] for row in rows if "loss" in row] == [2.5, 2.5]
    assert [row["rewards/function"] for row in rows if "loss" in row] == [2.5, 2.5]
    assert [row["eval/rewards/function"] for row in rows if "loss" not in row] == [-1.0, -1.0]
    assert [row["eval/objective/scores"] for row in rows if "loss" not in row] == [-1.0, -1.0]
    assert all(row["compiles"] == 1 for row in rows if "loss" in row)


def test_several_rewards_are_added_up(chat_models, tmp_path):
    values = settings(
        chat_models,
        tmp_path / "run",
        [
            {"kind": "model", "source": str(chat_models / "scorer"), "weight": 2.0},
            {"kind": "function", "path": "length", "name": "length", "weight": -0.125},
            # Through text and template: the same tokens, except at the end of a cut answer.
            {"kind": "model", "name": "own", "source": str(chat_models / "scorer"), "weight": 0.0}
            | {"tokenizer": "own"},
        ],
    )
    values["run"]["steps"] = 1
    result = train(load_config("ppo", values))
    for row in result.history:
        assert row["objective/scores"] == pytest.approx(
            2.0 * row["rewards/model"] - 0.125 * row["rewards/length"], abs=1e-5
        )
        assert row["applies/model"] == row["applies/length"] == row["applies/own"] == 1.0
        assert 0 < row["rewards/length"] <= 6
        assert row["rewards/own"] != 0
    after = result.after
    assert after["objective/scores"] == pytest.approx(
        2.0 * after["rewards/model"] - 0.125 * after["rewards/length"], abs=1e-5
    )


def test_a_run_stops_before_training_where_rewards_do_not_fit(chat_models, tmp_path, capsys):
    values = settings(chat_models, tmp_path / "run", [{"kind": "gsm8k"}])
    write_yaml(tmp_path / "ppo.yaml", values)
    assert cli.main(["ppo", str(tmp_path / "ppo.yaml")]) == 2
    assert "critic=null: there is no reward model" in capsys.readouterr().err
    assert cli.main(["ppo", str(tmp_path / "ppo.yaml"), f"critic={chat_models}/scorer"]) == 2
    assert "train.jsonl:1: reward 'gsm8k': the row's 'answer' is None" in capsys.readouterr().err
