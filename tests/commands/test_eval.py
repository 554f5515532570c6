"""`jaxalign eval`: each measure against numpy over logits, or by hand with scripted answers."""

import json

import chatmodel
import jax
import numpy as np
import pytest

from jaxalign.commands import cli
from jaxalign.commands.eval import measures
from jaxalign.commands.eval.language_model import EvalOptions, EvaluatedModel
from jaxalign.data.chat import Encoded
from jaxalign.rewards.evaluation import wilson
from jaxalign.rewards.scoring import Scored

pytestmark = pytest.mark.usefixtures("kept_programs")

OPTIONS = EvalOptions(batch=4, length=64, max_new_tokens=6)


@pytest.fixture(scope="module")
def model(chat_models):
    return EvaluatedModel.load(str(chat_models / "chat"), OPTIONS)


@pytest.fixture(scope="module")
def other(model):
    """The model with weights that are somewhat larger."""
    params = jax.tree.map(lambda x: 1.1 * x, model.params)
    return EvaluatedModel(model.model, params, model.tok, OPTIONS)


def logprobs(model, ids):
    """log π of each token but the first, from the logits of the row alone."""
    ids = np.asarray(ids, np.int32)
    hidden = model.model.apply(model.params, ids[None])
    logits = np.asarray(model.model.logits(model.params, hidden), np.float64)[0, :-1]
    top = logits.max(axis=-1, keepdims=True)
    normed = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    return normed[np.arange(len(ids) - 1), ids[1:]]


