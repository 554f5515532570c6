"""Configuration: what is accepted, what is refused and how, and that every option is read."""

import ast
import dataclasses
import pathlib
import re
import typing

import pytest

import jaxalign
from jaxalign.algorithms import dpo, kto, ppo, reward, sft
from jaxalign.algorithms.guard import SpikeConfig
from jaxalign.algorithms.moving_reference import ReferenceSync
from jaxalign.algorithms.optim import OptimizerConfig
from jaxalign.commands.synth import config as synth
from jaxalign.data import Source
from jaxalign.losses.preference import option_names
from jaxalign.models.lora import LoraConfig
from jaxalign.rewards.specs import RewardSpec
from jaxalign.run.config import nearest
from jaxalign.run.config import runs as configs
from jaxalign.run.config.early_stopping import EarlyStopping
from jaxalign.run.config.eval_tasks import EvalTask
from jaxalign.run.config.runs import RUNS, load_config
from jaxalign.run.config.yaml import merge, override, read_yaml, to_values, write_yaml

PACKAGE = pathlib.Path(jaxalign.__file__).parent

LEAST = {
    "model": {"source": "some/model"},
    "data": {"train": ["rows.jsonl"]},
    "run": {"folder": "runs/x"},
}
PPO_LEAST = LEAST | {"reward_model": "some/scorer"}


def load(algorithm="sft", *assignments, **changes):
    least = PPO_LEAST if algorithm == "ppo" else LEAST
    return load_config(algorithm, merge(least, changes), assignments)


