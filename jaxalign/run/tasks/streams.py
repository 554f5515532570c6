"""The PRNG streams of a run, apart from those of its steps, which are numbered from 0."""

from __future__ import annotations

import enum

import jax


class Stream(enum.IntEnum):
    """The purpose of a stream. Its numbers are above every step's; saved runs depend on them."""

    HELD_OUT = 2**31 - 1
    ADAPTERS = 2**31 - 2
    REWARD_HEAD = 2**31 - 3
    CRITIC_HEAD = 2**31 - 4
    CALIBRATION = 2**31 - 5
    NEFTUNE = 2**31 - 6


def stream_key(seed: int, stream: Stream) -> jax.Array:
    """The key of one stream of the run with this seed."""
    return jax.random.fold_in(jax.random.key(seed), int(stream))
