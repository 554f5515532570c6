"""Sums of adapters, and adapters between two checkpoints, against numpy."""

import jax
import numpy as np
import pytest
import tiny

from jaxalign.models.base import LoraConfig
from jaxalign.models.lora_arithmetic import add_adapters, extract_adapter


def adapter(seed, rank, names):
    """A and B of two layers, as numpy."""
    rng = np.random.default_rng(seed)
    shapes = {"query": (32, 32), "key": (32, 16), "up": (32, 48)}
    tree = {}
    for name in names:
        part = tree.setdefault("mlp" if name == "up" else "attention", {})
        rows, columns = shapes[name]
        part[name] = {
            "lora_a": rng.standard_normal((2, rows, rank)).astype(np.float32),
            "lora_b": rng.standard_normal((2, rank, columns)).astype(np.float32),
        }
    return {"blocks": tree}


def change(tree, part, name, scale):
    leaf = tree["blocks"].get(part, {}).get(name)
    if leaf is None:
        return 0.0
    a, b = (np.asarray(leaf[f"lora_{side}"], np.float64) for side in "ab")
    return scale * np.stack([a[layer] @ b[layer] for layer in range(2)])


def test_a_sum_of_adapters_is_the_sum_of_their_changes():
    one, other = adapter(0, 3, ("query", "up")), adapter(1, 2, ("query", "key"))
    configs = (
        LoraConfig(rank=3, alpha=6.0, targets=("query", "up")),
        LoraConfig(rank=2, alpha=1.0, targets=("query", "key")),
    )
    merged, config = add_adapters([(one, configs[0]), (other, configs[1])], [0.7, -1.5])
    assert (config.rank, config.alpha) == (5, 5.0)
    assert config.targets == ("query", "up", "key")
    for part, name in (("attention", "query"), ("attention", "key"), ("mlp", "up")):
        expected = 0.7 * change(one, part, name, 6 / 3) - 1.5 * change(other, part, name, 1 / 2)
        np.testing.assert_allclose(change(merged, part, name, 1.0), expected, atol=1e-5)
        assert merged["blocks"][part][name]["lora_a"].shape[-1] == 5


def test_what_cannot_be_summed_is_told():
    one, other = adapter(0, 2, ("query",)), adapter(1, 2, ("query",))
    config = LoraConfig(rank=2, targets=("query",))
    with pytest.raises(ValueError, match="got 2 adapters and 1 weights"):
        add_adapters([(one, config), (other, config)], [1.0])
    with pytest.raises(ValueError, match="wanted finite numbers"):
        add_adapters([(one, config)], [float("inf")])
    leaf = other["blocks"]["attention"]["query"]
    leaf["lora_a"] = leaf["lora_a"][:, :16]
    with pytest.raises(ValueError, match=r"blocks/attention/query: adapters of different models"):
        add_adapters([(one, config), (other, config)], [1.0, 1.0])


def test_a_change_of_low_rank_is_found_again():
    base = tiny.random_params(tiny.DECODER, seed=1)
    added = adapter(2, 2, ("query", "up"))
    tuned = jax.tree.map(lambda leaf: leaf, base)
    for part, name in (("attention", "query"), ("mlp", "up")):
        kernel = tuned["blocks"][part][name]["kernel"]
        tuned["blocks"][part][name]["kernel"] = kernel + np.float32(change(added, part, name, 0.1))
    found = extract_adapter(base, tuned, 2, ("query", "up"))
    assert found.config == LoraConfig(rank=2, alpha=2.0, targets=("query", "up"))
    for part, name in (("attention", "query"), ("mlp", "up")):
        got = change(found.params, part, name, 1.0)
        np.testing.assert_allclose(got, change(added, part, name, 0.1), atol=1e-5)
        assert found.lost[f"blocks/{part}/{name}/kernel"] < 1e-3
    assert found.other_changes == []


def test_what_an_adapter_leaves_out_is_counted():
    base = tiny.random_params(tiny.DECODER, seed=1)
    tuned = tiny.random_params(tiny.DECODER, seed=2)
    found = extract_adapter(base, tuned, 4, ("down",))
    old, new = (np.asarray(p["blocks"]["mlp"]["down"]["kernel"], np.float64) for p in (base, tuned))
    left, whole = 0.0, 0.0
    for layer in range(2):
        sizes = np.linalg.svd(new[layer] - old[layer], compute_uv=False)
        left, whole = left + np.sum(sizes[4:] ** 2), whole + np.sum(sizes**2)
    assert found.lost["blocks/mlp/down/kernel"] == pytest.approx(np.sqrt(left / whole), rel=1e-3)
    assert "embed/embedding" in found.other_changes
    assert "blocks/mlp/up/kernel" in found.other_changes
    assert "blocks/mlp/down/kernel" not in found.other_changes


def test_what_has_no_adapter_is_told():
    base = tiny.random_params(tiny.DECODER, seed=1)
    with pytest.raises(ValueError, match=r"rank=20: blocks/attention/key/kernel is 32×16"):
        extract_adapter(base, base, 20)
    other = {**base, "norm": {"scale": base["norm"]["scale"][:3]}}
    with pytest.raises(ValueError, match=r"different models: norm/scale is \(32,\) in one"):
        extract_adapter(base, other, 2)
    same = extract_adapter(base, base, 2)
    assert set(same.lost.values()) == {0.0}
