"""The roofline of decoding, by hand, for an 8B model on three kinds of devices."""

import jax
import jax.numpy as jnp
import pytest

from jaxalign.commands.bench.sizes import SIZES
from jaxalign.models.base import DecoderConfig
from jaxalign.parallel.chips import CHIPS
from jaxalign.plan.decode import decode_steps

# Llama 3.1 8B: 32 layers of query and output (4096²), key and value (4096 × 1024), three matrices
# of the MLP (4096 × 14336), two norms; the head (128256 × 4096) and the last norm.
LAYER = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
HEAD = 128256 * 4096
WEIGHTS = 2 * (32 * (LAYER + 2 * 4096) + HEAD + 4096)  # 15.01e9 bytes
COLUMN = 32 * 2 * 8 * 128 * 2  # 131,072 bytes of keys and values a token


def steps(name, devices, context=1536, cache_dtype="bfloat16", config=SIZES["8B"]):
    embedding = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), jnp.float32)
    rest = jax.ShapeDtypeStruct((WEIGHTS // 2,), jnp.float32)
    found = decode_steps(
        config,
        {"embedding": embedding, "rest": rest},
        CHIPS[name],
        devices,
        context=context,
        dtype="bfloat16",
        cache_dtype=cache_dtype,
    )
    return {step.slots: step for step in found}


@pytest.mark.parametrize(
    ("name", "devices", "bandwidth", "memory"),
    # v5p-8 are 4 chips: TensorCores are counted.
    [("v5p", 4, 2.765e12, 102.8e9), ("v6e", 8, 1.6e12, 33.55e9), ("h100", 8, 3.352e12, 79.8e9)],
)
def test_8b_by_hand(name, devices, bandwidth, memory):
    found = steps(name, devices)
    assert list(found) == [64, 128, 256, 512]
    for slots, step in found.items():
        read = WEIGHTS + slots * 1536 * COLUMN
        assert step.bytes_per_token == pytest.approx(read / slots, rel=1e-9)
        assert step.fits == (read < devices * memory)
        assert step.tokens_per_second == pytest.approx(slots / step.seconds)
    # 64 slots: (15.01 + 12.88) GB over the bandwidth of all.
    assert found[64].bound == "memory"
    assert found[64].seconds == pytest.approx(27.894e9 / (devices * bandwidth), rel=1e-3)


def test_figures():
    """In round numbers, as one would on paper."""
    assert steps("h100", 8)[64].seconds == pytest.approx(1.040e-3, rel=1e-3)
    assert steps("h100", 8)[512].seconds == pytest.approx(4.404e-3, rel=1e-3)
    assert steps("v5p", 4)[64].seconds == pytest.approx(2.522e-3, rel=1e-3)
    assert steps("v6e", 8)[512].seconds == pytest.approx(9.226e-3, rel=1e-3)
    assert steps("v6e", 8)[64].bytes_per_token == pytest.approx(435.8e6, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "bound", "flops", "link"),
    [("h100", "links", 989.4e12, 450e9), ("v5e", "compute", 197e12, 200e9)],
)
def test_many_slots_of_short_contexts_are_bound_by_something_else(name, bound, flops, link):
    """One column: 512 slots compute 2 FLOPs a weight each, and send 2 · 2 · 32 · 4096 · 2 bytes."""
    step = steps(name, 8, context=1)[512]
    times = {
        "compute": 512 * (2 * (32 * LAYER + HEAD) + 32 * 4 * 4096) / (8 * flops),
        "links": 512 * 2 * 2 * 32 * 4096 * 2 * (7 / 8) / link,
    }
    assert step.bound == bound
    assert step.seconds == pytest.approx(times[bound], rel=1e-6)
    assert max(times, key=times.get) == bound


def test_a_cache_in_a_byte_and_windows():
    half = steps("h100", 8, cache_dtype="int8")[64]
    assert half.bytes_per_token * 64 == pytest.approx(WEIGHTS + 64 * 1536 * COLUMN / 2, rel=1e-9)
    base = SIZES["8B"].__dict__
    window = DecoderConfig(**base | {"window": 512, "window_layers": (True, False) * 16})
    short = steps("h100", 8, config=window)[64]
    read = WEIGHTS + 64 * COLUMN * (512 + 1536) / 2
    assert short.bytes_per_token * 64 == pytest.approx(read, rel=1e-9)
    every = DecoderConfig(**base | {"window": 512})
    assert steps("h100", 8, config=every)[64].bytes_per_token == pytest.approx(
        (WEIGHTS + 64 * COLUMN * 512) / 64, rel=1e-9
    )
