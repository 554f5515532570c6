"""Each recipe of docs/ppo.md runs as printed: merged into the file that the page names."""

import blocks
import chatmodel
import pytest
import yaml

from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge, read_yaml
from jaxalign.run.loop import train

pytestmark = pytest.mark.usefixtures("kept_programs")

RECIPES = [b for b in blocks.BLOCKS if b.language == "yaml" and b.name.startswith("docs/ppo.md")]

# What a tiny model on 8 devices needs smaller; every other number is the recipe's.
FEWER = {"rows": 8, "samples": 2, "minibatches": 2, "micro_batches": 1, "max_new_tokens": 6}


def test_there_is_one_for_every_estimator():
    used = {yaml.safe_load(block.code)["ppo"].get("advantage_estimator") for block in RECIPES}
    assert used >= {"rloo", "grpo", "reinforce++", "reinforce++_baseline"}
    assert len(RECIPES) == 7


@pytest.mark.slow
@pytest.mark.parametrize("block", RECIPES, ids=lambda block: block.code.split("\n")[0][2:20])
def test_it_runs(block, chat_models, tmp_path):
    printed = merge(read_yaml(blocks.ROOT / "configs/ppo_grpo.yaml"), yaml.safe_load(block.code))
    full = load_config("ppo", printed)
    tiny = chatmodel.settings("ppo", chat_models, tmp_path / "run", steps=1, checkpoint=False)
    tiny["run"] |= {"export": False, "eval_every": 0, "save_every": 0, "micro_batches": 1}
    # An answer of the tiny model never ends, and DAPO masks such answers: let stop tokens be many.
    stops = list(range(100))
    samples = min(full.ppo.samples, FEWER["samples"])
    small = {
        "data": tiny["data"] | {"eval": [], "rows": FEWER["rows"] * 2 // samples},
        "ppo": {"max_new_tokens": 6, "samples": samples, "stop_tokens": stops},
        "minibatches": min(full.minibatches, FEWER["minibatches"]),
        "model": tiny["model"],
        "reward_model": tiny["reward_model"],
        "run": tiny["run"],
        "dump_every": 0,
    }
    config = load_config("ppo", merge(printed, small))
    assert config.ppo.advantage_estimator == full.ppo.advantage_estimator
    assert config.ppo.kl_coef == full.ppo.kl_coef
    train(config)
    (line,) = chatmodel.lines(tmp_path / "run")
    assert abs(line["loss"]) < 100
    assert line["response/length"] > 0
