"""An independent Llama in plain numpy, float64: loops over rows, heads and positions."""

import math

import numpy as np


def forward(config, params, ids):
    """Hidden states `[T, D]` after the final norm, of one document."""
    weights = _Weights(params)
    x = weights["embed/embedding"][ids]
    rotation = _angles(config, len(ids))
    for layer in range(config.num_layers):
        block = _Weights(params["blocks"], layer)
        x = x + _attention(config, block, _norm(config, x, block["attention_norm/scale"]), rotation)
        y = _norm(config, x, block["mlp_norm/scale"])
        gate = block.linear("mlp/gate", y)
        inner = gate / (1 + np.exp(-gate)) * block.linear("mlp/up", y)
        x = x + block.linear("mlp/down", inner)
    return _norm(config, x, weights["norm/scale"])


def logits(config, params, ids):
    """Logits `[T, V]` of one document."""
    weights = _Weights(params)
    head = weights["embed/embedding"].T if config.tie_embeddings else weights["head/kernel"]
    return forward(config, params, ids) @ head


class _Weights:
    def __init__(self, tree, layer=None):
        self.tree, self.layer = tree, layer

    def get(self, path):
        node = self.tree
        for name in path.split("/"):
            node = node.get(name) if node is not None else None
        if node is None:
            return None
        node = np.asarray(node, np.float64)
        return node if self.layer is None else node[self.layer]

    def __getitem__(self, path):
        return self.get(path)

    def linear(self, path, x):
        y = x @ self[f"{path}/kernel"]
        bias = self.get(f"{path}/bias")
        return y if bias is None else y + bias


def _norm(config, x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale


def _angles(config, length):
    rope, size = config.rope, config.head_dim
    angles = np.zeros((length, size // 2))
    for i in range(size // 2):
        frequency = rope.theta ** (-2 * i / size)
        if rope.kind == "linear":
            frequency /= rope.factor
        elif rope.kind == "llama3":
            # Meta's own form: by wavelength, in three ranges.
            wavelength = 2 * math.pi / frequency
            longest = rope.original_max_positions / rope.low_freq_factor
            shortest = rope.original_max_positions / rope.high_freq_factor
            if wavelength > longest:
                frequency /= rope.factor
            elif wavelength >= shortest:
                smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
                    rope.high_freq_factor - rope.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency
        angles[:, i] = np.arange(length) * frequency
    return angles


def _turn(x, angles):
    """Rotates pairs (i, i + half) of `[T, size]` as complex numbers."""
    half = x.shape[1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=1)


def _attention(config, block, x, angles):
    size, length = config.head_dim, len(x)
    q, k, v = (block.linear(f"attention/{name}", x) for name in ("query", "key", "value"))
    out = np.zeros((length, config.num_heads * size))
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        here, there = (
            slice(head * size, (head + 1) * size),
            slice(shared * size, (shared + 1) * size),
        )
        query, key = _turn(q[:, here], angles), _turn(k[:, there], angles)
        for t in range(length):
            scores = key[: t + 1] @ query[t] / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[t, here] = weights / weights.sum() @ v[: t + 1, there]
    return block.linear("attention/out", out)
