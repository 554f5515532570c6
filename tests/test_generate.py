"""Sampling: greedy, filtered, stopped, reproducible, and never compiled twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plain_llama
import pytest
import tiny

from jaxalign.models.lm_head import target_logprobs
from jaxalign.parallel.jax_private import count_compiled
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, use_mesh
from jaxalign.sampling.draw import Sampling, sample_tokens
from jaxalign.sampling.engine import decode, empty_slots, read_prompts, stages
from jaxalign.sampling.generate import sample
from jaxalign.types import PromptBatch

KEY = jax.random.key(11)
ROWS, WIDTH, NEW = 8, 6, 7


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(tiny.DECODER)


def prompts(lengths=(1, 6, 3, 2, 5, 4, 6, 0)):
    rng = np.random.default_rng(5)
    mask = np.arange(WIDTH)[None] >= WIDTH - np.array(lengths)[:, None]
    tokens = np.where(mask, rng.integers(3, tiny.VOCAB, mask.shape), 0).astype(np.int32)
    return PromptBatch(tokens, mask, np.arange(len(lengths), dtype=np.int32))


def run(params, key=KEY, model=tiny.DECODER, batch=None, **options):
    batch = prompts() if batch is None else batch
    return sample(model, params, batch, key, **({"max_new_tokens": NEW} | options))


def test_greedy_equals_a_plain_loop(params):
    got = run(params, temperature=0.0)
    batch = prompts()
    for row in range(ROWS - 1):
        ids = batch.tokens[row][batch.mask[row]]
        for column in range(NEW):
            logits = plain_llama.logits(tiny.CONFIG, params, ids)[-1]
            token = int(np.argmax(logits))
            assert got.tokens[row, column] == token
            want = logits[token] - np.log(np.exp(logits).sum())
            np.testing.assert_allclose(got.logprobs[row, column], want, 1e-4, 1e-5)
            ids = np.append(ids, token)
    assert got.mask[:7].all()
    assert not got.finished.any()
    # An empty row stays empty.
    assert not got.mask[7].any()
    assert not got.tokens[7].any()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_the_trainers(params, temperature):
    answers = run(params, temperature=temperature, stop_tokens=(9, 30), pad_token=63)
    batch = prompts()
    ids = np.concatenate([batch.tokens, answers.tokens], 1)
    given = np.concatenate([batch.mask, answers.mask], 1)
    positions = np.maximum(given.cumsum(1) - 1, 0)
    hidden = jax.jit(tiny.DECODER.apply)(params, ids, positions, given.astype(np.int32))
    targets = np.roll(ids, -1, 1)
    trained = target_logprobs(tiny.DECODER, params, hidden, targets, temperature)
    got = trained[:, WIDTH - 1 : -1]
    mask = np.asarray(answers.mask)
    assert mask[:7].any()
    np.testing.assert_allclose(answers.logprobs[mask], got[mask], atol=1e-4)
    assert np.all(np.asarray(answers.logprobs)[~mask] == 0)


def test_stop_tokens_end_an_answer(params):
    free = np.asarray(run(params).tokens)
    stops = (int(free[0, 2]), int(free[1, 0]), int(free[2, NEW - 1]))
    got = run(params, stop_tokens=stops, pad_token=63)
    ended = 0
    for row in range(ROWS - 1):
        hits = np.flatnonzero(np.isin(free[row], stops))
        length = hits[0] + 1 if hits.size else NEW
        ended += hits.size > 0
        np.testing.assert_array_equal(got.tokens[row, :length], free[row, :length])
        np.testing.assert_array_equal(got.mask[row], np.arange(NEW) < length)
        assert np.all(got.tokens[row, length:] == 63)
        assert bool(got.finished[row]) == bool(hits.size)
    assert ended >= 3
    assert not got.finished[7]


def test_the_loop_ends_when_every_row_has(params):
    first = int(run(params, temperature=0.0, batch=prompts((3,) * ROWS)).tokens[0, 0])
    same = prompts((3,) * ROWS)
    same = same._replace(tokens=np.tile(same.tokens[:1], (ROWS, 1)))
    counted = []

    @dataclasses.dataclass(frozen=True)
    class Counting:
        base: object = tiny.DECODER

        def __getattr__(self, name):
            return getattr(tiny.DECODER, name)

        def logits(self, params, hidden):
            jax.debug.callback(lambda: counted.append(1))
            return tiny.DECODER.logits(params, hidden)

    run(params, model=Counting(), batch=same, temperature=0.0, stop_tokens=(first,))
    jax.effects_barrier()
    assert len(counted) == 1
    run(params, model=Counting(), batch=same, temperature=0.0, stop_tokens=(99,))
    jax.effects_barrier()
    assert len(counted) == 1 + NEW


def test_all_tokens_of_a_stage_are_one_program_without_the_host(params):
    """The loop over tokens is a loop of the program: nothing is handed to Python between two."""
    batch, stops = prompts(), jnp.zeros((1,), jnp.int32)
    sampling = Sampling(jnp.float32(1), jnp.int32(0), jnp.float32(1), stops, jnp.int32(0))
    read = read_prompts(tiny.DECODER, params, batch.tokens, batch.mask, jnp.int32(0), jnp.float32)
    slots = empty_slots(
        tiny.DECODER, jnp.int32(0), jnp.full(ROWS, NEW), slots=ROWS, prompt_length=WIDTH,
        max_new_tokens=NEW, cache_dtype=jnp.float32,
    )  # fmt: skip
    text = decode.lower(
        tiny.DECODER, params, slots, read, KEY, sampling, jnp.array(True), samples=1
    ).as_text()
    assert "stablehlo.while" in text
    for word in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv"):
        assert word not in text


def test_new_settings_compile_nothing_new(params):
    run(params)
    before = count_compiled(read_prompts), count_compiled(decode)
    for options in (
        {"temperature": 0.5},
        {"temperature": 0.0},
        {"top_k": 5},
        {"top_p": 0.4},
        {"temperature": 2, "top_k": 3, "top_p": 0.9},
        {"key": jax.random.key(1), "pad_token": 4},
    ):
        run(params, **options)
    assert (count_compiled(read_prompts), count_compiled(decode)) == before


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0, draws=4000):
    """Tokens drawn from one set of logits."""
    sampling = Sampling(
        jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.zeros(0), jnp.int32(0)
    )
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (draws, len(logits)))
    tokens, logprobs = jax.jit(sample_tokens)(jax.random.split(KEY, draws), rows, sampling)
    return np.asarray(tokens), np.asarray(logprobs)


PROBS = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 50}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.64}, [1, 3]),
        ({"top_p": 0.66}, [1, 3, 4]),
        ({"top_p": 0.96}, [0, 1, 2, 3, 4]),
        # Of the three kept by k, the first has 0.4/0.85 = 0.47 and two have 0.76.
        ({"top_k": 3, "top_p": 0.7}, [1, 3]),
        ({"top_k": 3, "top_p": 0.77}, [1, 3, 4]),
        # At temperature ½ the first two have 0.16/0.275 = 0.58 and 0.81.
        ({"temperature": 0.5, "top_p": 0.57}, [1]),
        ({"temperature": 0.5, "top_p": 0.8}, [1, 3]),
        ({"temperature": 0.0}, [1]),
    ],
    ids=str,
)
def test_filters_keep_exactly_the_likely_tokens(options, support):
    tokens, logprobs = filtered(np.log(PROBS) + 3.0, **options)
    assert sorted(set(tokens.tolist())) == support
    temperature = options.get("temperature", 1.0)
    scaled = PROBS ** (1 / temperature) if temperature else PROBS
    kept = np.zeros(5)
    kept[support] = scaled[support]
    share, wanted = np.bincount(tokens, minlength=5) / len(tokens), kept / kept.sum()
    # Four standard errors of a share, √(p(1 − p)/n).
    assert (abs(share - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / len(tokens)) + 1e-9).all()
    # Recorded log-probabilities are those of the whole distribution, filters or not.
    want = np.log(scaled / scaled.sum())
    np.testing.assert_allclose(logprobs, want[tokens], 1e-4)


def test_draws_follow_a_large_distribution():
    """All 1,000 tokens at once, blocks and all: a χ² test at one in a thousand."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(1000, 0.3))
    probs[::7] = 0
    probs /= probs.sum()
    with np.errstate(divide="ignore"):
        logits = np.log(probs)
    draws = 200_000
    tokens, _ = filtered(logits, draws=draws)
    counts = np.bincount(tokens, minlength=1000)
    assert counts[probs == 0].sum() == 0
    common = probs * draws >= 5
    want = np.append(probs[common], probs[~common].sum()) * draws
    got = np.append(counts[common], counts[~common].sum())
    degrees = len(want) - 1
    statistic = ((got - want) ** 2 / want).sum()
    # Wilson and Hilferty's approximation of the χ² quantile at 0.999.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3


