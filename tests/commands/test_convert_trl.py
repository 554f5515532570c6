"""`jaxalign convert-trl`: what TRL's arguments become, by hand, and what is said of the rest."""

import json

import pytest
import yaml

from jaxalign.commands import cli
from jaxalign.commands.convert_trl.convert import COMMANDS, convert, find_trainer
from jaxalign.commands.convert_trl.defaults import CARRIED, UNSET
from jaxalign.commands.convert_trl.table import SECTIONS, arguments
from jaxalign.run.config.runs import load_config

NAMED = {"model_name_or_path": "owner/model", "dataset_name": "owner/data"}


def whys(notes):
    return {note.what.partition(":")[0]: note.why for note in notes}


def test_sft():
    given = NAMED | {
        "model_revision": "v2",
        "dataset_config": "small",
        "dataset_train_split": "train_sft",
        "eval_strategy": "steps",
        "eval_steps": 100,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 300,
        "learning_rate": "2e-4",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 20,
        "packing": True,
        "assistant_only_loss": True,
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": "all-linear",
        "bf16": True,
        "output_dir": "runs/mine",
        "save_total_limit": 3,
        "adam_beta2": 0.95,
    }
    values, notes = convert(given, "sft", processes=8)
    assert values == {
        "model": {
            "source": "owner/model@v2",
            "compute_dtype": "bfloat16",
            "remat": "block",  # TRL checkpoints activations by default
            "lora": {
                "rank": 8,
                "alpha": 16,
                "targets": ["query", "key", "value", "out", "gate", "up", "down"],
            },
        },
        "data": {
            "train": ["owner/data:small:train_sft"],
            "eval": ["owner/data:small:test"],
            "rows": 64,  # 2 × 4 × 8 devices
            "length": 1024,
            "packing": "best_fit",
            "epochs": None,
        },
        "run": {
            "folder": "runs/mine",
            "seed": 42,
            "steps": 300,
            "micro_batches": 4,
            "log_every": 10,
            "eval_every": 100,
            "save_every": 500,
            "keep": 3,
        },
        "sft": {"loss_type": "nll"},
        "optimizer": {
            "learning_rate": 2e-4,
            "schedule": "cosine",
            "end_fraction": 0.1,
            "warmup_steps": 20,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "b2": 0.95,
        },
    }
    assert set(whys(notes)) == {"lora_dropout"}


def test_what_sft_trains_is_said():
    _, notes = convert(NAMED, "sft")
    assert "TRL trains every token" in whys(notes)["data.train_on"]
    values, notes = convert(NAMED | {"completion_only_loss": False}, "sft")
    assert values["data"]["train_on"] == "everything"
    assert not notes


def test_dpo():
    given = NAMED | {
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.2],
        "beta": 0.05,
        "f_divergence_type": "FDivergenceType.REVERSE_KL",
        "precompute_ref_log_probs": True,
        "num_train_epochs": 1,
        "truncation_mode": "keep_end",
        "optim": "adamw_bnb_8bit",
    }
    values, notes = convert(given, "dpo")
    assert values["dpo"] == {
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.2],
        "beta": 0.05,
    }
    assert values["reference_cache"] == "runs/dpo-reference"
    assert values["data"]["keep"] == "prompt_end"
    assert values["run"]["epochs"] == 1
    assert values["optimizer"]["learning_rate"] == 1e-6
    assert values["optimizer"]["moments"] == "int8"
    assert not notes
    values, _ = convert(NAMED | {"sync_ref_model": True, "ref_model_sync_steps": 64}, "dpo")
    assert values["reference_sync"] == {"every": 64, "alpha": 0.6}
    assert values["dpo"]["loss_type"] == "sigmoid"


def test_reward_and_kto():
    values, notes = convert(NAMED | {"center_rewards_coefficient": 0.01}, "reward")
    assert values["reward"] == {"center_coef": 0.01}
    assert values["optimizer"]["learning_rate"] == 1e-4
    assert not notes
    values, notes = convert(
        NAMED | {"desirable_weight": 1.2, "precompute_ref_log_probs": True}, "kto"
    )
    assert values["kto"] == {"beta": 0.1, "desirable_weight": 1.2}
    assert set(whys(notes)) == {"precompute_ref_log_probs"}


