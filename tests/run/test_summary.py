"""The line at the end of a run, and its lines where no terminal shows a bar."""

import sys

from jaxalign.run.bar import default_bar
from jaxalign.run.summary import summary


def test_held_out_figures_come_before_those_of_training():
    history = [{"accuracy": 0.1, "loss/nll": 3.0}] * 20
    line = summary({"accuracy": 0.5}, {"accuracy": 0.9375}, history)
    assert line == "held-out accuracy 0.5 → 0.938, loss 3 → 3 nats a token"
    assert summary({}, {"loss/nll": 2.0}, []) == "held-out loss 2 nats a token"
    assert summary({}, {}, [{"epoch": 1.0}]) == ""


def test_training_is_shown_by_its_first_and_last_tenth():
    scores = [1.0, 3.0] + [9.0] * 16 + [4.0, 6.0]
    history = [
        {"objective/scores": score, "objective/kl": step, "response/length": 8.0}
        for step, score in enumerate(scores)
    ]
    history[19]["response/length"] = float("nan")  # left out
    assert summary({}, {}, history) == ("score 2 → 5, length 8 → 8 tokens, KL 18.5 nats an answer")


def test_without_a_terminal_there_are_plain_lines(capsys, monkeypatch):
    bar = default_bar("sft", 4, 1, silent=False)
    bar.set_postfix_str("loss 1", refresh=False)
    bar.update()
    bar.write(f"{bar.desc} 2/4: loss 1")
    bar.close()
    found = capsys.readouterr()
    assert (found.out, found.err) == ("sft 2/4: loss 1\n", "")
    assert not bar.disable
    assert default_bar("sft", 4, 1, silent=True).disable

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = default_bar("sft", 4, 1, silent=False)
    bar.update()
    bar.close()
    assert "2/4" in capsys.readouterr().err
