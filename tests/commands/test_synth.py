"""`jaxalign synth`: the command against a small server, and models that are loaded here."""

import os
import signal
import subprocess
import sys
import threading
import time

import chatmodel
import jax
import numpy as np
import pytest
import writers
import yaml

import jaxalign
from jaxalign.commands import cli
from jaxalign.commands.synth import (
    FunctionWriter,
    LocalConfig,
    RequestFactory,
    Sampling,
    WriterConfig,
)
from jaxalign.commands.synth.config import RewardModelConfig, load_synth
from jaxalign.commands.synth.models import local_writer, score_writer
from jaxalign.commands.synth.run import run_synth
from jaxalign.data import read_rows, to_conversation, to_preference

KEY = "sk-very-secret-0123456789"

pytestmark = pytest.mark.usefixtures("kept_programs")


def settings(tmp_path, address, **sections):
    server = {"address": address, "backoff": 0.01}
    values = {"out": str(tmp_path / "out.jsonl"), "writer": {"model": "player", "server": server}}
    if not sections:
        sections["instruct"] = {
            "seeds": ["${examples}/seed_tasks.jsonl"],
            "count": 20,
            "tasks_per_prompt": 4,
        }
    path = tmp_path / "synth.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return str(path)


def untimed(path):
    rows = writers.rows_of(path)
    for row in rows:
        row["provenance"].pop("time")
    return rows


def test_self_instruct_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with writers.serving() as server:
        path = settings(tmp_path, server.address)
        assert cli.main(["synth", path]) == 0
        output = capsys.readouterr().out
        requests = len(server.seen)
        assert f"{tmp_path / 'out.jsonl'}: 20 rows; {requests} replies asked for" in output
        assert "dropped 8: instruction of less than 4 words" in output
        assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}"
        assert len([to_conversation(row) for row in read_rows(str(tmp_path / "out.jsonl"))]) == 20

        before = (tmp_path / "out.jsonl").read_bytes()
        assert cli.main(["synth", path]) == 0
        assert "20 rows; 0 replies asked for" in capsys.readouterr().out
        assert len(server.seen) == requests
        assert (tmp_path / "out.jsonl").read_bytes() == before

        assert cli.main(["synth", path, "writer.temperature=0.1"]) == 2
        assert "was asked with another prompt, writer or sampling" in capsys.readouterr().err
    for file in tmp_path.iterdir():
        assert KEY not in file.read_text(encoding="utf-8")
    assert KEY not in output


def test_killed_by_the_system_and_continued(tmp_path):
    release = threading.Event()

    def stuck(body, number):
        if number > 12:
            release.wait()  # so that the command cannot end by itself
        return writers.friendly(body, number)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    out, journal = killed / "out.jsonl", killed / "out.jsonl.journal"
    with writers.serving(stuck) as server:
        path = settings(killed, server.address)
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxalign", "synth", path],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OPENAI_API_KEY": KEY},
        )
        try:
            while process.poll() is None and (
                len(server.seen) <= 12 or not journal.exists() or b"\n" not in journal.read_bytes()
            ):
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            release.set()
        seen = len(server.seen)
        assert seen > 12, "the command ended by itself"
        kept = len(journal.read_bytes().splitlines())
        assert 0 < kept <= seen
        server.answer = writers.friendly
        result = run_synth(load_synth(path))
        expected = run_synth(load_synth(settings(whole, server.address)))
    assert untimed(out) == untimed(whole / "out.jsonl")
    assert result.dropped == expected.dropped
    assert result.requested <= expected.requested - kept + 1  # one was cut off


def test_a_chinese_run_asks_in_chinese(tmp_path):
    with writers.serving() as server:
        config = load_synth(settings(tmp_path, server.address), ["language=zh", "instruct.count=1"])
        with pytest.raises(ValueError, match="without a new row"):
            run_synth(config)  # the player knows English only
    text = server.seen[0][2]["messages"][0]["content"]
    assert text.startswith("下面是人们交给助手的一些任务。请接着往下写4个新任务，编号从7开始。")
    assert all("\u4e00" <= line[3] <= "\u9fff" for line in text.splitlines()[5:11])


