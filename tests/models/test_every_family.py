"""Every family against transformers: logits, cached decoding, gradients, files there and back.

A family's test is its line in `families.CASES`.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import their_cache
from safetensors import safe_open

from jaxalign.hf import families as tables
from jaxalign.hf import load_pretrained, save_pretrained

torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
transformers = pytest.importorskip("transformers")

T = 16
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 48, (2, T)).astype(np.int32)
LENGTHS = (11, T)


def randomised(model):
    """Every parameter random, biases and norms too, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    offset = "Gemma" in type(model).__name__
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if ("norm" in name or "ln_" in name) and not name.endswith("bias"):
                p.copy_((0 if offset else 1) + 0.2 * noise)
            elif p.ndim == 1:
                p.copy_(0.15 * noise)
            else:
                p.copy_(noise * (0.3 if "embed" in name or "wte" in name else p.shape[-1] ** -0.5))
    return model.eval()


@pytest.fixture(scope="module", params=list(families.CASES))
def pair(request, tmp_path_factory):
    """(folder, their model, our model, our parameters, our compiled forward pass)."""
    keys = json.loads(json.dumps(families.keys(request.param)))
    config = transformers.AutoConfig.for_model(request.param, **keys)
    auto = transformers.AutoModelForCausalLM
    theirs = randomised(auto.from_config(config, attn_implementation="eager"))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    model, params = load_pretrained(folder)
    return folder, theirs, model, params, jax.jit(functools.partial(hidden_and_logits, model))


def hidden_and_logits(model, params, *rows):
    hidden = model.apply(params, *rows)
    return hidden, model.logits(params, hidden)


def run_torch(model, tokens, mask=None, positions=None, past=None):
    """Call with one row: dynamic rope and longrope look at the longest row of a batch."""
    long = lambda x: None if x is None else torch.tensor(x, dtype=torch.long)  # noqa: E731
    if past is None and "dynamic" in str(getattr(model.config, "rope_parameters", "")):
        with torch.no_grad():
            model(input_ids=torch.ones((1, 1), dtype=torch.long))  # forgets the last length
    return model(
        input_ids=long(tokens),
        attention_mask=long(mask),
        position_ids=long(positions),
        **their_cache.given(model, past),
    )


def torch_logits(*args):
    with torch.no_grad():
        return run_torch(*args).logits.numpy()


def rows(left=False):
    """Both documents padded to one length: tokens with nonsense as padding, positions, mask."""
    mask = np.zeros((2, T), np.int32)
    positions = np.zeros((2, T), np.int32)
    tokens = RNG.integers(3, 48, (2, T)).astype(np.int32)
    for row, length in enumerate(LENGTHS):
        here = slice(T - length, T) if left else slice(0, length)
        mask[row, here] = 1
        positions[row, here] = np.arange(length)
        tokens[row, here] = TOKENS[row, :length]
    return tokens, positions, mask


def close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(got), want, atol=tolerance, rtol=0)


def test_logits_with_padding_on_either_side_and_packed(pair):
    _, theirs, _, params, run = pair
    alone = [torch_logits(theirs, TOKENS[i : i + 1, :n])[0] for i, n in enumerate(LENGTHS)]
    assert min(np.abs(want).max() for want in alone) > 0.3  # else 1e-4 would show nothing
    for left in (False, True):
        tokens, positions, mask = rows(left)
        _, got = run(params, tokens, positions, mask)
        assert np.isfinite(got).all()
        for row, want in enumerate(alone):
            close(got[row][mask[row] > 0], want)
            padded = torch_logits(theirs, *(x[row : row + 1] for x in (tokens, mask, positions)))
            close(got[row][mask[row] > 0], padded[0][mask[row] > 0])
    split = 9  # two documents in one row
    positions = np.concatenate([np.arange(split), np.arange(T - split)])[None].astype(np.int32)
    segments = np.repeat([1, 2], [split, T - split])[None].astype(np.int32)
    packed = run(params, *(np.repeat(x, 2, 0) for x in (TOKENS[1:], positions, segments)))[1][0]
    for part in (slice(0, split), slice(split, T)):
        close(packed[part], torch_logits(theirs, TOKENS[1:, part])[0])


def test_decoding_with_a_cache(pair):
    """Prefill and steps as in sampling, prompts padded on the left."""
    _, theirs, model, params, _ = pair
    tokens, positions, mask = rows(left=True)
    extend = jax.jit(functools.partial(extend_and_logits, model))
    cache, got = model.init_cache(2, T + 2), []
    stops = (T - 2, T - 1, T)
    for start, stop in zip((0, *stops), stops, strict=False):
        here = (slice(None), slice(start, stop))
        logits, cache = extend(params, cache, tokens[here], positions[here], mask[here])
        got.append(np.asarray(logits))
    assert int(cache.used) == T
    got = np.concatenate(got, axis=1)
    for row, length in enumerate(LENGTHS):
        want, past, first = [], None, T - length
        for start, stop in zip((first, *stops), stops, strict=False):
            with torch.no_grad():
                out = run_torch(theirs, tokens[row : row + 1, start:stop], past=past)
            past = their_cache.of(theirs, out)
            want.append(out.logits.numpy()[0])
        close(got[row, first:], np.concatenate(want))