def test_one_key_one_answer_on_any_mesh(params):
    want = run(params, stop_tokens=(9,))
    again = run(params, stop_tokens=(9,))
    other = run(params, key=jax.random.key(12), stop_tokens=(9,))
    jax.tree.map(np.testing.assert_array_equal, want, again)
    assert np.any(want.tokens != other.tokens)
    # Rows draw for themselves.
    assert len({tuple(row) for row in np.asarray(want.tokens).tolist()}) == ROWS
    for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = make_mesh(**sizes)
        placed = jax.device_put(params, param_shardings(tiny.DECODER.axes, mesh))
        spread = run(placed, stop_tokens=(9,))
        assert len(spread.tokens.sharding.device_set) == 8
        np.testing.assert_array_equal(spread.tokens, want.tokens)
        np.testing.assert_array_equal(spread.mask, want.mask)
        np.testing.assert_allclose(spread.logprobs, want.logprobs, atol=1e-4)


def test_cache_is_updated_in_place(params):
    """The donated cache of the decode loop is the cache that comes out: no second copy."""
    read = read_prompts(
        tiny.DECODER, params, prompts().tokens, prompts().mask, jnp.int32(0), "float32"
    )
    state = empty_slots(
        tiny.DECODER, 0, np.full(ROWS, NEW), slots=4, prompt_length=WIDTH, max_new_tokens=NEW,
        cache_dtype="float32",
    )  # fmt: skip
    sampling = Sampling(
        jnp.float32(1), jnp.int32(0), jnp.float32(1), jnp.zeros(0, jnp.int32), jnp.int32(0)
    )
    out = decode(tiny.DECODER, params, state, read, KEY, sampling, jnp.array(True), samples=1)
    assert all(layer.is_deleted() for layer in (*state.cache.keys, *state.cache.values))
    assert np.asarray(out.lengths).sum() == (ROWS - 1) * NEW


