"""`jaxalign score` and best-of-n: every form of row, against an independent forward pass."""

import functools
import json

import chatmodel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from plain_llama import forward

import jaxalign
from jaxalign.commands.cli import main
from jaxalign.data.sources import Row
from jaxalign.models.scorer import Scorer, weigh_attributes
from jaxalign.rewards.best_of import best_of, model_judge
from jaxalign.rewards.scoring import score_conversations, score_rows

pytestmark = pytest.mark.usefixtures("kept_programs")

SCORER = Scorer(chatmodel.DECODER)
GRADER = Scorer(chatmodel.DECODER, ("kind", "long"))


@pytest.fixture(scope="module")
def tok():
    return chatmodel.make_tokenizer()


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(SCORER, seed=4)


def text_of(prompt, answer):
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"


def outputs(tok, params, text):
    """The head's outputs at every token of a text `[n, A]`, in numpy."""
    hidden = forward(chatmodel.DECODER.config, params, np.array(tok.encode(text)))
    return hidden @ np.asarray(params["score"]["kernel"], np.float64)


def end(tok, params, prompt, answer):
    return float(outputs(tok, params, text_of(prompt, answer))[-1, 0])


def test_rows_of_every_form(tok, params):
    rows = [
        {"prompt": "hi", "completion": "yes", "note": 1},
        {"prompt": "up?", "chosen": "a longer answer than the others are", "rejected": "no"},
        {"prompt": "hi", "answers": ["yes", "no", "so"], "ranks": [1, 2, 3]},
        {"prompt": "hi", "answers": ["no", "so"]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]},
        {"prompt": "hi", "steps": ["one", "two"]},
        {"prompt": "hi", "completions": ["one", "two"], "labels": [True, False]},
    ]
    made = [Row(row, f"data:{n}") for n, row in enumerate(rows)]
    scored = score_rows(SCORER, params, tok, made, batch=3)
    got = scored.results
    near = functools.partial(pytest.approx, rel=1e-4, abs=1e-5)
    assert got[0] == near(end(tok, params, "hi", "yes"))
    chosen = end(tok, params, "up?", "a longer answer than the others are")
    rejected = end(tok, params, "up?", "no")
    assert got[1] == near({"chosen": chosen, "rejected": rejected, "margin": chosen - rejected})
    assert scored.right == (int(chosen > rejected), 1)
    assert got[2] == near([end(tok, params, "hi", a) for a in ("yes", "no", "so")])
    assert got[3] == got[2][1:]
    assert got[4] == got[2][1]
    every = outputs(tok, params, text_of("hi", "one\ntwo"))[:, 0]
    last = len(tok.encode(text_of("hi", "one\ntwo"))) - 2  # before the end of the turn
    right = 1 / (1 + np.exp(-every[[last - 4, last]]))
    assert got[5]["steps"] == near(right.tolist())
    assert got[5]["product"] == near(right.prod())
    assert got[5]["min"] == near(right.min())
    assert got[6] == got[5]
    assert scored.cut == 0


CLOSES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not enable_thinking %}no {% endif %}"
    "{% if m.role == 'user' %}{{ tag }}{% endif %}{{ m.content }}<|im_end|>"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}<|im_start|>assistant\n"
    "{% if not enable_thinking %}no {% endif %}{% endif %}"
)


def test_the_template_gets_its_variables_and_whether_answers_think(tok, params, tmp_path):
    (tmp_path / "closes.jinja").write_text(CLOSES)
    rows = [Row({"prompt": "hi", "completion": "yes"}, "a.jsonl:1")]
    for thinking, before in (("on", ""), ("off", "no ")):
        scored = score_rows(
            SCORER, params, tok, rows, chat_template=str(tmp_path / "closes.jinja"),
            thinking=thinking, chat_template_kwargs={"tag": "so "},
        )  # fmt: skip
        wanted = end(tok, params, "so hi", f"{before}yes")
        np.testing.assert_allclose(scored.results, [wanted], rtol=1e-4, err_msg=thinking)


def test_long_answers_are_cut_and_counted(tok, params):
    rows = [Row({"prompt": "hi", "completion": "a b c d e f"}, "data:1")]
    whole = text_of("hi", "a b c d e f")
    size = len(tok.encode(whole))
    for length, cut in ((size, 0), (size - 4, 1)):
        scored = score_rows(SCORER, params, tok, rows, length=length)
        assert scored.cut == cut
        expected = outputs(tok, params, whole)[length - 1, 0]
        assert scored.results[0] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match=r"data:2: the steps end beyond length=9"):
        score_rows(SCORER, params, tok, [Row({"prompt": "hi", "steps": ["a"]}, "data:2")], length=9)


def test_attributes_and_their_weighted_sum(tok):
    params = tiny.random_params(GRADER, seed=6)
    rows = [
        Row({"prompt": "hi", "completion": "yes"}, "data:1"),
        Row({"prompt": "hi", "chosen": "yes", "rejected": "no"}, "data:2"),
    ]
    got = score_rows(GRADER, params, tok, rows).results
    expected = outputs(tok, params, text_of("hi", "yes"))[-1]
    assert got[0] == pytest.approx({"kind": expected[0], "long": expected[1]}, rel=1e-4, abs=1e-6)
    assert set(got[1]["margin"]) == {"kind", "long"}
    one, weighed = weigh_attributes(GRADER, params, {"kind": 0.5, "long": -2.0})
    assert one == SCORER
    total = 0.5 * expected[0] - 2 * expected[1]
    assert score_rows(one, weighed, tok, rows).results[0] == pytest.approx(total, rel=1e-4)
    conversations = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]]
    assert score_conversations(one, weighed, tok, conversations) == pytest.approx([total], rel=1e-4)
    with pytest.raises(ValueError, match="kind, long and no single score"):
        score_conversations(GRADER, params, tok, conversations)
    with pytest.raises(ValueError, match=r"data:3: steps, but .* kind, long"):
        score_rows(GRADER, params, tok, [Row({"prompt": "hi", "steps": ["a"]}, "data:3")])


