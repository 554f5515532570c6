"""`--adapter`: `generate`, `chat` and `score` with several adapters on one base in memory."""

import json
import sys

import chatmodel
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.commands import cli
from jaxalign.commands.adapters import named_adapters
from jaxalign.hf import save_adapter
from jaxalign.models.base import combine
from jaxalign.models.lora import LoraConfig, add_lora
from jaxalign.models.scorer import Scorer, with_scalar_head

LORA = LoraConfig(rank=2, alpha=8.0, targets=("query", "down"))


def write(folder, base, seed, scorer=False):
    """An adapter that says something, with a head of its own if it is to score."""
    model, params = jaxalign.load_pretrained(base)
    model, trained, frozen = add_lora(model, params, jax.random.key(seed), LORA)
    trained = jax.tree.map(lambda x: x + 0.1 * (seed + 1), trained)
    params, tok = combine(trained, frozen), None
    if scorer:
        plain = model
        model, params = with_scalar_head(plain, params, jax.random.key(seed))
        assert isinstance(model, Scorer)
    else:
        tok = chatmodel.make_tokenizer()
        tok.chat_template = chatmodel.CHATML.replace("user", f"user{seed}")
    save_adapter(model, params, folder, base=str(base), tokenizer=tok)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(chat_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [write(folder / name, chat_models / "chat", seed) for seed, name in enumerate("ab")]


class Recorder:
    """In the place of `jaxalign.generate`: keeps what it was called with."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(sys.modules["jaxalign.sampling.generate"], "generate", self.generate)

    def generate(
        self, model, params, tok, prompts, *, max_new_tokens: "int" = 64, key=None, on_text=None
    ):
        self.calls.append((model, chatmodel.leaves(params), tok, prompts, params))
        return [f"answer {len(self.calls)}" for _ in prompts]


def test_each_adapter_answers_on_the_one_base(chat_models, adapters, monkeypatch, capsys):
    recorder = Recorder(monkeypatch)
    base = str(chat_models / "chat")
    command = ["generate", base, "--adapter", f"one={adapters[0]}", "--adapter", adapters[1]]
    assert cli.main([*command, "hi", "ho"]) == 0
    printed = capsys.readouterr()
    assert (
        printed.out
        == "> hi\n[one]\nanswer 1\n[b]\nanswer 2\n\n> ho\n[one]\nanswer 1\n[b]\nanswer 2\n\n"
    )
    assert printed.err == ""
    (one, first, tok, prompts, params), (two, second, _, _, others) = recorder.calls
    assert prompts == ["hi", "ho"]
    assert tok.chat_template == chatmodel.CHATML.replace("user", "user0")
    assert one.lora.rank == two.lora.rank == 2
    # A is PEFT's initial value and the seed's tenth, see `write`; B the latter alone.
    name = "['blocks']['mlp']['down']['lora_b']"
    np.testing.assert_allclose(first[name], 0.1, rtol=1e-6)
    np.testing.assert_allclose(second[name], 0.2, rtol=1e-6)
    # All other arrays are the same ones in memory.
    at = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree))  # noqa: E731
    shared = [k for k, v in at(params).items() if v is at(others)[k]]
    assert len(shared) == len(first) - 4


def test_without_adapters_the_model_itself_answers(chat_models, adapters, monkeypatch, capsys):
    recorder = Recorder(monkeypatch)
    assert cli.main(["generate", str(chat_models / "chat"), "hi"]) == 0
    assert cli.main(["generate", str(chat_models / "chat"), "--adapter", adapters[0], "hi"]) == 0
    assert capsys.readouterr().out == "> hi\nanswer 1\n\n> hi\nanswer 2\n\n"
    assert [model.lora is None for model, *_ in recorder.calls] == [True, False]


def test_a_conversation_goes_from_adapter_to_adapter(chat_models, adapters, monkeypatch, capsys):
    recorder = Recorder(monkeypatch)
    lines = iter(
        ["hello", "/adapter", "/adapter b", "more", "/adapter c", "/adapter base", "x", ""]
    )
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    base = str(chat_models / "chat")
    assert cli.main(["chat", base, "--adapter", adapters[0], "--adapter", adapters[1]]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "answer 1",
        "a answers; there are a, b, base",
        "b answers from here on; the conversation stays",
        "answer 2",
        "/adapter: got 'c', wanted one of a, b, base",
        "base answers from here on; the conversation stays",
        "answer 3",
    ]
    name = "['blocks']['mlp']['down']['lora_b']"
    values = [float(params[name].mean()) if name in params else None
              for _, params, *_ in recorder.calls]  # fmt: skip
    assert values == [pytest.approx(0.1), pytest.approx(0.2), None]
    assert [len(prompts[0]) for *_, prompts, _ in recorder.calls] == [1, 3, 5]


def test_adapters_score_as_their_merged_models(chat_models, tmp_path, capsys):
    base = chat_models / "chat"
    folders = [write(tmp_path / name, base, seed, scorer=True) for seed, name in enumerate("ab")]
    rows = chatmodel.write_rows(tmp_path / "rows.jsonl", chatmodel.PAIRS[:3])
    command = ["score", str(base), "--adapter", folders[0], "--adapter", f"two={folders[1]}"]
    assert cli.main([*command, rows, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().err.startswith("a: 3 rows scored")
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for folder, column in zip(folders, ("reward_a", "reward_two"), strict=True):
        assert cli.main(["score", folder, rows, "--out", str(tmp_path / f"{column}.jsonl")]) == 0
        lines = (tmp_path / f"{column}.jsonl").read_text().splitlines()
        for row, line in zip(scored, lines, strict=True):
            merged = json.loads(line)["reward"]
            assert row[column] == pytest.approx(merged, abs=1e-5)
            assert abs(merged["chosen"]) > 1e-3
    # Alone, the column has its usual name.
    assert cli.main(["score", str(base), "--adapter", folders[0], rows]) == 0
    (first, *_) = capsys.readouterr().out.splitlines()
    assert json.loads(first)["reward"] == pytest.approx(scored[0]["reward_a"], abs=1e-6)


def test_names_are_told_apart(tmp_path):
    (tmp_path / "x=y").mkdir()
    assert named_adapters([str(tmp_path / "x=y"), "k=me/kind", "me/other"]) == {
        "x=y": str(tmp_path / "x=y"),
        "k": "me/kind",
        "other": "me/other",
    }
    for texts, message in (
        (["me/kind", "you/kind"], r"'kind' is me/kind; give another name: --adapter NAME=you/kind"),
        (["base=me/kind"], "'base' is the model without adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            named_adapters(texts)


def test_what_does_not_fit_is_named(chat_models, adapters, tmp_path, capsys):
    chat, scorer = str(chat_models / "chat"), str(chat_models / "scorer")
    head = write(tmp_path / "head", chat_models / "chat", 0, scorer=True)
    rows = chatmodel.write_rows(tmp_path / "rows.jsonl", chatmodel.PAIRS[:1])
    for command, message in (
        (["generate", scorer, "--adapter", adapters[0], "hi"], "is a reward model"),
        (["generate", chat, "--adapter", head, "hi"], "is a reward model"),
        (["generate", chat, "--adapter", chat, "hi"], "adapter_config.json does not exist"),
        (["score", chat, "--adapter", adapters[0], rows], "without a score"),
        (
            ["generate", chat, "--adapter", adapters[0], "--adapter", adapters[1],
             "--best-of", "2", "--reward-model", scorer, "hi"],
            "wanted one --adapter at most",
        ),
    ):  # fmt: skip
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err


def test_another_base_of_the_same_shape_is_mentioned(
    chat_models, adapters, tmp_path, capsys, monkeypatch
):
    Recorder(monkeypatch)
    model, params = jaxalign.load_pretrained(chat_models / "chat")
    other = tmp_path / "other"
    jaxalign.save_pretrained(model, params, other, tokenizer=chatmodel.make_tokenizer())
    assert cli.main(["generate", str(other), "--adapter", adapters[0], "hi"]) == 0
    named = str(chat_models / "chat")
    assert f"note: the adapter a names the base {named}, not {other}" in capsys.readouterr().err
