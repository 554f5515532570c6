"""The quickstart from a tiny model, cut down to two updates a stage, with the real example data."""

import json
import math
import pathlib

import chatmodel
import pytest

import jaxalign
from jaxalign.commands import cli
from jaxalign.commands.quickstart.stages import RECIPE
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.run.pipeline import EXAMPLES, load_stages

STAGES = ("sft", "reward", "ppo", "dpo")
FIGURES = {
    # Stage and title in the summary → the name of the held-out figure in `metrics.jsonl`.
    ("sft", "SFT loss"): "loss/nll",
    ("reward", "pairs ranked right"): "accuracy",
    ("ppo", "mean reward-model score"): "objective/scores",
    ("ppo", "standard deviation"): "objective/scores_std",
    ("ppo", "KL from the SFT model"): "objective/kl",
    ("dpo", "pairs ranked right"): "rewards/accuracies",
    ("dpo", "margin"): "rewards/margins",
}
HELD_OUT = {
    "sft": "conversations_heldout",
    "reward": "preferences_heldout",
    "ppo": "prompts_heldout",
    "dpo": "preferences_heldout",
}
SIZES = ("rows=8", "length=256")
# One token a byte makes long rows; 8 devices want 8 rows for each of PPO's two mini-batches.
SMALL = [
    *(f"{stage}.run.steps=2" for stage in STAGES),
    *(f"{stage}.optimizer.warmup_steps=0" for stage in STAGES),
    *(f"{stage}.data.{size}" for stage in ("sft", "reward", "dpo") for size in SIZES),
    "ppo.minibatches=2",
    "ppo.data.length=48",
    "ppo.data.rows=16",
    "ppo.ppo.max_new_tokens=6",
]


@pytest.mark.parametrize("language", ["en", pytest.param("zh", marks=pytest.mark.slow)])
def test_quickstart_leaves_every_figure_and_model(
    chat_models, tmp_path, capsys, kept_programs, language
):
    source, out = str(chat_models / "chat"), tmp_path / "quickstart"
    command = ["quickstart", "--model", source, "--language", language, "--out", str(out)]
    few = [f"{name}.data.eval={first_rows(tmp_path, language, HELD_OUT[name])}" for name in STAGES]
    assert cli.main([*command, *SMALL, *few]) == 0
    printed = capsys.readouterr().out

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["model"], summary["language"]) == (source, language)
    found = {}
    for figure in summary["figures"]:
        (name,) = [
            name
            for (stage, title), name in FIGURES.items()
            if stage == figure["stage"] and title in figure["figure"]
        ]
        found[figure["stage"], name] = figure["before"], figure["after"]
    assert len(found) == len(FIGURES) == len(summary["figures"])
    for (stage, name), (before, after) in found.items():
        rows = [r for r in chatmodel.lines(out / stage) if f"eval/{name}" in r]
        assert [(row["step"], row[f"eval/{name}"]) for row in rows] == [(0, before), (2, after)]

    iterations = [row for row in chatmodel.lines(out / "ppo") if "loss" in row]
    assert len(iterations) == len(summary["ppo"]) == 2
    for row, entry in zip(iterations, summary["ppo"], strict=True):
        assert entry["iteration"] == row["step"]
        for name in ("objective/scores", "objective/scores_std", "objective/kl"):
            assert entry[name] == row[name]
            assert math.isfinite(entry[name])

    prompts = [json.loads(line)["prompt"] for line in example_lines(language, "prompts_heldout")][
        :5
    ]
    assert [row["prompt"] for row in summary["answers"]] == prompts
    for row in summary["answers"]:
        assert set(row) == {"prompt", "base", "sft", "ppo", "dpo"}
    model, params = jaxalign.load_pretrained(source)
    expected = jaxalign.generate(
        model,
        params,
        chatmodel.make_tokenizer(),
        prompts,
        max_new_tokens=40,
        temperature=0.0,
    )
    assert [row["base"] for row in summary["answers"]] == expected

    assert set(summary["seconds"]) == {*STAGES, "answers", "total"}
    parts = sum(value for name, value in summary["seconds"].items() if name != "total")
    assert 0 < parts <= summary["seconds"]["total"] + 0.5  # each is rounded

    page = (out / "summary.md").read_text(encoding="utf-8")
    assert page in printed
    for figure in summary["figures"]:
        assert f"| {figure['figure']} | {figure['before']:.3f} | {figure['after']:.3f} |" in page
    assert all(prompt in page for prompt in prompts)
    assert str(out / "summary.json") in printed

    for stage in STAGES:
        model, _ = jaxalign.load_pretrained(out / stage / "model")
        assert type(model) is (Scorer if stage == "reward" else Decoder)
        assert jaxalign.load_tokenizer(out / stage / "model").chat_template


def example_lines(language, name):
    path = EXAMPLES / language / f"{name}.jsonl"
    return path.read_text(encoding="utf-8").splitlines()


def first_rows(folder, language, name):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(example_lines(language, name)[:8]), encoding="utf-8")
    return path


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_recipe_reads_all_example_data_of_a_language(language):
    given = ["defaults.model.source=some/model", "folder=out"]
    tok = chatmodel.make_tokenizer()
    makers = {
        "sft": jaxalign.sft_batches,
        "reward": jaxalign.preference_batches,
        "dpo": jaxalign.preference_batches,
        "ppo": jaxalign.prompt_batches,
    }
    for stage, config in load_stages(RECIPE, given, language):
        for sources in (config.data.train, config.data.eval):
            batches = makers[stage](
                sources, tok, rows=8, length=1024, chat_template=config.model.chat_template
            )
            (path,) = map(pathlib.Path, sources)
            assert batches.stats["kept"] == len(path.read_text(encoding="utf-8").splitlines())
            assert all(f"example_data/{language}/" in row.origin for row in batches.examples)


def test_each_stage_starts_where_it_should():
    stages = dict(load_stages(RECIPE, ["defaults.model.source=some/model", "folder=out"]))
    assert tuple(stages) == STAGES
    assert stages["sft"].model.source == "some/model"
    for stage in ("reward", "ppo", "dpo"):
        assert stages[stage].model.source == stages["sft"].run.folder + "/model"
    assert stages["ppo"].reward_model == stages["reward"].run.folder + "/model"
    # The comparison of RLHF and DPO is on one data set.
    assert stages["dpo"].data.train == stages["reward"].data.train
    assert stages["dpo"].data.eval == stages["reward"].data.eval


def test_a_mistake_is_found_before_the_first_stage(chat_models, tmp_path, capsys):
    command = ["quickstart", "--model", str(chat_models / "chat"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "dpo.dpo.betta=1"]) == 2
    error = capsys.readouterr().err
    assert "pipeline stage 'dpo'" in error
    assert "did you mean dpo.beta?" in error
    assert not (tmp_path / "out").exists()