@pytest.mark.parametrize("weights", [{}, {"kind": 0.0}, {"kind": 1.0, "size": 1.0}])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match=r"reward weights .* kind, long"):
        weigh_attributes(GRADER, {}, weights)
    with pytest.raises(ValueError, match="one score and no attributes"):
        weigh_attributes(SCORER, {}, {"kind": 1.0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hi"}, r"data:1: got the columns prompt"),
        ({"prompt": "hi", "steps": "one"}, r"data:1: labels: got 'one', wanted a list"),
        ({"prompt": "hi", "completion": ""}, r"data:1: completion: got empty text"),
    ],
)
def test_rows_without_an_answer_are_refused(tok, params, row, message):
    with pytest.raises(ValueError, match=message):
        score_rows(SCORER, params, tok, [Row(row, "data:1")])


def test_command(chat_models, tmp_path, capsys, tok):
    rows = [
        {"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": 2},
        {"prompt": "up?", "chosen": "ok", "rejected": "no", "margin": 1},
    ]
    data = chatmodel.write_rows(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / "new" / "scored.jsonl"
    assert main(["score", str(chat_models / "scorer"), data, "--out", str(out)]) == 0
    made = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [{k: v for k, v in row.items() if k != "reward"} for row in made] == rows
    scorer = tiny.random_params(SCORER, seed=4)
    assert made[0]["reward"]["chosen"] == pytest.approx(end(tok, scorer, "hi", "yes"), rel=1e-4)
    message = capsys.readouterr().err
    right = sum(row["reward"]["margin"] > 0 for row in made)
    assert f"2 rows scored, 0 answers cut; {right / 2:.3f} of 2 pairs ranked right" in message

    def complaint(*arguments):
        assert main(["score", *arguments]) == 2
        return capsys.readouterr().err

    message = complaint(str(chat_models / "scorer"), data, "--column", "margin")
    assert "pairs.jsonl:1: the row has a column 'margin' already" in message
    assert "language model without a score" in complaint(str(chat_models / "chat"), data)
    message = complaint(str(chat_models / "scorer"), data, "--weights", "kind=1")
    assert "one score and no attributes" in message
    message = complaint(str(chat_models / "scorer"), data, "--weights", "kind:1")
    assert "--weights: got 'kind:1', wanted name=number" in message
    assert "batch=0" in complaint(str(chat_models / "scorer"), data, "--batch", "0")


def test_best_of_returns_the_highest_score(tok, params):
    policy = tiny.random_params(chatmodel.DECODER, seed=3)
    calls = []

    def judge(conversations):
        calls.extend(conversations)
        return model_judge(SCORER, params, tok, batch=4)(conversations)

    sampling = {"max_new_tokens": 5, "temperature": 1.0, "key": jax.random.key(1)}
    prompts = ["hi", [{"role": "user", "content": "up?"}]]
    results = best_of(chatmodel.DECODER, policy, tok, prompts, judge, count=3, **sampling)
    assert len(results) == 2
    for prompt, result in zip(("hi", "up?"), results, strict=True):
        assert len(result.answers) == len(result.scores) == 3
        expected = [end(tok, params, prompt, answer) for answer in result.answers]
        assert result.scores == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert result.score == max(result.scores)
        assert result.answer == result.answers[result.scores.index(result.score)]
    assert len({answer for result in results for answer in result.answers}) > 2
    assert calls[0][0] == {"role": "user", "content": "hi"}
    assert calls[-1][0] == {"role": "user", "content": "up?"}
    plain = jaxalign.generate(
        chatmodel.DECODER, policy, tok, ["hi"] * 3 + prompts[1:] * 3, **sampling
    )
    assert [answer for result in results for answer in result.answers] == plain


def test_best_of_refuses_invalid_options(tok, capsys, chat_models):
    policy = jax.tree.map(jnp.zeros_like, tiny.random_params(chatmodel.DECODER))
    with pytest.raises(ValueError, match="greedy answers are all alike"):
        best_of(chatmodel.DECODER, policy, tok, ["hi"], len, count=2, temperature=0.0)
    with pytest.raises(ValueError, match="count=0"):
        best_of(chatmodel.DECODER, policy, tok, ["hi"], len, count=0)
    assert main(["generate", str(chat_models / "chat"), "hi", "--best-of", "2"]) == 2
    assert "wanted --reward-model" in capsys.readouterr().err
    model = str(chat_models / "scorer")
    assert main(["generate", str(chat_models / "chat"), "hi", "--reward-model", model]) == 2
    assert "--reward-model: wanted --best-of N" in capsys.readouterr().err


def test_best_of_command(chat_models, capsys):
    model, judge = str(chat_models / "chat"), str(chat_models / "scorer")
    options = ["--best-of", "2", "--reward-model", judge, "--max-new-tokens", "4"]
    assert main(["generate", model, "hi", *options]) == 0
    assert "[score " in capsys.readouterr().out
