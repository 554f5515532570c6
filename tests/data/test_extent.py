"""Token ids and lengths against what a model has rows and positions for."""

import chatty
import pytest

from jaxalign.data import preference_batches, prompt_batches, sft_batches
from jaxalign.data.extent import Limits, extent_of

# 256 bytes, then the special tokens: <|im_end|> is 257.
TOK = chatty.tokenizer(["<|im_start|>", "<|im_end|>", "<rare>"], eos="<|im_end|>")
TOK.chat_template = chatty.CHATML
ROWS = [{"prompt": "hi", "completion": "you"}, {"prompt": "hi", "completion": "you there"}]


def read_with(batches, limits):
    batches.check_model(limits)
    list(batches)


def test_the_extent_is_that_of_the_longest_and_the_largest():
    assert extent_of([[1, 7, 2], [3], []]) == (3, 7)
    assert extent_of([]) == (0, 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_token_without_a_row_is_refused_by_name(streaming):
    rows = [*ROWS, {"prompt": "a <rare> one", "completion": "x"}]
    options = {"rows": 1, "length": 64, "streaming": streaming, "shuffle": False}
    batches = sft_batches(rows, TOK, special_tokens_in_text="keep", **options)
    batches.check_model(Limits(259))
    list(batches)
    with pytest.raises(ValueError, match=r"holds the token 258 \('<rare>'\), and .* 258 rows"):
        read_with(batches, Limits(258, tok=TOK))
    plain = sft_batches(ROWS, TOK, **options)  # more tokens than rows, of which none occurs
    plain.check_model(Limits(258))
    list(plain)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_beyond_learned_positions_are_refused_by_name(streaming):
    # <|im_start|> user \n … <|im_end|> \n <|im_start|> assistant \n … <|im_end|>
    longest = 1 + 5 + 2 + 1 + 1 + 1 + 10 + 9 + 1
    options = {"rows": 1, "length": 64, "streaming": streaming}
    for packing in (False, True):
        batches = sft_batches(ROWS, TOK, packing=packing, **options)
        batches.check_model(Limits(259, longest))
        list(batches)
        with pytest.raises(ValueError, match=f"longest has {longest} tokens.*n_positions=30 learn"):
            read_with(batches, Limits(259, longest - 1))


def test_pairs_and_prompts_are_looked_at_too():
    pairs = preference_batches([{"prompt": "hi", "chosen": "yes", "rejected": "no, no, no"}], TOK,
                               rows=1, length=64)  # fmt: skip
    with pytest.raises(ValueError, match="n_positions=31"):
        pairs.check_model(Limits(259, 31))
    prompts = prompt_batches([{"prompt": "hi"}], TOK, rows=1, length=64)
    prompts.check_model(Limits(259, 41, answer=20))  # 21 tokens of prompt
    with pytest.raises(ValueError, match=r"21 tokens, with 20 more to be sampled.*n_positions=40"):
        prompts.check_model(Limits(259, 40, answer=20))


def test_rows_beyond_the_context_that_a_model_was_made_for_are_said(capsys):
    rows = [{"text": "a b c d e f g h"}] * 4
    batches = sft_batches(rows, TOK, rows=2, length=64)
    longest = batches._extent.longest
    batches.check_model(Limits(259, context=longest))
    assert "was made for" not in capsys.readouterr().out
    batches.check_model(Limits(259, context=longest - 1))
    told = f"the longest has {longest} tokens; the model was made for {longest - 1}"
    assert told in capsys.readouterr().out