def test_ppo():
    given = {
        "sft_model_path": "runs/sft",
        "reward_model_path": "runs/reward",
        "dataset_name": "owner/prompts",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 8,
        "num_mini_batches": 2,
        "total_episodes": 10_000,
        "kl_coef": 0.1,
        "stop_token_id": 7,
        "missing_eos_penalty": 1.0,
        "num_sample_generations": 5,
    }
    values, notes = convert(given, "ppo", processes=2)
    assert values["model"]["source"] == "runs/sft"
    assert values["reward_model"] == "runs/reward"
    assert values["data"]["rows"] == 128  # 8 × 8 × 2
    assert values["run"]["steps"] == 79  # ⌈10,000 / 128⌉
    assert values["run"]["micro_batches"] == 4  # 8 parts over 2 mini-batches
    assert (values["minibatches"], values["ppo_epochs"]) == (2, 4)
    assert values["ppo"] == {
        "max_new_tokens": 53,
        "stop_tokens": [7],
        "score_at": "after_eos",
        "whiten_ddof": 1,
        "kl_coef": 0.1,
        "temperature": 0.7,
        "vf_coef": 0.1,
        "gamma": 1.0,
        "lam": 0.95,
        "kl_estimator": "k1",
        "whiten_rewards": False,
        "clip_range": 0.2,
        "clip_range_value": 0.2,
        "missing_eos_penalty": 1.0,
    }
    assert set(whys(notes)) == {"num_sample_generations"}


def test_grpo():
    given = NAMED | {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 8,
        "num_generations": 16,
        "num_iterations": 2,
        "max_steps": 100,
        "beta": 0.04,
        "epsilon_high": 0.28,
        "loss_type": "dr_grpo",
        "scale_rewards": False,
        "reward_funcs": ["mine.rewards.short", "accuracy_reward"],
        "reward_model_name_or_path": "owner/scorer",
        "reward_weights": [1.0, 0.5],
        "use_vllm": True,
        "vllm_mode": "colocate",
    }
    values, notes = convert(given, "grpo", processes=8)
    assert values["data"]["rows"] == 16  # 4 × 8 devices × 8 steps = 256 answers, 16 a prompt
    assert values["minibatches"] == 4  # 8 steps, 2 of them an update
    assert values["ppo_epochs"] == 2
    assert values["run"]["micro_batches"] == 2
    assert values["run"]["steps"] == 13  # ⌈100 updates / 8 an iteration⌉
    assert values["rewards"] == [
        {"kind": "model", "source": "owner/scorer", "tokenizer": "own", "weight": 1.0},
        {"kind": "function", "path": "mine.rewards:short", "calls": "batch", "weight": 0.5},
    ]
    assert values["ppo"] == {
        "advantage_estimator": "grpo",
        "samples": 16,
        "max_new_tokens": 512,
        "temperature": 1.0,
        "kl_coef": 0.04,
        "loss_aggregation": "constant",
        "scale_rewards": "none",
        "kl_in": "loss",
        "kl_estimator": "k3",
        "whiten_ddof": 1,
        "clip_range": 0.2,
        "clip_range_high": 0.28,
    }
    assert set(whys(notes)) == {"reward_funcs", "use_vllm"}


def test_rloo():
    given = NAMED | {"reward_clip_range": [-5, 5], "num_generations": 4, "reward_funcs": "a.b"}
    values, notes = convert(given, "rloo")
    assert values["data"]["rows"] == 2  # 8 answers, 4 a prompt
    assert values["ppo"]["reward_clip"] == 5
    assert values["ppo"]["kl_in"] == "reward"
    assert values["ppo"]["kl_coef"] == 0.05
    assert not notes
    _, notes = convert(given | {"reward_clip_range": [-1, 5]}, "rloo")
    assert set(whys(notes)) == {"reward_clip_range"}


@pytest.mark.parametrize("trainer", SECTIONS)
def test_a_dump_of_all_defaults_says_little(trainer):
    """As `training_args.to_dict()` gives it: every argument, most of them as TRL has them."""
    known = arguments(trainer)
    defaults = {name: value for name, value in UNSET.items() if name in known}
    given = dict.fromkeys(known) | defaults | CARRIED[trainer] | NAMED
    values, notes = convert(given, trainer)
    load_config(COMMANDS[trainer], values)
    unnamed = {"reward_model", "rewards", "data.train_on"}
    assert set(whys(notes)) <= unnamed


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"load_in_4bit": True}, "nf4"),
        ({"load_in_4bit": True, "use_bnb_nested_quant": True}, "nf4-double"),
        ({"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "int8"),
        ({"use_bnb_nested_quant": True}, None),
    ],
)
def test_a_quantised_base(given, kind):
    values, notes = convert(NAMED | {"use_peft": True, "lora_dropout": 0.0} | given, "sft")
    assert values["model"].get("quantize") == kind
    assert not set(whys(notes)) & given.keys()
    load_config("sft", values)


def test_what_the_file_does_not_name_is_said():
    values, notes = convert({"learning_rate": 1e-5}, "sft")
    assert values["model"]["source"] == "MODEL"
    assert values["data"]["train"] == ["DATA"]
    assert {"model.source", "data.train"} <= set(whys(notes))


