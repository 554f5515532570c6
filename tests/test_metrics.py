"""Numbers on their way to `metrics.jsonl`."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.run.metrics import JsonlWriter, add_up, check_finite, to_floats
from jaxalign.types import Weighted


def test_device_scalars_become_floats():
    floats = to_floats({"a": jnp.float32(0.5), "b": np.int32(3), "c": 2})
    assert floats == {"a": 0.5, "b": 3.0, "c": 2.0}
    assert all(type(value) is float for value in floats.values())


def test_means_over_batches_are_divided_once():
    parts = [
        {"nll": Weighted(jnp.float32(6.0), jnp.float32(2.0)), "none": Weighted(0.0, 0.0)},
        {"nll": Weighted(jnp.float32(1.0), jnp.float32(5.0)), "none": Weighted(0.0, 0.0)},
    ]
    # (6 + 1) / (2 + 5), where the mean of means would be (3 + 0.2) / 2.
    assert add_up(parts) == {"nll": pytest.approx(1.0), "none": 0.0}
    assert add_up([]) == {}


def test_a_loss_that_is_no_number_is_told_with_its_step():
    check_finite({"loss": 1.0, "grad_norm": 2.0, "time": float("nan")}, 7)
    check_finite({}, 7)
    with pytest.raises(FloatingPointError, match=r"step 7: loss=nan; "):
        check_finite({"loss": float("nan"), "grad_norm": 1.0}, 7)
    with pytest.raises(FloatingPointError, match=r"step 8: loss=inf, grad_norm=-inf; "):
        check_finite({"loss": float("inf"), "grad_norm": -float("inf")}, 8)


def test_every_step_is_a_json_line_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"loss": 0.5})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'  # before it is closed
    writer.write(2, {"loss": float("nan"), "bound": float("inf")})
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": "nan", "bound": "inf"}]


BEFORE = '{"step": 0, "e": 1}\n{"step": 1}\n{"step": 2}\n{"step": 2, "e": 1}\n{"step": 3}\n{"st'


@pytest.mark.parametrize(
    ("resume_at", "kept"),
    [(None, 0), (0, 1), (1, 2), (2, 4), (3, 5), (9, 5)],
)
def test_resuming_keeps_what_was_written_up_to_the_checkpoint(tmp_path, resume_at, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(BEFORE)
    writer = JsonlWriter(path, resume_at)
    writer.write(4, {"loss": 1.0})
    writer.close()
    assert path.read_text().splitlines() == [
        *BEFORE.splitlines()[:kept],
        '{"step": 4, "loss": 1.0}',
    ]


def test_resuming_without_a_file_starts_one(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 5)
    writer.write(6, {})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 6}\n'


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 2, "loss": 0.\xff}',
        b'{"stop": 2}',
        b'{"step": Infinity}',
        b"[" * 100_000,
        b"\0" * 9,
    ],
    ids=["utf-8", "no step", "infinite", "nested", "zeros"],
)
def test_a_damaged_line_is_dropped_counted_and_named(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "loss": 1.0}', b'{"step": 3, "eval/text": "a\xe2\x80\xa8b"}']
    path.write_bytes(b"\n".join([good[0], damage, good[1], b'{"step": 4, "lo']))
    writer = JsonlWriter(path, 3)
    writer.close()
    assert path.read_bytes() == b"\n".join([*good, b""])
    # The last one was cut off by a kill, and its step is done again: nothing is lost with it.
    assert capsys.readouterr().out == f"{path}: dropped 1 damaged lines (2)\n"
    assert writer.evaluated == 3


def test_the_last_evaluation_is_known(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    assert writer.evaluated is None
    writer.write(2, {"loss": 1.0})
    assert writer.evaluated is None
    writer.write(2, {"eval/loss": 1.0})
    assert writer.evaluated == 2
    writer.close()
    again = JsonlWriter(tmp_path / "metrics.jsonl", 1)
    assert again.evaluated is None
    again.close()