def extend_and_logits(model, params, cache, *new):
    hidden, cache = model.extend(params, cache, *new)
    return model.logits(params, hidden), cache


def test_gradients(pair):
    """Every parameter's gradient, brought to transformers' names as if it were a checkpoint."""
    _, theirs, model, params, _ = pair
    tokens, positions, mask = rows()
    weight = np.random.default_rng(1).normal(size=(2, T, 48)).astype(np.float32)
    weight = weight * mask[..., None]

    def loss(p):
        logits = model.logits(p, model.apply(p, tokens, positions, mask))
        return jnp.sum(jnp.sin(logits) * weight) / 10

    got = by_name(model, jax.jit(jax.grad(loss))(params))
    theirs.zero_grad()
    for row, length in enumerate(LENGTHS):
        logits = run_torch(theirs, tokens[row : row + 1, :length]).logits[0]
        (torch.sum(torch.sin(logits) * torch.tensor(weight[row, :length])) / 10).backward()
    want = gradients_by_name(theirs)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        # Without rotation, a key's bias shifts all scores alike: its gradient is 0.
        assert np.abs(gradient).max() > 0.01 or name.endswith(("k_proj.bias", "c_attn.bias")), name
        scale = max(np.abs(gradient).max(), 0.01)
        np.testing.assert_allclose(got[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


def test_router_loss_of_one_document(pair):
    """For one document alone it is transformers' loss of the batch."""
    _, theirs, model, params, _ = pair
    if not model.config.num_experts:
        assert model.extra_terms == ()
        return
    ids = torch.tensor(TOKENS[1:], dtype=torch.long)
    with torch.no_grad():
        want = theirs(input_ids=ids, output_router_logits=True).aux_loss.numpy()
    _, extra = jax.jit(model.apply_with_losses)(params, TOKENS[1:])
    np.testing.assert_allclose(extra["router"].mean(), 0.001 * want, 1e-5)


def by_name(model, tree):
    """Our tree as the tensors of a checkpoint."""
    flat = tables.flatten(tree)
    made = {}
    for tensor in tables.tensors(tables.leaves(model.config, model.shapes)):
        made[tensor.name] = np.zeros(tensor.shape, np.float32)
        for piece in tensor.pieces:
            item = np.asarray(flat[piece.leaf.path])[piece.position]
            item = np.swapaxes(item, -1, -2) if piece.leaf.transpose else item
            made[tensor.name][piece.leaf.index()] = item
    return made


def gradients_by_name(theirs):
    """Their gradients under the names that their checkpoints have: saved in place of weights."""
    kept = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for p in theirs.parameters():
            p.copy_(p.grad)
        theirs.save_pretrained(folder)
        for name, p in theirs.named_parameters():
            p.copy_(kept[name])
        return tensors(pathlib.Path(folder))


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same_bytes(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.tobytes() == right[name].tobytes(), name


def reload(auto, folder):
    model, info = auto.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def test_files_there_and_back(pair, tmp_path):
    folder, theirs, model, params, _ = pair
    want = torch_logits(theirs, TOKENS[1:])
    save_pretrained(model, params, tmp_path / "out")
    assert_same_bytes(tensors(folder), tensors(tmp_path / "out"))
    again = reload(transformers.AutoModelForCausalLM, tmp_path / "out")
    close(torch_logits(again, TOKENS[1:]), want, 1e-5)
    # Nothing hides in the source's own config: our fields alone say everything.
    bare = dataclasses.replace(model.config, source_config="")
    save_pretrained(dataclasses.replace(model, config=bare), params, tmp_path / "bare")
    again = reload(transformers.AutoModelForCausalLM, tmp_path / "bare")
    close(torch_logits(again, TOKENS[1:]), want, 1e-5)


def test_scorers_there_and_back(pair, tmp_path):
    folder, _, _, lm_params, run = pair
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_labels = 1
    auto = transformers.AutoModelForSequenceClassification
    judge = randomised(auto.from_config(config, attn_implementation="eager"))
    judge.save_pretrained(tmp_path / "source")
    scorer, params = load_pretrained(tmp_path / "source")
    tokens, positions, mask = rows()
    # The language model's compiled pass serves: a head that is there is not used.
    spare = {} if "head" not in lm_params else {"head": lm_params["head"]}
    scores = scorer.scores(params, run(params | spare, tokens, positions, mask)[0])
    got = scores[np.arange(2), np.array(LENGTHS) - 1]
    want = [torch_logits(judge, tokens[i : i + 1, :n])[0, 0] for i, n in enumerate(LENGTHS)]
    assert np.abs(want).min() > 1e-3
    close(got, want)

    save_pretrained(scorer, params, tmp_path / "out")
    assert_same_bytes(tensors(tmp_path / "source"), tensors(tmp_path / "out"))
    again = reload(auto, tmp_path / "out")
    assert again.config.num_labels == 1
    close(torch_logits(again, tokens[1:])[:, 0], want[1:], 1e-5)
