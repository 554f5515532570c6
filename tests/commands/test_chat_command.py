"""A conversation driven line by line, with functions in place of models."""

import json
import sys

import chatmodel
import jax
import pytest

import jaxalign
from jaxalign.commands import cli
from jaxalign.commands.chat import Chat, Speaker

OPTIONS = {"max_new_tokens": 128, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "thinking": "auto"}


class Echo:
    """Answers with a count, and keeps what it was asked."""

    def __init__(self):
        self.asked, self.options = [], []

    def __call__(self, prompts, *, key, **options):
        self.asked += json.loads(json.dumps(prompts))
        self.options.append(options | {"key": jax.random.key_data(key).tolist()})
        return [f"answer {len(self.asked)}" for _ in prompts]


def talk(**options):
    echo = Echo()
    return Chat([Speaker("", echo, [])], OPTIONS, **options), echo


def said(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_the_conversation_is_remembered_and_forgotten():
    chat, echo = talk()
    assert chat.reply("hello") == "answer 1"
    assert chat.reply("//again") == "answer 2"
    assert echo.asked[1] == said("hello", "answer 1", "/again")
    chat.reply("/reset")
    chat.reply("new")
    assert echo.asked[2] == said("new")


def test_a_system_prompt_opens_every_turn_until_it_is_taken_away():
    chat, echo = talk(system="be brief")
    chat.reply("hello")
    chat.reply("/system be long")
    chat.reply("again")
    chat.reply("/reset")
    chat.reply("anew")
    chat.reply("/system")
    chat.reply("last")
    openings = [messages[0] for messages in echo.asked]
    assert openings == [
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": "be long"},
        {"role": "system", "content": "be long"},
        {"role": "user", "content": "anew"},
    ]
    assert [len(messages) for messages in echo.asked] == [2, 4, 2, 3]


def test_sampling_options_change_with_their_type_and_range():
    chat, echo = talk()
    for line in ("/temperature 0.25", "/max 7", "/top-k 3", "/top-p 0.5"):
        chat.reply(line)
    chat.reply("hello")
    chosen = {"max_new_tokens": 7, "temperature": 0.25, "top_k": 3, "top_p": 0.5}
    assert echo.options[0].items() >= chosen.items()
    assert type(echo.options[0]["top_k"]) is int
    for line, message in (
        ("/temperature -1", "/temperature: temperature=-1.0: wanted a value from 0.0"),
        ("/top-p 2", "/top-p: top_p=2.0: wanted a value from 1e-06 to 1.0"),
        ("/max 0", "/max: max_new_tokens=0: wanted a value from 1"),
        ("/max many", "/max: got 'many', wanted a whole number"),
        ("/thinking on", "/thinking: no such command; /help"),
        ("/quit", "/quit: no such command; /help"),
    ):
        assert chat.reply(line).startswith(message)
    assert chat.reply("/options") == "max_new_tokens 7, temperature 0.25, top_k 3, top_p 0.5"
    assert "/max N           max_new_tokens, now 7" in chat.reply("/help")
    assert len(echo.asked) == 1


def test_each_turn_has_its_key_and_a_seed_brings_them_back():
    chat, echo = talk(seed=1)
    for line in ("a", "b", "/seed 2", "c", "/seed 1", "d", "e"):
        chat.reply(line)
    first, second, other, again, then = [options["key"] for options in echo.options]
    assert len({str(key) for key in (first, second, other)}) == 3
    assert (again, then) == (first, second)


def test_two_models_keep_their_own_answers(tmp_path):
    one, two = Echo(), Echo()
    two.asked.append([])  # counts from 2
    chat = Chat([Speaker("A x", one, []), Speaker("B y", two, [])], OPTIONS, system="s")
    assert chat.reply("hello") == "[A x]\nanswer 1\n\n[B y]\nanswer 2"
    chat.reply("more")
    assert one.asked[1][1:] == said("hello", "answer 1", "more")
    assert two.asked[2][1:] == said("hello", "answer 2", "more")
    assert one.options == two.options
    path = tmp_path / "talk.jsonl"
    chat.reply(f"/save {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["A x", "B y"]
    opening = [{"role": "system", "content": "s"}]
    assert rows[1]["messages"] == opening + said("hello", "answer 2", "more", "answer 3")


def test_a_conversation_is_saved_and_replaces_no_file(tmp_path):
    chat, _ = talk()
    path = tmp_path / "talk.jsonl"
    assert "nothing has been said" in chat.reply(f"/save {path}")
    chat.reply("hel\u2028lo")
    assert "wanted a file" in chat.reply("/save")
    assert chat.reply(f"/save {path}").startswith(f"wrote {path}")
    before = path.read_bytes()
    chat.reply("more")
    assert "exists" in chat.reply(f"/save {path}") or "holds" in chat.reply(f"/save {path}")
    assert path.read_bytes() == before
    # It is what SFT reads.
    tok = chatmodel.make_tokenizer()
    (batch,) = jaxalign.sft_batches([str(path)], tok, rows=1, length=64, epochs=1)
    kept = batch.targets[0][batch.loss_mask[0]]
    assert tok.decode(kept, skip_special_tokens=True).strip() == "answer 1"


def test_a_message_that_cannot_be_answered_is_dropped_and_the_first_one_is_an_error():
    def full(prompts, **_):
        if len(prompts[0]) > 3:
            raise ValueError("prompts: 99 tokens")
        return ["short"]

    chat = Chat([Speaker("", full, [])], OPTIONS)
    chat.reply("a")
    chat.reply("b")
    assert chat.reply("c").startswith("error: prompts: 99 tokens\nYour last message is dropped")
    chat.reply("/reset")
    assert chat.reply("d") == "short"

    def never(prompts, **_):
        raise ValueError("no such template")

    with pytest.raises(ValueError, match="no such template"):
        Chat([Speaker("", never, [])], OPTIONS).reply("a")


def test_the_command_reads_lines_for_both_models(chat_models, monkeypatch, capsys):
    echo, prompts = Echo(), iter(["hello", "/nonsense", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(prompts))

    def generate(model, params, tok, prompts, *, max_new_tokens: "int" = 64, key=None):
        return echo(prompts, max_new_tokens=max_new_tokens, key=key)

    # The package has a function of the module's name, so that only this finds the module.
    monkeypatch.setattr(sys.modules["jaxalign.sampling.generate"], "generate", generate)
    model = str(chat_models / "chat")
    command = ["chat", model, "--versus", model, "--system", "s", "--max-new-tokens", "9"]
    assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert f"[A {model}]\nanswer 1\n\n[B {model}]\nanswer 2\n/nonsense: no such" in output
    assert echo.asked[0] == [{"role": "system", "content": "s"}, *said("hello")]
    assert echo.options[0]["max_new_tokens"] == 9
