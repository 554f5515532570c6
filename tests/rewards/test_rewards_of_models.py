"""Rewards of trained models, with the policy's tokenizer and with their own."""

import chatmodel
import numpy as np
import pytest
import tiny
import tokenizers
import transformers
from answered import TOK, answered
from plain_llama import forward
from tokenizers import decoders, models, pre_tokenizers

import jaxalign
from jaxalign.data.examples import Prompt
from jaxalign.models.scorer import Scorer
from jaxalign.rewards import RewardError, model_reward, retokenised_reward

SCORER = Scorer(chatmodel.DECODER)
PARAMS = tiny.random_params(SCORER, seed=5)


def score_of(ids):
    """The score at the last of some tokens, by the independent model."""
    hidden = forward(SCORER.config, PARAMS, np.asarray(ids))[-1]
    return float(hidden @ np.asarray(PARAMS["score"]["kernel"], np.float64)[:, 0])


def test_a_models_reward_is_its_score_at_the_last_token():
    pairs = [
        ("<|im_start|>user\nhi<|im_end|>\n", "fine<|im_end|>"),
        ("a longer prompt: ", "cut of"),
        ("", ""),
    ]
    tokens, prompts = answered(pairs, width=20, room=8)
    scores = np.asarray(model_reward(SCORER, PARAMS)(tokens, prompts))
    expected = [score_of(TOK.encode(prompt + answer)) for prompt, answer in pairs[:2]]
    np.testing.assert_allclose(scores[:2], expected, rtol=1e-4)

    shifted = np.asarray(model_reward(SCORER, PARAMS, shift=0.5, scale=2.0)(tokens, prompts))
    np.testing.assert_allclose(shifted[:2], (scores[:2] - 0.5) / 2.0, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=r"reward scale=.*positive"):
        model_reward(SCORER, {}, scale=scale)


# Another tokenizer and template

TEMPLATE = (
    "{% for m in messages %}{{ '<u>' if m['role'] == 'user' else '<a>' }}{{ m['content'] }}<e>"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)


def other_tokenizer():
    """One token per byte, in reverse order, and its own special tokens at the end."""
    core = tokenizers.Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [tokenizers.AddedToken(t, special=True) for t in ("<u>", "<a>", "<e>", "<p>")]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<p>",
        eos_token="<e>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


USER, ANSWER, END = 256, 257, 258


def ids_of(text):
    """Printable ASCII stands for itself among the letters, a blank for Ġ."""
    return [LETTERS.index("Ġ" if letter == " " else letter) for letter in text]


def conversation(question, answer):
    return [USER, *ids_of(question), END, ANSWER, *ids_of(answer), END]


ROWS = [
    Prompt(({"role": "user", "content": q},), f"rows.jsonl:{n}", {"prompt": q})
    for n, q in enumerate(("why is it so?", "and why " + "not " * 12), start=1)
]


def test_another_tokenizer_reads_the_conversation_as_text(capsys):
    # The policy's prompt is ignored: the conversation is rebuilt from the row.
    tokens, prompts = answered(
        [("x", "because"), ("y", "so be it<|im_end|>"), ("", ""), ("z", "because")],
        index=[0, 1, -1, 0],
    )
    reward = retokenised_reward(
        SCORER, PARAMS, other_tokenizer(), TOK, rows=ROWS, batch=2, shift=1.0, scale=2.0
    )
    scores = reward(tokens, prompts)
    first = score_of(conversation("why is it so?", "because"))
    second = score_of(conversation("and why " + "not " * 12, "so be it"))
    expected = [(first - 1) / 2, (second - 1) / 2, 0, (first - 1) / 2]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert capsys.readouterr().out == ""


def test_long_conversations_lose_their_start_and_are_counted(capsys):
    tokens, prompts = answered([("x", "short"), ("y", "a long answer")])
    reward = retokenised_reward(
        SCORER, PARAMS, other_tokenizer(), TOK, rows=ROWS, batch=2, length=32
    )
    scores = reward(tokens, prompts)
    whole = conversation("why is it so?", "short")
    long = conversation("and why " + "not " * 12, "a long answer")
    assert len(whole) <= 32 < len(long)
    np.testing.assert_allclose(scores, [score_of(whole), score_of(long[-32:])], rtol=1e-4)
    out = capsys.readouterr().out
    assert "of 2 conversations, 1 were longer than 32 tokens and lost their start, and 0" in out


def test_special_tokens_written_as_text_are_removed(capsys):
    # Removing one must not join the halves of another.
    tokens, prompts = answered([("x", "no<<e>e><u>"), ("y", "no")], index=[0, 0])
    reward = retokenised_reward(SCORER, PARAMS, other_tokenizer(), TOK, rows=ROWS, batch=2)
    scores = reward(tokens, prompts)
    assert scores[0] == scores[1]
    assert "and 1 answers lost special tokens" in capsys.readouterr().out


def test_retokenised_reward_refuses_missing_inputs():
    def make(scorer=SCORER, **options):
        return retokenised_reward(
            scorer, PARAMS, other_tokenizer(), TOK, **{"rows": ROWS} | options
        )

    with pytest.raises(ValueError, match=r"rebuilds conversations.*pass rows="):
        make(rows=None)
    with pytest.raises(RewardError, match=r"its row is a plain dict; wanted what prompt_batches"):
        make(rows=[{"prompt": "hi"}])(*answered([("x", "y")]))
    with pytest.raises(ValueError, match="length=1"):
        make(length=1)
    with pytest.raises(ValueError, match="batch=0"):
        make(batch=0)
    with pytest.raises(ValueError, match="attributes a, b and no single score"):
        make(scorer=Scorer(chatmodel.DECODER, ("a", "b")))


def test_the_rows_are_those_of_prompt_batches():
    batches = jaxalign.prompt_batches(
        [{"prompt": "why is it so?", "answer": 42}], TOK, rows=1, length=40, shuffle=False
    )
    seen = []
    reward = jaxalign.text_reward(lambda p, c, row: seen.append((p, row)) or 1.0, TOK, rows=batches)
    tokens, _ = answered([("x", "y")])
    reward(tokens, next(iter(batches)))
    assert seen == [("user\nwhy is it so?\nassistant\n", {"prompt": "why is it so?", "answer": 42})]