def test_what_cannot_be_carried_is_said_with_its_reason():
    given = NAMED | {
        "optim": "galore_adamw",
        "label_smoothing_factor": 0.1,
        "learning_rates": 1.0,
        "lr_scheduler_type": "polynomial",
        "eval_strategy": "steps",
        "eval_steps": 0.1,
        "completion_only_loss": False,
        "load_in_4bit": True,
    }
    reasons = whys(convert(given, "sft")[1])
    assert set(reasons) == set(given) - {*NAMED, "eval_strategy", "completion_only_loss"}
    assert "learning_rate?" in reasons["learning_rates"]
    assert all(reasons.values())


@pytest.mark.parametrize(
    ("optim", "name", "options"),
    [
        ("adafactor", "adafactor", set()),
        ("lion_32bit", "lion", {"b1"}),
        ("sgd", "sgd", set()),
    ],
)
def test_optimizers_by_name_have_their_own_options_only(optim, name, options):
    given = NAMED | {"optim": optim, "adam_beta1": 0.8, "neftune_noise_alpha": 5}
    values, notes = convert(given, "sft")
    assert values["optimizer"]["name"] == name
    assert {"b1", "b2", "eps"} & set(values["optimizer"]) == options
    assert values["sft"]["neftune_alpha"] == 5
    assert [note.what for note in notes] == ["data.train_on: all"]
    assert "neftune_noise_alpha" in whys(convert(NAMED | {"neftune_noise_alpha": 5}, "reward")[1])


def test_a_decay_at_the_end_is_a_part_of_all_updates():
    given = NAMED | {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 20},
    }
    values, notes = convert(given | {"max_steps": 200}, "sft")
    assert (values["optimizer"]["schedule"], values["optimizer"]["decay_ratio"]) == ("wsd", 0.1)
    assert [note.what for note in notes] == ["data.train_on: all"]
    assert "max_steps" in " ".join(whys(convert(given, "sft")[1]).values())


@pytest.mark.parametrize(
    ("given", "trainer"),
    [
        ({"packing": False}, "sft"),
        ({"center_rewards_coefficient": None}, "reward"),
        ({"beta": 0.1, "loss_type": "ipo"}, "dpo"),
        ({"beta": 0.1, "loss_type": ["sigmoid", "sft"]}, "dpo"),
        ({"beta": 0.1, "undesirable_weight": 1.0}, "kto"),
        ({"cliprange": 0.2}, "ppo"),
        ({"num_generations": 8, "loss_type": "dapo"}, "grpo"),
        ({"num_generations": 8, "normalize_advantages": True}, "rloo"),
    ],
)
def test_the_trainer_is_found(given, trainer):
    assert find_trainer(given | {"learning_rate": 1e-5}) == trainer


@pytest.mark.parametrize(
    "given", [{}, {"beta": 0.1}, {"num_generations": 4}, {"lam": 1, "packing": 1}]
)
def test_an_unclear_trainer_is_asked_for(given):
    with pytest.raises(ValueError, match="--as"):
        find_trainer(given)


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match=r"num_generations=16.*--processes"):
        convert(NAMED | {"num_generations": 16}, "grpo")


def test_values_that_no_run_takes():
    with pytest.raises(ValueError, match=r"(?s)not valid.*beta"):
        convert(NAMED | {"beta": -1.0}, "kto")
    with pytest.raises(ValueError, match=r"max_steps='many': wanted a number"):
        convert(NAMED | {"max_steps": "many"}, "kto")


def test_the_command(tmp_path, capsys):
    source, target = tmp_path / "trl.json", tmp_path / "ours.yaml"
    given = NAMED | {"beta": 0.2, "tf32": True, "hub_token": "hf_mine", "eos_token": "<EOS_TOKEN>"}
    source.write_text(json.dumps(given, indent="\t"), encoding="utf-8")
    words = ["convert-trl", str(source), "--as", "dpo", "--out", str(target)]
    assert cli.main(words) == 0
    config = load_config("dpo", target)
    assert config.dpo.beta == 0.2
    told = capsys.readouterr().err
    assert "not carried over: tf32: True" in told
    assert "not carried over: hub_token: (not shown)" in told
    assert "hf_mine" not in told
    assert "eos_token" not in told  # what `to_dict` writes for any token
    assert cli.main(words) == 2  # it is there already
    assert "stays as it is" in capsys.readouterr().err
    assert cli.main(words[:-2]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == yaml.safe_load(target.read_text("utf-8"))
    assert printed.startswith("# From TRL's DPO arguments:  jaxalign dpo FILE\n")


def test_a_file_that_holds_no_arguments(tmp_path, capsys):
    source = tmp_path / "list.json"
    source.write_text("[1, 2]", encoding="utf-8")
    assert cli.main(["convert-trl", str(source), "--as", "sft"]) == 2
    assert "wanted an object of arguments, got a list" in capsys.readouterr().err
    assert cli.main(["convert-trl", "recipe:sft"]) == 2
    assert "this is ours already" in capsys.readouterr().err