def complaint(algorithm="sft", *assignments, **changes):
    """The message of the one error."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (callers look at the message)
        load(algorithm, *assignments, **changes)
    return str(caught.value)


# What is accepted


def test_a_minimal_config_has_the_documented_defaults():
    config = load("sft")
    assert config.model == configs.ModelConfig(source="some/model")
    assert config.data.train == ("rows.jsonl",)
    assert (config.data.rows, config.data.length, config.data.epochs) == (32, 1024, 1)
    assert config.optimizer == OptimizerConfig()
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (1, -1, 1)
    assert config.sft == sft.Config()


def test_each_command_has_its_algorithm():
    assert {name: type(load(name)).__name__ for name in RUNS} == {
        "sft": "SFTRun",
        "reward": "RewardRun",
        "dpo": "DPORun",
        "kto": "KTORun",
        "ppo": "PPORun",
    }
    with pytest.raises(
        ValueError, match="algorithm='sfft': wanted one of sft, reward, dpo, kto, ppo"
    ):
        load_config("sfft", LEAST)


def test_overrides_are_yaml_and_reach_nested_keys():
    config = load(
        "sft",
        "data.rows=8",
        "data.train=[a.jsonl, b.jsonl]",
        "data.epochs=null",
        "run.steps=3",
        "run.resume=true",
        "optimizer.learning_rate=1e-5",
        "model.lora.rank=4",
        "model.lora.targets='layers.[0-3].*'",
        "model.lora.rank_pattern={down: 8, query: 2}",
        "model.chat_template='a=b'",
    )
    assert config.data.rows == 8
    assert config.data.train == ("a.jsonl", "b.jsonl")
    assert config.data.epochs is None
    assert config.run.resume is True
    assert config.optimizer.learning_rate == 0.00001
    patterns = {"down": 8, "query": 2}
    assert config.model.lora == LoraConfig(
        rank=4, targets=("layers.[0-3].*",), rank_pattern=patterns
    )
    assert to_values(config)["model"]["lora"]["rank_pattern"] == patterns
    assert config.model.chat_template == "a=b"


def test_an_override_leaves_the_source_untouched():
    values = {"data": {"rows": 4}}
    assert override(values, ["data.rows=8", "run.seed=1"]) == {
        "data": {"rows": 8},
        "run": {"seed": 1},
    }
    assert values == {"data": {"rows": 4}}


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "+1e-5", "1.e-5", "0.00001", "1.0e-5"])
def test_a_small_number_is_a_float(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"optimizer: {{learning_rate: {text}}}\n")
    assert read_yaml(path) == {"optimizer": {"learning_rate": 0.00001}}


def test_a_whole_number_may_stand_for_a_float_but_not_the_other_way_round():
    rate = load("sft", "optimizer.learning_rate=1").optimizer.learning_rate
    assert isinstance(rate, float)
    assert rate == 1.0
    assert "data.rows: wanted int, got 8.0" in complaint("sft", "data.rows=8.0")


def test_one_file_needs_no_list():
    assert load("sft", "data.train=a.jsonl").data.train == ("a.jsonl",)


def test_sources_may_have_options():
    given = "data.train=[a.jsonl, {path: b.jsonl, rows: 5, columns: {prompt: query}}]"
    assert load("sft", given).data.train == (
        "a.jsonl",
        Source(path="b.jsonl", rows=5, columns={"prompt": "query"}),
    )
    one = load("sft", "data.train={path: b.jsonl, weight: 2, name: b}").data.train
    assert one == (Source(path="b.jsonl", weight=2.0, name="b"),)
    assert "weight: 'b' has none" in complaint("sft", "data.train=[{path: a, weight: 1}, b]")
    told = complaint("sft", "data.train=[{path: b.jsonl, wait: 2, columns: [a]}]")
    assert "data.train[0].wait: unknown key; did you mean data.train[0].weight?" in told
    assert "data.train[0].columns: wanted a section, got ['a']" in told


def test_merge_goes_into_sections():
    base = {"run": {"seed": 0, "steps": 4}, "mesh": {"data": 1}}
    over = {"run": {"steps": 8}, "mesh": None, "extra": {"a": 1}}
    assert merge(base, over) == {"run": {"seed": 0, "steps": 8}, "mesh": None, "extra": {"a": 1}}
    assert base["run"] == {"seed": 0, "steps": 4}


FULL = {
    "sft": [
        "sft.log_entropy=true",
        "sft.loss_type=dft",
        "model.lora={rank: 2, targets: [query, out]}",
        "data.train=[{path: a.jsonl, weight: 0.5, columns: {prompt: q}}, {path: b, weight: 2}]",
        "data.packing=wrapped",
        "data.scripts=[latin, han]",
        "optimizer.learning_rates={'^embed/': 0.1x, lora_b: 1e-3, head: 1}",
        "optimizer.weight_decays={scale: 1e-2}",
        "optimizer.ema=0.999",
        "optimizer.ema_for=[eval]",
    ],
    "reward": ["reward.center_coef=0.01", "data.packing=true", "model.compute_dtype=bfloat16"],
    "dpo": [
        "dpo.loss_type=[ipo, discopop, sft]",
        "dpo.loss_weights=[1, 0.5, 2e-1]",
        "dpo.ipo_normalize=false",
        "dpo.f_divergence=alpha_divergence",
        "dpo.f_alpha=0.3",
        "dpo.discopop_tau=0.1",
        "dpo.ld_alpha=0.5",
        "dpo.wpo_weighting=true",
        "reference=other/model",
        "reference_sync={every: 8, alpha: 1}",
    ],
    "kto": ["kto.undesirable_weight=1.33", "reference_sync={alpha: 0.1}"],
    "ppo": [
        "ppo.stop_tokens=[2, 3]",
        "ppo.kl_target=6",
        "critic=some/critic",
        "critic_optimizer={learning_rate: 1e-6, max_grad_norm: null}",
        "minibatches=4",
        "ppo.samples=2",
        "ppo.ptx_coef=0.5",
        "ppo.mask_truncated=true",
        "ptx={train: [pretrain.jsonl], rows: 8, length: 64}",
        "calibrate_reward=mean_std",
        "target_kl=0.02",
    ],
}


@pytest.mark.parametrize("algorithm", RUNS)
def test_written_and_read_again_is_the_same(tmp_path, algorithm):
    config = load(
        algorithm,
        # Texts that a YAML reader could take for something else.
        "run.folder='1e-5'",
        "model.tokenizer='null'",
        "model.chat_template='none'",
        "data.eval=['yes', '007', 'kätzchen 猫.jsonl', 'a: b']",
        "optimizer.learning_rate=1e-7",
        *FULL[algorithm],
    )
    write_yaml(tmp_path / "config.yaml", config)
    assert load_config(algorithm, tmp_path / "config.yaml") == config
    assert "猫" in (tmp_path / "config.yaml").read_text(encoding="utf-8")


# What is refused


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("data.lenght=8", "data.lenght: unknown key; did you mean data.length?"),
        ("optimizer.lr=1", "optimizer.lr: unknown key; did you mean optimizer.learning_rate?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("data.batch-size=1", "data.batch-size: unknown key; did you mean data.rows?"),
        ("data.columns={}", "did you mean data.train: [{path: …, columns: …}]?"),
        ("model.warmup_ratio=1", "did you mean optimizer.warmup_ratio?"),
        ("optimiser.eps=1", "optimiser: unknown key; did you mean optimizer?"),
        ("optimizer.learningrate=1", "did you mean optimizer.learning_rate?"),
        ("sft.log_entropie=true", "did you mean sft.log_entropy?"),
        ("model.lora.ranks=2", "did you mean model.lora.rank?"),
        ("mesh.qqq=2", "mesh.qqq: unknown key; known: data, fsdp, tensor, sequence, expert"),
    ],
)
def test_an_unknown_key_names_the_nearest(assignment, told):
    assert told in complaint("sft", assignment)


def test_another_algorithms_section_is_unknown():
    assert "ppo: unknown key" in complaint("sft", "ppo.gamma=1")


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="missing") as caught:
        load_config("ppo", {"data": {}})
    told = str(caught.value).splitlines()[1:]
    assert {line.strip() for line in told} == {
        "data.train: missing",
        "model: missing",
        "run: missing",
        "reward_model: missing",
    }


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("data.rows=many", "data.rows: wanted int, got 'many'"),
        ("data.rows=true", "data.rows: wanted int, got True"),
        ("data.packing=1", "data.packing: wanted bool, got 1"),
        ("data.train=[a, 3]", "data.train[1]: wanted str, got 3"),
        ("optimizer.b1=high", "optimizer.b1: wanted float, got 'high'"),
        ("optimizer.b1=true", "optimizer.b1: wanted float, got True"),
        ("optimizer.learning_rate=null", "optimizer.learning_rate: wanted float, got None"),
        ("optimizer=3", "optimizer: wanted a section, got 3"),
        ("mesh=null", "mesh: wanted a section, got None"),
        ("run.steps=[1]", "run.steps: wanted int, got [1]"),
        ("model.source=null", "model.source: wanted str, got None"),
    ],
)
def test_a_wrong_type_is_named(assignment, told):
    assert told in complaint("sft", assignment)


def test_all_problems_are_in_one_error():
    told = complaint(
        "sft",
        "data.lenght=8",
        "data.rows=many",
        "optimizer.b1=2",
        "run.steps=-1",
        "model.dtype=float99",
    )
    for part in ("lenght", "data.rows", "b1=2", "run.steps=-1", "model.dtype='float99'"):
        assert part in told
    assert len(told.splitlines()) == 6  # a head line, and one line a problem


OUT_OF_RANGE = {
    "sft": (
        "sft.loss_type=dtf",
        "model.dtype=int8",
        "model.compute_dtype=float8",
        "model.remat=some",
        "model.lora.rank=0",
        "model.lora.targets=[]",
        "model.lora.targets=[elbow]",
        "model.lora.targets=['layers.(']",
        "model.lora.alpha=0",
        "model.lora.dropout=0.1",
        "model.lora.init=svd",
        "model.lora.rank_pattern={query: 0}",
        "model.lora.rank_pattern={query: 1.5}",
        "model.lora.alpha_pattern={query: -1}",
        "data.train=[]",
        "data.rows=0",
        "data.length=1",
        "data.epochs=0",
        "data.packing=loose",
        "data.train_on=some",
        "data.keep=middle",
        "data.buckets=[64, 32]",
        "data.buckets=[2048]",  # wider than a row
        "data.temperature=0",
        "data.validation=0",
        "data.validation=1.5",
        "data.dedup=fuzzy",
        "data.dedup_threshold=0",
        "data.script_share=2",
        "data.min_tokens=-1",
        "data.max_tokens=0",
        "data.on_error=ignore",
        "data.window=0",
        "data.prefetch=-1",
        "data.train=[{path: a, weight: 0}]",
        "data.train=[{path: a, rows: -1}]",
        "data.train=[{path: ''}]",
        "data.scripts=[klingon]",
        "data.shared_prefix=true",  # SFT has no pairs
        "data.streaming=true",  # without run.steps
        "run.steps=0",
        "run.micro_batches=0",
        "run.log_every=0",
        "run.eval_every=-1",
        "run.save_every=-1",
        "run.keep=0",
        "optimizer.learning_rate=-1",
        "optimizer.learning_rate=.nan",
        "optimizer.schedule=zigzag",
        "optimizer.warmup_steps=-1",
        "optimizer.total_steps=0",
        "optimizer.end_fraction=1.5",
        "optimizer.b1=1",
        "optimizer.b2=-0.1",
        "optimizer.eps=0",
        "optimizer.weight_decay=-1",
        "optimizer.max_grad_norm=0",
        "optimizer.name=adam",
        "optimizer.learning_rates={a: fast}",
        "optimizer.weight_decays={a: -1}",
        "optimizer.decay_ratio=0",
        "optimizer.momentum=1",
        "optimizer.muon_rms=0",
        "optimizer.ema=1",
        "optimizer.ema_for=[]",
        "sft.neftune_alpha=0",
    ),
    "reward": (
        "data.packing=wrapped",
        "data.train_on=last",
        "reward.center_coef=-1",
        "reward.label_smoothing=0.5",
        "reward.objective=stars",
        "reward.ranking=all_pairs",  # an option of `ranking` only
        "reward.attributes=[helpfulness]",  # an option of `regression` only
        "head=random",
        "answers=3",  # an option of `ranking` only
    ),
    "dpo": (
        "dpo.beta=0",
        "dpo.loss_type=cosine",
        "dpo.label_smoothing=0.5",
        "dpo.label_smoothing=-0.1",
        "dpo.ipo_normalize=false",  # an option of `ipo` only
        "dpo.loss_type=[sigmoid, sigmoid]",
        "dpo.loss_type=[sigmoid, simpo]",
        "dpo.loss_weights=[1, 2]",
        "dpo.loss_weights=[-1]",
        "dpo.f_divergence=chi",
        "dpo.f_alpha=0.3",  # of `alpha_divergence` only
        "dpo.discopop_tau=1",
        "dpo.simpo_gamma=1",
        "dpo.ld_alpha=2",
        "dpo.sft_coef=-1",
        "reference_sync.every=0",
        "reference_sync.alpha=0",
    ),
    "kto": (
        "kto.beta=0",
        "kto.desirable_weight=0",
        "kto.undesirable_weight=-1",
        "data.packing=true",
    ),
    "ppo": (
        "ppo.max_new_tokens=0",
        "ppo.temperature=0",
        "ppo.top_k=-1",
        "ppo.top_p=0",
        "ppo.kl_coef=-1",
        "ppo.kl_estimator=k9",
        "ppo.kl_in=prompt",
        "ppo.kl_target=0",
        "ppo.kl_horizon=0",
        "ppo.gamma=1.1",
        "ppo.lam=-0.1",
        "ppo.clip_range=0",
        "ppo.dual_clip=0.5",
        "ppo.clip_range_value=-1",
        "ppo.vf_coef=-1",
        "ppo.whiten_ddof=2",
        "ppo.score_at=start",
        "ppo.missing_eos_penalty=-1",
        "ppo.logprob_tolerance=0",
        "ppo_epochs=0",
        "minibatches=0",
        "critic_head=random",
        "minibatches=5",  # no divisor of 32 rows
        "ppo.advantage_estimator=gea",
        "ppo.samples=0",
        "ppo.slots=0",
        "ppo.cache_dtype=int8",
        "ppo.speculate=-1",
        "ppo.score_early=maybe",
        "ppo.sampling_weights=int4",
        "ppo.scale_rewards=rows",
        "ppo.importance_sampling_level=word",
        "ppo.loss_aggregation=mean",
        "ppo.ptx_coef=-1",
        "ppo.reward_clip=0",
        "critic_warmup=-1",
        "target_kl=0",
        "calibrate_reward=std",
        "dump_every=-1",
        "dump_samples=0",
        "critic_optimizer.b1=7",
        "reward_weights={}",
        "reward_weights=3",
        "reward_weights={helpfulness: high}",
    ),
}


@pytest.mark.parametrize(
    ("algorithm", "assignment"), [(a, s) for a, given in OUT_OF_RANGE.items() for s in given]
)
def test_a_value_out_of_range_is_named(algorithm, assignment):
    key = assignment.split("=")[0].split(".")
    told = complaint(algorithm, assignment)
    named = key[1] if key[:2] == ["model", "lora"] else key[-1]
    assert named in told
    assert "unknown key" not in told


def test_options_that_would_be_ignored_together_are_refused():
    for option in ("data.packing=true", "data.shared_prefix=true"):
        told = complaint("reward", "reward.objective=steps", option)
        assert f"{option.split('=')[0]}=True: wanted false with reward.objective=steps" in told
    assert "run.steps" in complaint("sft", "data.epochs=null")
    assert "run.eval_every=5: wanted 0 without data.eval" in complaint("sft", "run.eval_every=5")
    told = complaint("sft", "run.checkpoint=false", "run.save_every=5")
    assert "run.save_every=5: wanted run.checkpoint=true" in told
    told = complaint("sft", "run.checkpoint=false", "run.resume=true")
    assert "run.resume=True: wanted run.checkpoint=true" in told
    assert "kl_target" in complaint("ppo", "ppo.kl_target=1", "ppo.kl_in=loss")
    assert "buckets" in complaint("sft", "data.buckets=[64]", "data.packing=true")
    assert "data.validation" in complaint("sft", "data.validation=0.1", "data.eval=a.jsonl")
    streaming = ("data.streaming=true", "run.steps=3")
    for told, option in (
        ("dedup", "data.dedup=near"),
        ("buckets", "data.buckets=[64]"),
        ("validation", "data.validation=8"),
        ("temperature", "data.temperature=2"),
    ):
        assert told in complaint("sft", *streaming, option)


RLOO = ("ppo.advantage_estimator=rloo", "ppo.samples=2")


@pytest.mark.parametrize(
    ("algorithm", "assignments", "told"),
    [
        ("dpo", ("dpo.loss_type=sft", "dpo.ld_alpha=0.5"), "ld_alpha=0.5 has no effect"),
        ("dpo", ("dpo.loss_type=cpo", "dpo.ld_alpha=0.5"), "ld_alpha=0.5 has no effect"),
        ("dpo", ("dpo.loss_type=aot", "dpo.wpo_weighting=true"), "wpo_weighting=True with"),
        ("dpo", ("dpo.loss_type=sft", "dpo.wpo_weighting=true"), "wpo_weighting=True with"),
        ("dpo", ("dpo.loss_type=[ipo, sft]", "dpo.sft_coef=1"), "say it once"),
        ("dpo", ("dpo.loss_type=aot", "run.micro_batches=2"), "use micro_batches=1"),
        ("dpo", ("dpo.loss_type=simpo", "reference=x"), "reference='x': wanted null"),
        ("dpo", ("dpo.loss_type=orpo", "reference_cache=x"), "reference_cache='x': wanted null"),
        ("dpo", ("dpo.loss_type=cpo", "reference_sync={}"), "has no reference"),
        ("dpo", ("reference_cache=x", "reference_sync={}"), "null with reference_sync"),
        ("dpo", ("reference=x", "reference_sync={}", "model.lora={}"), "cannot be moved"),
        ("dpo", ("offload_frozen=true", "model.lora={}"), "offload_frozen=True: wanted false"),
        ("dpo", ("offload_frozen=true", "reference_cache=x"), "offload_frozen=True: wanted false"),
        ("kto", ("offload_frozen=true", "reference_sync={}"), "offload_frozen=True: wanted false"),
        ("ppo", ("ppo.advantage_estimator=grpo",), "samples=1: wanted 2 or more"),
        ("ppo", ("ppo.skip_equal_groups=true",), "samples=1: wanted 2 or more"),
        ("ppo", ("prompt_draws=0",), "prompt_draws=0: wanted positive"),
        ("ppo", ("prompt_draws=2", "data.epochs=2"), "prompt_draws=2: wanted 1, or ppo.skip_equal"),
        ("ppo", (*RLOO, "ppo.lam=0.9"), "lam=0.9: wanted 0.95 with rloo"),
        ("ppo", (*RLOO, "ppo.gamma=0.9"), "gamma=0.9: wanted 1.0 with rloo"),
        ("ppo", (*RLOO, "ppo.scale_rewards=none"), "scale_rewards='none': wanted 'group' with"),
        ("ppo", (*RLOO, "critic=x"), "critic='x': wanted null, or leave it out"),
        ("ppo", (*RLOO, "critic_warmup=2"), "critic_warmup=2: wanted 0"),
        ("ppo", ("ppo.shared_critic=true", "critic=x"), "critic='x': wanted null with ppo.shared"),
        ("ppo", ("ppo.ptx_coef=1",), "ptx=None: wanted data where ppo.ptx_coef is above 0"),
        ("kto", ("reference=x", "reference_sync={}", "model.lora={}"), "cannot be moved"),
    ],
)
def test_preference_options_that_contradict_one_another_are_refused(algorithm, assignments, told):
    assert told in complaint(algorithm, *assignments)


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("data.rows", "wanted key=value"),
        ("=8", "wanted key=value"),
        ("data.rows.x=8", "'rows' is no section"),
        ("data.train=[a", "override 'data.train=[a'"),
    ],
)
def test_a_broken_override_is_shown(assignment, told):
    assert told in complaint("sft", assignment, data={"rows": 4})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model:\n  source: [a\nrun: 3\n", r"run\.yaml.*line 3"),
        ("data:\n  rows: 8\n  length: 9\n  rows: 4\n", r"'rows' is given twice.*line 4"),
        ("- a\n- b\n", r"wanted 'key: value' lines, got a list"),
        ("", r"the file is empty; wanted 'key: value' lines"),
        ("a: !!python/object/apply:os.getcwd []\n", r"could not determine a constructor.*line 1"),
    ],
)
def test_broken_yaml_names_file_and_line(tmp_path, text, told):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml") as caught:
        read_yaml(path)
    assert re.search(told, str(caught.value), re.DOTALL)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml.*no such file"):
        load_config("sft", tmp_path / "absent.yaml")


# Every option is read

READERS = {
    # Class → the files that read it, and the names under which they hold it.
    configs.ModelConfig: (("run/tasks/*.py", "run/export.py"), {"config", "model"}),
    configs.DataConfig: (
        ("run/tasks/*.py", "data/*.py"),
        {"data", "options", "_options"},
    ),
    Source: (("data/mixture.py", "data/prepare.py", "data/stream.py"), {"options", "self", "item"}),
    configs.MeshConfig: (("run/tasks/*.py", "run/config/mesh.py"), {"mesh", "self"}),
    configs.RunConfig: (("run/tasks/*.py", "run/loop.py", "run/folder.py"), {"run"}),
    SpikeConfig: (("algorithms/guard.py",), {"config", "self"}),
    EvalTask: (("run/evaluation/tasks.py", "run/config/eval_tasks.py"), {"task", "self"}),
    EarlyStopping: (("run/early_stopping.py",), {"config", "_config"}),
    configs.SFTRun: (("run/tasks/*.py", "run/loop.py"), {"config"}),
    configs.RewardRun: (("run/tasks/*.py", "run/loop.py"), {"config"}),
    configs.DPORun: (("run/tasks/*.py", "run/loop.py", "run/tasks/reference.py"), {"config"}),
    configs.KTORun: (("run/tasks/*.py", "run/loop.py", "run/tasks/reference.py"), {"config"}),
    configs.PPORun: (
        ("run/tasks/*.py", "run/loop.py", "run/config/ppo.py"),
        {"config", "self", "_config"},
    ),
    RewardSpec: (("rewards/build.py", "rewards/specs.py"), {"spec", "self"}),
    **{
        spec: (
            (f"{spec.__module__.partition('.')[2].replace('.', '/')}.py", "rewards/build.py"),
            {"spec", "self"},
        )
        for spec in RewardSpec.kinds().values()
    },
    OptimizerConfig: (("algorithms/optim.py",), {"config"}),
    LoraConfig: (
        ("models/adapters.py", "models/layers.py", "models/lora.py", "hf/peft_config.py"),
        {"lora", "config"},
    ),
    sft.Config: (("algorithms/sft.py",), {"config"}),
    reward.Config: (("algorithms/reward.py", "run/tasks/evaluate.py"), {"config"}),
    dpo.Config: (("algorithms/dpo.py",), {"config", "self"}),
    kto.Config: (("algorithms/kto.py",), {"config"}),
    ReferenceSync: (("algorithms/moving_reference.py",), {"sync"}),
    ppo.Config: (("algorithms/ppo/*.py",), {"config", "self"}),
    synth.SynthRun: (("commands/synth/run.py",), {"config"}),
    synth.RewardModelConfig: (("commands/synth/models.py",), {"config", "reward_model"}),
    synth.WriterConfig: (
        ("commands/synth/run.py", "commands/synth/models.py"),
        {"config", "writer"},
    ),
    synth.LocalConfig: (("commands/synth/models.py",), {"local"}),
    synth.ServerConfig: (("commands/synth/server.py",), {"config", "_config"}),
    synth.InstructConfig: (
        ("commands/synth/run.py", "commands/synth/instruct.py", "commands/synth/filters.py"),
        {"config", "_config", "options"},
    ),
    synth.PreferenceConfig: (
        ("commands/synth/run.py", "commands/synth/preferences.py"),
        {"config", "_config", "options"},
    ),
}


def reads(files, holders):
    """All `a` in `holder.a`, or in `x.holder.a`, outside of `__post_init__`."""
    found = set()

    def visit(node):
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            inner = node.value
            holder = getattr(inner, "attr", getattr(inner, "id", None))
            if holder in holders:
                found.add(node.attr)
        for child in ast.iter_child_nodes(node):
            visit(child)

    for file in files:
        for path in PACKAGE.glob(file):
            visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_the_table_of_readers_holds_every_config_class():
    found, todo = set(), [*RUNS.values(), synth.SynthRun]
    while todo:
        cls = todo.pop()
        todo += typing.get_args(cls)
        if dataclasses.is_dataclass(cls) and cls not in found:
            found.add(cls)
            todo += cls.kinds().values() if hasattr(cls, "kinds") else ()
            for hint in typing.get_type_hints(cls).values():
                todo += [hint, *typing.get_args(hint)]
    assert found == set(READERS)


@pytest.mark.parametrize("cls", READERS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_option_is_read(cls):
    files, holders = READERS[cls]
    options = {field.name for field in dataclasses.fields(cls)}
    assert options
    found = reads(files, holders)
    if cls is dpo.Config:  # passed on by their names in the table of losses
        found |= set(option_names())
    assert not options - found


@pytest.mark.parametrize("option", nearest._ELSEWHERE)
def test_the_option_that_a_key_of_others_means_is_there(option):
    section, name = re.match(r"(\w+)\.(\w+)", option).groups()
    inner = typing.get_type_hints(configs.SFTRun)[section]
    assert name in {field.name for field in dataclasses.fields(inner)}
    for key in nearest._ELSEWHERE[option].split():
        assert option in nearest.hint(key, "", (), configs.SFTRun)
    # An entry of a list has keys of its own.
    assert nearest.hint("columns", "rewards[0].", ("kind",), configs.SFTRun) == "known: kind"