@pytest.mark.parametrize("slots", [1, 3, 4])
def test_slots_do_not_show(params, slots):
    """Few slots refilled from the queue write what one slot an answer writes, in fewer steps."""
    stops = tuple(range(3, 20))
    want = run(params, stop_tokens=stops)
    got = run(params, stop_tokens=stops, slots=slots)
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    lengths = np.asarray(want.mask).sum(1)
    assert len(set(lengths.tolist())) > 2  # ragged, or this would show nothing
    # No step is lost as long as answers wait: greedy filling of slots in order, by hand.
    ends = np.zeros(slots, int)
    for length in lengths[lengths > 0]:
        ends[ends.argmin()] += length
    assert int(got.steps) == ends.max()


@pytest.mark.parametrize("stops", [(), (9, 30)])
def test_a_cache_that_grows_does_not_show(params, stops):
    assert stages(70) == [32, 64, 70]
    grown = run(params, max_new_tokens=70, stop_tokens=stops)
    whole = run(params, max_new_tokens=70, stop_tokens=stops, slots=ROWS - 1)
    np.testing.assert_array_equal(grown.tokens, whole.tokens)
    np.testing.assert_allclose(grown.logprobs, whole.logprobs, atol=1e-5)
    assert grown.mask.sum() > 7 * 32 or stops