def answer_logprobs(model, question, answer):
    """Of the tokens of a ChatML answer, its end included."""
    start = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = model.tok(f"{start}{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    size = len(model.tok(start, add_special_tokens=False)["input_ids"])
    return logprobs(model, ids)[size - 1 :]


# --- likelihoods ----------------------------------------------------------------------------------


def test_loss_and_perplexity_are_those_of_the_answers_tokens(model, tmp_path):
    files = [
        chatmodel.write_rows(tmp_path / "a.jsonl", chatmodel.CONVERSATIONS[:3]),
        chatmodel.write_rows(tmp_path / "b.jsonl", chatmodel.CONVERSATIONS[3:8]),
    ]
    values = [
        answer_logprobs(model, *(message["content"] for message in row["messages"]))
        for row in chatmodel.CONVERSATIONS[:8]
    ]
    figures = measures.measure_loss(model, files).figures
    assert set(figures) == {f"{n}{s}" for n in ("nll", "perplexity") for s in ("", "/a", "/b")}
    for name, part in (("", values), ("/a", values[:3]), ("/b", values[3:])):
        expected = -np.concatenate(part).mean()
        assert figures[f"nll{name}"].value == pytest.approx(expected, rel=1e-5)
        assert figures[f"perplexity{name}"].value == pytest.approx(np.exp(expected), rel=1e-5)
        assert figures[f"nll{name}"].count == sum(map(len, part))


def test_logprobs_do_not_depend_on_company(model):
    rng = np.random.default_rng(0)
    sizes = (3, 40, 7, 9, 70, 2)
    documents = [
        Encoded(rng.integers(4, 200, n).astype(np.int32), np.arange(n) % 3 != 1) for n in sizes
    ]
    for document, found in zip(documents, model.logprobs(documents), strict=True):
        expected = logprobs(model, document.ids)[document.trained[1:]]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_kl_is_measured_on_the_models_own_answers(model, other, tmp_path):
    file = chatmodel.write_rows(tmp_path / "p.jsonl", chatmodel.PROMPTS[:6])
    same = measures.measure_kl(model, model, [file]).figures
    assert same["kl"].value == pytest.approx(0, abs=1e-6)
    figures = measures.measure_kl(model, other, [file]).figures
    samples = model.samples([row["prompt"] for row in chatmodel.PROMPTS[:6]])
    gaps = []
    for row, sampled in zip(chatmodel.PROMPTS, samples, strict=False):
        ids, marks = sampled.document
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert model.tok.decode(ids[~marks]) == prompt
        gaps.append((logprobs(model, ids) - logprobs(other, ids))[marks[1:]])
    sums = np.array([gap.sum() for gap in gaps])
    assert figures["kl"].value == pytest.approx(sums.mean(), abs=1e-4)
    half = 1.959964 * sums.std(ddof=1) / np.sqrt(6)
    assert figures["kl"].high == pytest.approx(sums.mean() + half, abs=1e-3)
    flat = np.concatenate(gaps)
    assert figures["kl_token"].value == pytest.approx(np.mean(np.exp(-flat) - 1 + flat), abs=1e-4)
    assert figures["kl_token"].value > 0


def test_a_reference_of_other_tokens_is_refused(model, tmp_path):
    tok = chatmodel.make_tokenizer()
    tok.add_tokens(["more"])
    stranger = EvaluatedModel(model.model, model.params, tok, OPTIONS)
    with pytest.raises(ValueError, match="another vocabulary"):
        measures.measure_kl(model, stranger, ["x"])


CHOICES = [
    {"question": "1+1", "choices": ["two", "3", "fish"], "answer": 0},
    {"prompt": "sky", "choices": ["red", "blue"], "answer": "B"},
    {"query": "sea", "choices": {"text": ["wet", "dry"], "label": ["1", "2"]}, "answerKey": "1"},
    {"question": "end", "choices": ["yes", "no"], "gold": "no"},
]
RIGHT = [0, 1, 0, 1]


@pytest.mark.parametrize("template", [None, "none"])
def test_a_choice_is_the_most_probable_one(model, tmp_path, template):
    options = EvalOptions(batch=4, length=64, chat_template=template)
    asked = EvaluatedModel(model.model, model.params, model.tok, options)
    file = chatmodel.write_rows(tmp_path / "c.jsonl", CHOICES)
    result = measures.measure_choice(asked, [file])
    plain, normed = [], []
    for row, right, kept in zip(CHOICES, RIGHT, result.rows, strict=True):
        question = next(row[name] for name in ("question", "prompt", "query") if name in row)
        choices = row["choices"]["text"] if isinstance(row["choices"], dict) else row["choices"]
        if template is None:
            sums = [answer_logprobs(model, question, choice).sum() for choice in choices]
        else:
            ids = [model.tok(f"{question} {c}")["input_ids"] for c in choices]
            sums = [logprobs(model, one)[len(question) - 1 :].sum() for one in ids]
        assert kept["logprobs"] == pytest.approx(sums, abs=1e-4)
        assert kept["right"] == right
        plain.append(np.argmax(sums) == right)
        normed.append(np.argmax([s / len(c) for s, c in zip(sums, choices, strict=True)]) == right)
    assert result.figures["accuracy"][:4] == (np.mean(plain), *wilson(sum(plain), 4), 4)
    assert result.figures["accuracy_norm"].value == np.mean(normed)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a"], "answer": 0}, "choices: got"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer: got 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "answer: got"),
        ({"question": "q", "choices": ["a", "b"]}, "the right choice"),
        ({"choices": ["a", "b"], "answer": 0}, "no question"),
    ],
)
def test_a_wrong_row_of_choices_is_named(model, tmp_path, row, message):
    file = chatmodel.write_rows(tmp_path / "c.jsonl", [row])
    with pytest.raises(ValueError, match=r"c\.jsonl:1") as caught:
        measures.measure_choice(model, [file])
    assert message in str(caught.value)


# --- answers --------------------------------------------------------------------------------------


class Scripted:
    """A model whose answers are given."""

    options = OPTIONS

    def __init__(self, *answers):
        self.given, self.asked = list(answers), None

    def answers(self, prompts):
        self.asked = list(prompts)
        return self.given


def test_gsm8k_counts_final_numbers(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"so\n#### {i}"} for i in range(4)]
    file = chatmodel.write_rows(tmp_path / "g.jsonl", rows)
    asked = Scripted("#### 0", "the answer is 1", "#### 7", "none")
    result = measures.measure_gsm8k(asked, [file])
    assert asked.asked == ["q0", "q1", "q2", "q3"]
    assert result.figures["strict"][:4] == (0.25, *wilson(1, 4), 4)
    assert result.figures["flexible"].value == 0.5
    assert result.rows[1] == {"origin": f"{file}:2", "answer": "the answer is 1", "right": "1"}


def test_ifeval_counts_prompts_and_instructions(tmp_path):
    both = ["punctuation:no_comma", "startend:quotation"]
    rows = [
        {"prompt": "a", "instruction_id_list": both, "kwargs": [{}, {}]},
        {"prompt": "b", "instruction_id_list": both[:1], "kwargs": [{}]},
    ]
    file = chatmodel.write_rows(tmp_path / "i.jsonl", rows)
    result = measures.measure_ifeval(Scripted("No comma.", "One, two."), [file])
    assert result.figures["prompt_strict"][:4] == (0.0, *wilson(0, 2), 2)
    assert result.figures["instruction_strict"][:4] == (1 / 3, *wilson(1, 3), 3)