def test_pairs_by_a_judge_of_its_own(tmp_path, monkeypatch, capsys):
    def answer(body, number):
        return 200, {}, writers.completion(f"Answer {body['seed'] % 1000}")

    monkeypatch.setenv("JUDGE_KEY", "judge-key")
    with writers.serving(answer) as server, writers.serving() as court:
        judge = {"address": court.address, "key_variable": "JUDGE_KEY"}
        path = settings(
            tmp_path,
            server.address,
            judge={"model": "judge", "server": judge, "max_tokens": 77},
            preferences={"prompts": ["${examples}/prompts.jsonl"], "count": 6, "answers": 3},
        )
        assert cli.main(["synth", path]) == 0
    assert {body["model"] for *_, body in court.seen} == {"judge"}
    assert {body["max_tokens"] for *_, body in court.seen} == {77}
    assert {body["temperature"] for *_, body in court.seen} == {0.0}
    assert {headers["Authorization"] for _, headers, _ in court.seen} == {"Bearer judge-key"}
    pairs = [to_preference(row) for row in read_rows(str(tmp_path / "out.jsonl"))]
    output = capsys.readouterr().out
    assert f"out.jsonl: {len(pairs)} rows" in output
    rows = untimed(tmp_path / "out.jsonl")
    assert rows
    assert all(row["provenance"]["judge"] == "judge" for row in rows)
    assert all(row["provenance"]["scores"]["margin"] > 0 for row in rows)


# Models that are loaded here


def test_a_local_model_answers_as_generate_does(chat_models):
    config = WriterConfig(
        model=str(chat_models / "chat"), local=LocalConfig(), max_tokens=6, concurrency=2
    )
    factory = RequestFactory(0, Sampling(0.0, 1.0, 6))
    texts = ["hi", "up?", "so"]
    requests = [factory.request(text, text) for text in texts]
    writer = local_writer(config)
    replies = dict(writer.write(requests, range(3)))
    model, params = jaxalign.load_pretrained(chat_models / "chat")
    tok = jaxalign.load_tokenizer(chat_models / "chat")
    expected = jaxalign.generate(model, params, tok, texts, max_new_tokens=6, temperature=0.0)
    assert [replies[n].text for n in range(3)] == expected
    assert replies[0].finish == "length"

    # Sampled, a group that is sent again gives the same, whichever of it is missing.
    factory = RequestFactory(0, Sampling(1.0, 1.0, 6))
    requests = [factory.request(text, text) for text in texts]
    first = dict(writer.write(requests, range(3)))
    again = dict(writer.write(requests, [1]))
    assert again[1].text == first[1].text
    assert len({reply.text for reply in first.values()}) == 3


def test_a_local_writer_and_a_reward_model_on_a_mesh(chat_models, tmp_path):
    values = {
        "out": str(tmp_path / "pairs.jsonl"),
        "writer": {"model": str(chat_models / "chat"), "local": {}, "max_tokens": 6},
        "reward_model": {"source": str(chat_models / "scorer"), "length": 128, "rows": 4},
        "preferences": {
            "prompts": [chatmodel.write_rows(tmp_path / "p.jsonl", chatmodel.PROMPTS[:2])],
            "answers": 2,
            "ranker": "reward",
        },
        "mesh": {"data": -1, "fsdp": 1},
    }
    result = run_synth(load_synth(values))
    # Six tokens hold no end token here: every answer is cut off, and that is counted.
    assert result.rows == 0
    assert result.dropped["answer: cut off at max_tokens"] == 4
    assert result.dropped["prompt: less than two answers to compare"] == 2

    writer = FunctionWriter("fixed", lambda rs: [(f"answer {r.seed}", "stop") for r in rs], 4)
    out = tmp_path / "more.jsonl"
    result = run_synth(load_synth(values | {"out": str(out)}), writer)
    assert result.rows == 2
    assert result.dropped == {}
    for row in untimed(out):
        scores = row["provenance"]["scores"]
        assert scores["margin"] == scores["chosen"] - scores["rejected"] > 0
    assert [to_preference(row).prompt[0]["content"] for row in read_rows(str(out))] == ["hi", "up?"]