def test_samples_of_a_prompt_share_its_reading(params):
    """n samples of a prompt are what n copies of the prompt give, with n times less reading."""
    batch = prompts()
    copies = PromptBatch(*(np.repeat(x, 3, axis=0) for x in batch))
    want = run(params, batch=copies, stop_tokens=(9, 30))
    for slots in (None, 5):
        got = run(params, stop_tokens=(9, 30), samples=3, slots=slots)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    assert len({tuple(row) for row in np.asarray(want.tokens)[:3].tolist()}) == 3


def test_a_cache_in_half_precision_changes_little(params):
    want = run(params, temperature=0.0)
    got = run(params, temperature=0.0, cache_dtype="bfloat16")
    first = np.asarray(want.mask)[:, 0]
    np.testing.assert_allclose(got.logprobs[first, :2], want.logprobs[first, :2], atol=1e-2)
    assert np.any(np.asarray(got.logprobs) != np.asarray(want.logprobs))
    less = run(params, temperature=0.0, cache_dtype="float8_e4m3fn")  # 3 bits of mantissa, not 7
    apart = [np.abs(np.asarray(x.logprobs - want.logprobs))[first, :2].mean() for x in (got, less)]
    assert apart[0] < apart[1] < 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"samples": 0},
        {"slots": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(params, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        run(params, **options)


def test_a_real_model_writes_the_golden_story(shared):
    """stories260K: 64 greedy ids from the beginning-of-text token, as another implementation."""
    from jaxalign.hf import load_pretrained

    model, params = load_pretrained(shared / "data/stories260K/hf")
    golden = np.load(shared / "data/stories260K/golden.npz")["greedy_from_bos"]
    prompt = PromptBatch(np.array([[golden[0]]], np.int32), np.array([[True]]), np.array([0]))
    out = sample(model, params, prompt, jax.random.key(0), max_new_tokens=64, temperature=0.0)
    np.testing.assert_array_equal(out.tokens[0], golden[1:])


def test_slots_waste_few_steps_on_ragged_answers(params):
    """128 answers of 4 to 64 tokens by 16 slots, against Σ length / slots."""
    lengths = np.random.default_rng(0).integers(4, 65, 128)
    batch = PromptBatch(*(np.resize(x, (32, *x.shape[1:])) for x in prompts((2, 6, 3, 4))))
    got = run(params, batch=batch, samples=4, slots=16, max_new_tokens=64, lengths=lengths)
    np.testing.assert_array_equal(np.asarray(got.mask).sum(1), lengths)
    assert not np.asarray(got.tokens)[~np.asarray(got.mask)].any()
    assert not np.asarray(got.finished).any()
    assert int(got.steps) <= 1.15 * lengths.sum() / 16


def test_lengths_cut_answers_short_and_change_nothing_else(params):
    want = run(params, stop_tokens=(9,))
    lengths = np.array([1, 2, 3, 4, 5, 6, 7, 7])
    got = run(params, stop_tokens=(9,), lengths=lengths)
    kept = np.asarray(want.mask) & (np.arange(NEW) < lengths[:, None])
    np.testing.assert_array_equal(got.mask, kept)
    np.testing.assert_array_equal(np.asarray(got.tokens)[kept], np.asarray(want.tokens)[kept])
    np.testing.assert_array_equal(got.logprobs, np.where(kept, want.logprobs, 0))


@pytest.mark.parametrize("lengths", [np.full(ROWS, NEW + 1), np.zeros(ROWS, int), np.ones(3, int)])
def test_lengths_out_of_range_are_refused(params, lengths):
    with pytest.raises(ValueError, match="lengths: got"):
        run(params, lengths=lengths)


def test_a_mesh_of_its_own_writes_the_same(params):
    """Trained with weights split by fsdp, written with heads split over two devices."""
    home = make_mesh(fsdp=8)
    placed = jax.device_put(params, param_shardings(tiny.DECODER.axes, home))
    want = run(placed, stop_tokens=(9,))
    other = make_mesh(data=4, tensor=2)
    got = run(placed, stop_tokens=(9,), mesh=other)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    assert got.tokens.sharding.mesh == home
    with use_mesh(other):
        cache = jax.jit(lambda: tiny.DECODER.init_cache(8, 5))()
    for layer in (*cache.keys, *cache.values):
        assert layer.sharding.shard_shape(layer.shape) == (2, 1, 5, 8)