# --- rewards --------------------------------------------------------------------------------------


def test_reward_accuracy_is_counted_by_source(tmp_path, monkeypatch):
    margins = {"chat": [1.0, -1.0, 0.5, 0.0], "safety": [2.0]}
    rows = [pair | {"subset": name} for name, values in margins.items()
            for pair, _ in zip(chatmodel.PAIRS, values, strict=False)]  # fmt: skip
    flat = [{"margin": margin} for values in margins.values() for margin in values]
    monkeypatch.setattr(measures, "load_scorer", lambda source: (None, None, None))
    monkeypatch.setattr(measures, "score_rows", lambda *_, **__: Scored(flat, 2, (0, 0)))
    file = chatmodel.write_rows(tmp_path / "r.jsonl", rows)
    result = measures.measure_reward("scorer", [file], OPTIONS)
    assert result.figures["accuracy"][:4] == (0.6, *wilson(3, 5), 5)
    assert result.figures["accuracy/chat"][:4] == (0.5, *wilson(2, 4), 4)
    assert result.figures["accuracy/safety"].value == 1.0
    assert result.figures["accuracy_by_source"].value == 0.75
    assert result.notes == ["1 pairs have equal scores and count as wrong",
                            "2 answers cut at 64 tokens"]  # fmt: skip
    with pytest.raises(ValueError, match=r"r\.jsonl:1: .*section"):
        measures.measure_reward("scorer", [file], OPTIONS, by="section")


# --- the command ----------------------------------------------------------------------------------


def test_results_are_shown_and_written_and_replace_nothing(chat_models, tmp_path, capsys):
    chat = chatmodel.write_rows(tmp_path / "a.jsonl", chatmodel.CONVERSATIONS)
    choice = chatmodel.write_rows(tmp_path / "c.jsonl", CHOICES)
    out = tmp_path / "out" / "results.json"
    command = ["eval", str(chat_models / "chat"), "--loss", chat, "--choice", choice,
               "--batch", "4", "--length", "64", "--limit", "3", "--out", str(out)]  # fmt: skip
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    written = json.loads(out.read_text())
    figures = written["results"]["loss"]["figures"]
    assert ["loss/nll", f"{figures['nll']['value']:.4f}"] in [
        x.split()[:2] for x in text.splitlines()
    ]
    assert figures["nll"]["count"] == 3 * 4  # "ok", a letter and the end token
    assert written["results"]["choice"]["figures"]["accuracy"]["count"] == 3
    assert len(written["results"]["choice"]["rows"]) == 3
    before = out.read_bytes()
    assert cli.main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_reward_model_is_measured(chat_models, tmp_path, capsys):
    file = chatmodel.write_rows(tmp_path / "r.jsonl", chatmodel.PAIRS)
    scorer = str(chat_models / "scorer")
    assert cli.main(["eval", scorer, "--reward", file, "--length", "64"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("reward/accuracy"))
    accuracy = cli_accuracy(scorer, file, tmp_path / "scored.jsonl")
    assert float(line.split()[1]) == pytest.approx(accuracy, abs=1e-4)
    assert line.endswith("12 pairs")


def cli_accuracy(scorer, file, out):
    """From the scores that `jaxalign score` writes."""
    assert cli.main(["score", scorer, file, "--out", str(out)]) == 0
    rows = [json.loads(line)["reward"] for line in out.read_text().splitlines()]
    return np.mean([row["chosen"] > row["rejected"] for row in rows])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--kl", "p.jsonl"], "--kl: wanted --reference with it"),
        (["--loss", "p", "--versus", "m"], "--versus: wanted --win-rate with it"),
        (["--win-rate", "p", "--versus", "m"], "wanted one judge"),
        (["--loss", "p", "--judge", "gpt"], "--judge: wanted --win-rate FILE"),
        (["--loss", "p", "--reward", "p"], "measure the others apart"),
        (["--loss", "p", "--num-fewshot", "2"], "--num-fewshot: wanted --tasks with it"),
        (["--loss", "p", "--batch", "0"], "batch=0: wanted 1 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused_first(arguments, message, capsys):
    assert cli.main(["eval", "no-such-model", *arguments]) == 2
    assert message in capsys.readouterr().err