def test_scores_are_those_of_the_reward_model(chat_models):
    source = chat_models / "scorer"
    writer = score_writer(RewardModelConfig(source=str(source), length=64, rows=2))
    turns = [("hi", "ok"), ("up?", "yes, and more"), ("q", "x" * 60), ("so", "no")]
    factory = RequestFactory(0, Sampling(0.0, 1.0, 1))
    requests = [
        factory.request(
            str(n),
            [{"role": "user", "content": a}, {"role": "assistant", "content": b}],
        )
        for n, (a, b) in enumerate(turns)
    ]
    replies = dict(writer.write(requests, range(4)))
    assert replies[2].finish == "too_long"

    model, params = jaxalign.load_pretrained(source)
    tok = jaxalign.load_tokenizer(source)
    for n in (0, 1, 3):
        # By hand: ChatML up to the end token of the answer, alone in its row, unpadded.
        text = (
            f"<|im_start|>user\n{turns[n][0]}<|im_end|>\n"
            f"<|im_start|>assistant\n{turns[n][1]}<|im_end|>"
        )
        ids = np.asarray([tok(text, add_special_tokens=False)["input_ids"]])
        hidden = model.apply(params, ids, np.arange(ids.shape[1])[None], np.ones_like(ids))
        expected = float(jax.device_get(model.scores(params, hidden))[0, -1])
        assert float(replies[n].text) == pytest.approx(expected, abs=1e-5)


def test_a_model_of_the_wrong_kind_is_refused(chat_models):
    with pytest.raises(ValueError, match="is a reward model; wanted a language model"):
        local_writer(WriterConfig(model=str(chat_models / "scorer"), local=LocalConfig()))
    with pytest.raises(ValueError, match="is a language model without a score"):
        score_writer(RewardModelConfig(source=str(chat_models / "chat")))


# Configuration

LEAST = {"out": "o.jsonl", "writer": {"model": "m"}}
INSTRUCT = LEAST | {"instruct": {"seeds": ["s.jsonl"]}}
PREFER = LEAST | {"preferences": {"prompts": ["p.jsonl"]}}


@pytest.mark.parametrize(
    ("values", "assignment", "message"),
    [
        (LEAST, "seed=1", "instruct, preferences: wanted one section of the two"),
        (INSTRUCT, "preferences.prompts=[a]", "wanted one section of the two"),
        (INSTRUCT, "out=rows.json", "wanted a file name that ends with .jsonl"),
        (INSTRUCT, "language=fr", "language='fr'"),
        (INSTRUCT, "seed=-1", "seed=-1"),
        (INSTRUCT, "mesh.data=2", "mesh='given': wanted null"),
        (INSTRUCT, "judge.model=j", "judge='j': wanted null"),
        (INSTRUCT, "reward_model.source=r", "reward_model: given"),
        (PREFER, "preferences.ranker=reward", "reward_model: missing"),
        (PREFER, "preferences.ranker=coin", "ranker='coin'"),
        (PREFER, "preferences.pairs=some", "pairs='some'"),
        (PREFER, "preferences.answers=1", "answers=1"),
        (PREFER, "preferences.min_margin=-1", "min_margin=-1"),
        (PREFER, "preferences.count=0", "count=0"),
        (INSTRUCT, "instruct.seeds=[]", "seeds=()"),
        (INSTRUCT, "instruct.form=chat", "form='chat'"),
        (INSTRUCT, "instruct.rouge_threshold=0", "rouge_threshold=0.0"),
        (INSTRUCT, "instruct.max_words=2", "max_words=2: wanted min_words or more"),
        (INSTRUCT, "instruct.patience=0", "patience=0"),
        (INSTRUCT, "writer.temperature=-1", "temperature=-1.0"),
        (INSTRUCT, "writer.top_p=0", "top_p=0.0"),
        (INSTRUCT, "writer.concurrency=0", "concurrency=0"),
        (INSTRUCT, "writer.local.chat_template=none", "chat_template='none'"),
        (INSTRUCT, "writer.server.retries=-1", "retries=-1"),
        (INSTRUCT, "writer.server.timeout=0", "timeout=0.0"),
        (INSTRUCT, "writer.server.limit_field=n", "limit_field='n'"),
        (INSTRUCT, "writer.key=abc", "writer.key: unknown key"),
    ],
)
def test_wrong_settings_are_named(values, assignment, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is looked at)
        load_synth(values, [assignment])
    assert message in str(caught.value)


def test_server_and_local_exclude_each_other():
    with pytest.raises(ValueError, match="wanted null with a server"):
        load_synth(INSTRUCT, ["writer.server={}", "writer.local={}"])


def test_a_key_that_is_no_text_is_not_shown():
    with pytest.raises(ValueError, match=r"writer\.server\.key: wanted text") as caught:
        load_synth(INSTRUCT, ["writer.server.key=987654321"])
    assert "987654321" not in str(caught.value)
