"""Text rewards: the arguments of functions, and the treatment of their results."""

import numpy as np
import pytest
from answered import TOK, answered

from jaxalign.rewards import RewardError, batch_reward, text_reward
from jaxalign.rewards.cases import shifted

BATCH = answered(
    [
        ("<|im_start|>user\nhi<|im_end|>\n", "fine<|im_end|>"),
        ("a longer prompt: ", "cut of"),
        ("", ""),
    ]
)
TEXTS = [("user\nhi\n", "fine"), ("a longer prompt: ", "cut of")]
ROWS = [{"prompt": "hi", "answer": 3}, {"prompt": "a longer prompt: ", "answer": 7, "hard": True}]


def test_text_reward_gets_prompt_and_completion():
    seen = []

    def function(prompt, completion):
        seen.append((prompt, completion))
        return len(seen) - 0.5

    scores = text_reward(function, TOK)(*BATCH)
    # Special tokens are dropped; the padding row is not scored and gets 0.
    assert seen == TEXTS
    np.testing.assert_array_equal(scores, np.array([0.5, 1.5, 0.0], np.float32))
    assert scores.dtype == np.float32


class Callables:
    """All signatures that a function of the row may have."""

    def method(self, prompt, completion, row):
        return row["answer"]

    @staticmethod
    def third(prompt, completion, anything):
        return anything["answer"]

    @staticmethod
    def keyword(prompt, completion, *, row):
        return row["answer"]

    @staticmethod
    def defaulted(prompt, completion, row=None):
        return row["answer"]

    @staticmethod
    def after_an_option(prompt, completion, scale=1.0, *, row=None):
        return scale * row["answer"]


FORMS = [getattr(Callables(), n) for n in vars(Callables) if not n.startswith("_")]


@pytest.mark.parametrize("function", FORMS, ids=lambda f: f.__name__)
def test_the_row_reaches_the_function_by_the_prompts_index(function):
    # The same prompt twice, as with several samples per prompt; then the other row.
    prompt = ("a", "b")
    tokens, prompts = answered([prompt, prompt, prompt, ("", "")], index=[1, 1, 0, -1])
    scores = text_reward(function, TOK, rows=ROWS)(tokens, prompts)
    np.testing.assert_array_equal(scores, [7, 7, 3, 0])


def test_third_parameter_with_a_default_keeps_it():
    reward = text_reward(lambda prompt, completion, scale=2.0: scale, TOK, rows=ROWS)
    np.testing.assert_array_equal(reward(*BATCH), [2, 2, 0])
    reward = text_reward(lambda prompt, completion, row=None: float(row is None), TOK)
    np.testing.assert_array_equal(reward(*BATCH), [1, 1, 0])


def test_function_of_the_row_needs_rows():
    with pytest.raises(ValueError, match=r"reward 'third' takes the data row.*pass rows="):
        text_reward(Callables.third, TOK)
    with pytest.raises(RewardError, match=r"its index 1 is none of the 1 rows"):
        text_reward(Callables.third, TOK, rows=ROWS[:1])(*BATCH)


def test_indices_of_held_out_prompts_come_after_those_of_training():
    _, prompts = BATCH
    np.testing.assert_array_equal(shifted(prompts, 5).index, [5, 6, -1])


def test_error_in_a_text_reward_names_file_and_line():
    def broken(prompt, completion):
        if prompt.startswith("a longer"):
            raise RuntimeError("no score for this")
        return 0.0

    with pytest.raises(RuntimeError, match="no score for this") as caught:
        text_reward(broken, TOK, rows=ROWS)(*BATCH)
    message = str(caught.value)
    assert "reward 'broken'" in message
    assert "row 1 of the batch (row 1 of the data), prompt 'a longer prompt: '" in message
    assert "RuntimeError" in message
    assert __file__ in message
    assert isinstance(caught.value, ValueError)  # which the commands show without a traceback


def test_a_long_prompt_is_shown_by_its_head():
    with pytest.raises(RewardError) as caught:
        text_reward(lambda p, c: float("nan"), TOK)(*answered([("x" * 200, "y")], width=200))
    assert f"prompt '{'x' * 60}…'" in str(caught.value)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "3", [1.0, 2.0], object()])
def test_scores_must_be_finite_numbers(wrong):
    with pytest.raises(RewardError, match=r"reward 'bad' gave .* for row 0 of the batch"):
        text_reward(lambda prompt, completion: wrong, TOK, name="bad")(*BATCH)


def test_none_needs_another_reward():
    with pytest.raises(TypeError, match=r"gave None for row 0.*combine_rewards"):
        text_reward(lambda prompt, completion: None, TOK)(*BATCH)


def test_booleans_and_numpy_numbers_are_scores():
    given = iter([True, np.float64(0.25)])
    scores = text_reward(lambda prompt, completion: next(given), TOK)(*BATCH)
    np.testing.assert_array_equal(scores, [1.0, 0.25, 0.0])


# Functions of a whole batch, in TRL's form


def test_a_batch_function_gets_lists_and_columns():
    seen = {}

    def accuracy(prompts, completions, answer, **columns):
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [float(each) for each in answer]

    np.testing.assert_array_equal(batch_reward(accuracy, TOK, rows=ROWS)(*BATCH), [3, 7, 0])
    assert seen == {
        "prompts": [prompt for prompt, _ in TEXTS],
        "completions": [completion for _, completion in TEXTS],
        "columns": {"hard": [None, True]},
    }


def test_prompts_that_are_messages_stay_messages():
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}] * 2

    def length(prompts, completions, **_):
        assert prompts == [row["prompt"] for row in rows]
        assert completions[0] == [{"role": "assistant", "content": "fine"}]
        return [len(turns[0]["content"]) for turns in completions]

    np.testing.assert_array_equal(batch_reward(length, TOK, rows=rows)(*BATCH), [4, 6, 0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "gave 1 scores for 2 answers"),
        (None, "gave a NoneType scores for 2 answers"),
        ([1.0, float("nan")], "gave nan for row 1 of the batch"),
    ],
)
def test_a_batch_function_gives_a_number_an_answer(given, message):
    with pytest.raises(RewardError, match=message):
        batch_reward(lambda prompts, completions: given, TOK)(*BATCH)


def test_an_error_in_a_batch_function_stops():
    def broken(prompts, completions):
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"'broken' failed for 2 answers.*KeyError: 'answer' at"):
        batch_reward(broken, TOK)(*BATCH)
    # A function gets all columns, as from TRL, even if it takes none.
    with pytest.raises(RewardError, match=r"TypeError.*unexpected keyword argument 'answer'"):
        batch_reward(broken, TOK, rows=ROWS)(*BATCH)


def test_batch_without_answers_calls_no_function():
    empty = answered([("", ""), ("", "")])
    scores = batch_reward(lambda prompts, completions: 1 / 0, TOK)(*empty)
    np.testing.assert_array_equal(scores, [0, 0])
