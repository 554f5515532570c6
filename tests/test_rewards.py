"""Reward functions for PPO: a reward model's score, and any function of text."""

import chatmodel
import numpy as np
import pytest
import tiny
from plain_llama import forward

from jaxalign.algorithms.ppo import join_tokens
from jaxalign.generate import Generation
from jaxalign.models.heads import Scorer
from jaxalign.rewards import model_reward, text_reward
from jaxalign.types import PromptBatch

PROMPTS = ("<|im_start|>user\nhi<|im_end|>\n", "a longer prompt: ", "")
ANSWERS = ("fine<|im_end|>", "cut of", "")
WIDTH, ROOM = 20, 8


@pytest.fixture(scope="module")
def tok():
    return chatmodel.make_tokenizer()


@pytest.fixture(scope="module")
def batch(tok):
    """(tokens, prompts): three rows, the last of which only fills up the batch."""
    prompts = PromptBatch(
        np.zeros((3, WIDTH), np.int32), np.zeros((3, WIDTH), bool), np.array([0, 1, -1], np.int32)
    )
    tokens, mask = np.zeros((3, ROOM), np.int32), np.zeros((3, ROOM), bool)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = tok.encode(prompt)
        if ids:
            prompts.tokens[row, -len(ids) :] = ids
            prompts.mask[row, -len(ids) :] = True
        ids = tok.encode(answer)
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    finished = np.array([True, False, False])
    return join_tokens(prompts, Generation(tokens, np.zeros(mask.shape), mask, finished)), prompts


def test_a_text_reward_sees_prompt_and_completion(tok, batch):
    seen = []

    def function(prompt, completion):
        seen.append((prompt, completion))
        return len(seen) - 0.5

    scores = text_reward(function, tok)(*batch)
    # Special tokens are left out; the row that fills up the batch is not asked about, and scores 0.
    assert seen == [("user\nhi\n", "fine"), ("a longer prompt: ", "cut of")]
    np.testing.assert_array_equal(scores, np.array([0.5, 1.5, 0.0], np.float32))
    assert scores.dtype == np.float32


def test_an_error_in_a_text_reward_stops(tok, batch):
    def broken(prompt, completion):
        raise RuntimeError("no score for this")

    with pytest.raises(RuntimeError, match="no score for this"):
        text_reward(broken, tok)(*batch)
    with pytest.raises(TypeError):
        text_reward(lambda prompt, completion: None, tok)(*batch)


def test_a_models_reward_is_its_score_at_the_last_token(tok, batch):
    scorer = Scorer(chatmodel.DECODER)
    params = tiny.random_params(scorer, seed=5)
    scores = np.asarray(model_reward(scorer, params)(*batch))
    for row in (0, 1):
        ids = np.array(tok.encode(PROMPTS[row] + ANSWERS[row]))
        hidden = forward(scorer.config, params, ids)[-1]
        expected = float(hidden @ np.asarray(params["score"]["kernel"], np.float64)[:, 0])
        assert scores[row] == pytest.approx(expected, rel=1e-4)

    shifted = np.asarray(model_reward(scorer, params, shift=0.5, scale=2.0)(*batch))
    np.testing.assert_allclose(shifted[:2], (scores[:2] - 0.5) / 2.0, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=r"reward scale=.*positive"):
        model_reward(Scorer(chatmodel.DECODER), {}, scale=scale)
