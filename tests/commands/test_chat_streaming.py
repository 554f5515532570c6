"""Streamed answers are the answers, to the bit, in pieces of whole characters."""

import itertools

import chatmodel
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.commands import cli
from jaxalign.commands.chat import Chat, Speaker
from jaxalign.sampling.stream import TextPieces
from jaxalign.types import PromptBatch


@pytest.fixture(scope="module")
def loaded(chat_models):
    source = str(chat_models / "chat")
    return *jaxalign.load_pretrained(source), jaxalign.load_tokenizer(source)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_watched_sampling_gives_the_same_bits(loaded, temperature):
    """Two prompts, two samples each, over 200 tokens: more than one stage of the cache."""
    model, params, _ = loaded
    tokens = np.array([[0, 0, 7, 8], [5, 6, 7, 8]] * 4, np.int32)
    prompts = PromptBatch(tokens, tokens > 0, np.arange(8, dtype=np.int32))
    options = {"max_new_tokens": 200, "temperature": temperature, "samples": 2}
    options |= {"stop_tokens": (3,), "lengths": np.array([200, 9] * 8)}
    key = jax.random.key(5)
    whole = jaxalign.sample(model, params, prompts, key, **options)
    seen = []
    parts = jaxalign.sample(
        model, params, prompts, key, **options, watch=lambda *seen_now: seen.append(seen_now)
    )
    for name in ("tokens", "logprobs", "mask", "finished", "steps"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), err_msg=name)
    # What was seen on the way is the beginning of what came out.
    counts = [count for _, count in seen]
    assert len(seen) > 3
    assert all((a <= b).all() for a, b in itertools.pairwise(counts))
    for ring, count in seen:
        for row, n in enumerate(count):
            np.testing.assert_array_equal(ring[row][:n], np.asarray(whole.tokens)[row][:n])
    np.testing.assert_array_equal(counts[-1], np.asarray(whole.mask).sum(axis=1))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_pieces_are_the_answer(loaded, seed):
    model, params, tok = loaded
    options = {"max_new_tokens": 40, "temperature": 1.0, "key": jax.random.key(seed)}
    (answer,) = jaxalign.generate(model, params, tok, ["hi"], **options)
    pieces = []
    streamed = jaxalign.generate(model, params, tok, ["hi"], **options, on_text=pieces.append)
    assert streamed == [answer]
    assert "".join(pieces) == answer
    assert len(pieces) > 2


def test_streaming_takes_one_prompt(loaded):
    with pytest.raises(ValueError, match="on_text with 2 prompts: wanted one"):
        jaxalign.generate(*loaded, ["a", "b"], on_text=print)
    prompts = PromptBatch(np.ones((8, 2), np.int32), np.ones((8, 2), bool), np.arange(8))
    with pytest.raises(ValueError, match="slots=8 with watch: wanted None"):
        jaxalign.sample(
            *loaded[:2], prompts, jax.random.key(0), max_new_tokens=2, slots=8, watch=print
        )


# --- text ----------------------------------------------------------------------------------------


def fed(tok, ids, size=1):
    """The pieces of an answer whose tokens come `size` at a time."""
    pieces = []
    text = TextPieces(tok, pieces.append)
    for count in range(size, len(ids), size):
        text.watch(np.array([ids]), np.array([count]))
    return pieces, text.end(np.array(ids))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_piece_ends_within_a_character(size):
    tok = chatmodel.make_tokenizer()
    text = "né 猫と🐈‍⬛ – 好吗?"
    ids = tok(text)["input_ids"]
    assert len(ids) == len(text.encode())  # a token a byte
    pieces, whole = fed(tok, ids, size)
    assert whole == "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    tok = chatmodel.make_tokenizer()
    ids = tok("ok 猫")["input_ids"][:-1]
    pieces, whole = fed(tok, ids)
    assert whole == "".join(pieces) == tok.decode(ids)
    assert whole.endswith("\ufffd")


class Tidy:
    """Takes the blank before a full stop away, as some tokenizers do after the fact."""

    clean_up_tokenization_spaces = True
    WORDS = ("one", " two", " .", " three", " .")

    def decode(self, ids, skip_special_tokens):
        return "".join(self.WORDS[i] for i in ids).replace(" .", ".")


def test_a_tokenizer_that_tidies_up_gets_whole_words():
    pieces, whole = fed(Tidy(), list(range(5)))
    assert whole == "".join(pieces) == "one two. three."
    assert pieces[0] == "one"


# --- the conversation ----------------------------------------------------------------------------


def speaker(prompts, *, key, on_text=None, **options):
    """Shows "a", then "b", and answers "ab"."""
    if on_text is not None:
        on_text("a")
        on_text("b")
    return ["ab"]


def test_a_chat_shows_the_pieces_and_remembers_the_answer():
    shown, messages = [], []
    chat = Chat([Speaker("", speaker, messages)], {}, show=shown.append)
    assert chat.reply("hello") == ""
    assert shown == ["a", "b"]
    assert messages[-1] == {"role": "assistant", "content": "ab"}
    assert chat.reply("/reset").startswith("the conversation begins anew")


def test_two_models_are_shown_one_after_the_other():
    shown = []
    both = [Speaker("A", speaker, []), Speaker("B", speaker, [])]
    assert Chat(both, {}, show=shown.append).reply("hello") == "[A]\nab\n\n[B]\nab"
    assert shown == []


def test_the_command_prints_what_generate_gives(chat_models, loaded, monkeypatch, capsys):
    lines = iter(["hi", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    command = ["chat", str(chat_models / "chat"), "--max-new-tokens", "40", "--seed", "2"]
    assert cli.main([*command, "--temperature", "1.0"]) == 0
    key = jax.random.fold_in(jax.random.key(2), 0)
    prompt = [{"role": "user", "content": "hi"}]
    (answer,) = jaxalign.generate(*loaded, [prompt], max_new_tokens=40, temperature=1.0, key=key)
    assert capsys.readouterr().out.partition("commands.\n")[2] == answer + "\n"
