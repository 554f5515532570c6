"""Every form of attention and its backward pass, against a plain softmax derived by JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxalign.models.attention import dispatch as attention_kind_module
from jaxalign.models.attention import kernels, xla, xla_blocks
from jaxalign.models.attention.dispatch import attention_kind
from jaxalign.models.attention.mask import MaskSpec, Segments
from jaxalign.models.attention.xla import attend
from jaxalign.models.backend import backend
from jaxalign.models.decoder import Decoder
from jaxalign.parallel.mesh import make_mesh


def plain(query, key, value, mask, scale, softcap):
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    scores = scale * jnp.einsum("bthd,bshd->bhts", query, key)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, value)


def rows_of_documents(rng, rows, length, documents=3):
    """Segments and positions `[rows, length]`: packed documents, padding at the end."""
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, length), documents, replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False), start=1):
            segments[row, start:stop] = number
            positions[row, start:stop] = np.arange(stop - start)
    return segments, positions


def mask_of(segments, positions, window=None, branches=None):
    """The attention mask `[B, 1, T, T]`, one query at a time."""
    rows, length = segments.shape
    mask = np.zeros((rows, 1, length, length), bool)
    for b, t in np.ndindex(rows, length):
        sees = (np.arange(length) <= t) & (segments[b] == segments[b, t])
        if window is not None:
            sees &= positions[b, t] - positions[b] < window
        if branches is not None:
            sees &= (branches[b] == 0) | (branches[b] == branches[b, t])
        mask[b, 0, t] = sees
    return mask


def inputs_of(rng, rows, length, heads=4, shared=2, width=8):
    shapes = ((rows, length, heads, width), *((rows, length, shared, width),) * 2)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def agree(form, mask, inputs, segments, softcap=None, scale=0.4):
    """Values and gradients of a form and of the plain softmax, where tokens count."""
    rng = np.random.default_rng(5)
    weights = rng.normal(size=inputs[0].shape) * (segments > 0)[:, :, None, None]
    weights = jnp.asarray(weights, jnp.float32)

    def total(run, *args):
        return jnp.sum(weights * run(*args))

    ours = functools.partial(total, lambda q, k, v, c: form(q, k, v, c))
    theirs = functools.partial(total, lambda q, k, v, c: plain(q, k, v, mask, c, softcap))
    got = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3)))(*inputs, scale)
    want = jax.jit(jax.value_and_grad(theirs, (0, 1, 2, 3)))(*inputs, scale)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        most = float(jnp.abs(b).max())
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), atol=1e-5 * max(most, 10))


def spec_of(ids, positions, window=None, branches=None, windowed=None):
    segments = Segments(jnp.asarray(ids), jnp.asarray(positions), branches)
    return MaskSpec(segments, segments, window=window, windowed=windowed)


@pytest.mark.parametrize(
    ("length", "softcap", "window", "in_loops"),
    [(9, None, None, 0), (9, 2.0, 4, 0), (300, 2.0, 50, 0), (700, None, 300, 1)],
)
@pytest.mark.parametrize("matrix", [False, True])
def test_plain_form(length, softcap, window, in_loops, matrix, monkeypatch):
    """Short rows in one piece, long ones in blocks that skip what lies ahead, or in loops too."""
    if in_loops:
        small = dataclasses.replace(backend(), attention_scores=1, attention_query_blocks=2)
        monkeypatch.setattr(xla_blocks, "backend", lambda: small)
        options = xla_blocks.XLAOptions(None, True, 1)
        query, key = np.zeros((1, 2, 2, length, 8)), np.zeros((1, 2, length, 8))
        schedule = [tuple(blocks) for blocks in xla_blocks.block_schedule(options, query, key)]
        assert schedule == [(0, 3, 128, 384), (384, 2, 128, 700), (640, 1, 60, 700)]
    rng = np.random.default_rng(0)
    segments, positions = rows_of_documents(rng, 1, length)
    spec = spec_of(segments, positions, window)
    spec = spec.with_matrix() if matrix else spec

    def form(q, k, v, c):
        return attend(q, k, v, spec, c, softcap)

    mask = mask_of(segments, positions, window)
    agree(form, mask, inputs_of(rng, 1, length), segments, softcap)


def test_a_matrix_of_ones_own():
    rng = np.random.default_rng(0)
    mask = rng.random((2, 1, 9, 9)) < 0.5
    mask |= np.eye(9, dtype=bool)

    def form(q, k, v, c):
        return attend(q, k, v, mask, c)

    agree(form, mask, inputs_of(rng, 2, 9), np.ones((2, 9)))


def test_rows_that_see_nothing_stay_finite():
    x = jnp.ones((1, 3, 2, 4))
    mask = jnp.zeros((1, 1, 3, 3), bool)
    value, grads = jax.value_and_grad(lambda x: jnp.sum(attend(x, x, x, mask)))(x)
    assert np.isfinite(value)
    assert np.isfinite(grads).all()


def test_nothing_grows_with_the_square_of_the_length():
    """Not in the layers of a model either, where JAX moves what needs no gradient out of loops."""
    length = 2**15
    ids = jnp.ones((1, length), jnp.int32)

    def loss(params):
        return jnp.sum(tiny.DECODER.apply(params, ids))

    shapes = set(_shapes(jax.make_jaxpr(jax.grad(loss))(tiny.DECODER.shapes).jaxpr))
    assert (1, 2, 2, length, 8) in shapes  # queries
    assert max(np.prod(shape) for shape in shapes) <= backend().attention_scores


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


@pytest.mark.parametrize(
    ("kind", "sizes", "options"),
    [
        ("xla", {"fsdp": 2, "sequence": 4}, {"window": 5, "softcap": 3.0, "branches": True}),
        ("splash", {}, {"window": 5, "windowed": True, "softcap": 3.0}),
        ("splash", {"fsdp": 2, "sequence": 2, "tensor": 2}, {}),
        (
            "pallas",
            {"fsdp": 2, "sequence": 2, "tensor": 2},
            {"window": 5, "windowed": True, "softcap": 3.0, "branches": True},
        ),
    ],
    ids=["xla-sequence", "splash", "splash-mesh", "pallas-mesh"],
)
def test_rows_split_in_time_and_kernels(kind, sizes, options):
    """A length that no shard and no block divides; documents across the borders of shards."""
    rng = np.random.default_rng(1)
    rows, length = 2, 30
    segments, positions = rows_of_documents(rng, rows, length)
    branches = None
    if options.get("branches"):
        branches = (np.arange(length)[None] // 3 % 3 + np.zeros((rows, 1))).astype(np.int32)
    window, softcap = options.get("window"), options.get("softcap")

    def form(q, k, v, c):
        windowed = jnp.asarray(options["windowed"]) if "windowed" in options else None
        spec = spec_of(segments, positions, window, branches, windowed)
        return attend(q, k, v, spec, c, softcap, kind=kind)

    mask = mask_of(segments, positions, window, branches)
    mesh = make_mesh(**sizes) if sizes else make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        agree(form, mask, inputs_of(rng, rows, length), segments, softcap)


H100 = ("gpu", "NVIDIA H100 80GB HBM3")
TPU = ("tpu", "TPU v5 lite")


@pytest.mark.parametrize(
    ("asked", "device", "options", "kind", "why"),
    [
        ("auto", ("cpu", "cpu"), {}, "xla", "cpu has no kernel"),
        ("auto", TPU, {}, "splash", "the kernel for tpu"),
        ("auto", TPU, {"branches": True}, "xla", "not splash: it knows no branches"),
        ("auto", TPU, {"length": 64}, "xla", "not splash: its least block"),
        ("auto", TPU, {"dtype": "float16"}, "xla", "not splash: TPUs have no float16"),
        ("xla", TPU, {}, "xla", "asked for"),
        ("splash", ("cpu", "cpu"), {}, "splash", "asked for"),
        ("auto", H100, {"softcap": 50.0}, "pallas", "not cudnn: it has no soft cap; the kernel"),
        ("auto", H100, {"dtype": "float32"}, "xla", "not cudnn: it computes in bfloat16"),
        ("auto", H100, {"dtype": "float32"}, "xla", "not pallas: it computes in bfloat16"),
        ("auto", H100, {"head_dim": 60}, "pallas", "not cudnn: it wants heads of a multiple of 8"),
        ("auto", H100, {"head_dim": 512}, "xla", "not pallas: its heads are at most 256 wide"),
        ("auto", ("gpu", "AMD Instinct MI300X"), {}, "xla", "not cudnn: it needs an NVIDIA GPU"),
        ("cudnn", TPU, {}, "xla", "not cudnn: it needs an NVIDIA GPU"),
        ("cudnn", H100, {"softcap": 50.0}, "xla", "not cudnn: it has no soft cap"),
        ("pallas", H100, {"softcap": 50.0, "branches": True}, "pallas", "asked for"),
        ("pallas", ("cpu", "cpu"), {"dtype": "float32"}, "pallas", "asked for"),
        ("pallas", ("gpu", "AMD Instinct MI300X"), {}, "xla", "not pallas: it needs an NVIDIA"),
        ("pallas", TPU, {}, "xla", "not pallas: it is for GPUs"),
    ],
)
def test_which_form_runs_and_why(asked, device, options, kind, why):
    options = {"dtype": "bfloat16", "head_dim": 64, "length": 2048} | options
    with jax.set_mesh(make_mesh()):
        choice = attention_kind(asked, device=device, **options)
    assert choice.kind == kind
    assert why in choice.why
    assert str(choice) == f"{kind} ({choice.why})"


def test_cudnn_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(attention_kind_module, "_has_cudnn", lambda: True)
    options = {"dtype": "bfloat16", "head_dim": 64, "length": 2048, "device": H100}
    assert attention_kind("auto", **options).kind == "cudnn"
    assert attention_kind("cudnn", branches=True, **options).kind == "cudnn"
    monkeypatch.setattr(attention_kind_module, "_has_cudnn", lambda: False)
    assert "missing" in attention_kind("auto", **options).why


@pytest.mark.parametrize("device", [TPU, H100])
def test_pallas_kernels_need_a_mesh_where_there_are_several_devices(device):
    choice = attention_kind("auto", dtype="bfloat16", head_dim=60, length=2048, device=device)
    assert choice.kind == "xla"
    assert "no mesh in context" in choice.why


def test_gpus_before_ampere_have_no_kernel(monkeypatch):
    monkeypatch.setattr(attention_kind_module, "_capability", lambda: 7.5)
    with jax.set_mesh(make_mesh()):
        choice = attention_kind("auto", dtype="float16", head_dim=64, length=2048, device=H100)
    assert choice.kind == "xla"
    assert "not pallas: it needs a GPU from Ampere on" in choice.why


def test_a_jax_without_triton_takes_the_plain_form(monkeypatch):
    for module in (attention_kind_module, xla):
        monkeypatch.setattr(module, "has_triton", lambda: False)
    with jax.set_mesh(make_mesh()):
        choice = attention_kind("pallas", dtype="float16", head_dim=64, length=2048, device=H100)
        assert xla._form("cudnn", False).keywords["packed"] is xla.blockwise
    assert str(choice) == "xla (not pallas: this version of JAX has no Triton kernels)"
    assert not attention_kind_module.takes_zigzag("cudnn")


def test_a_kernel_that_gives_way_says_so_once(capsys):
    attention_kind_module.report_fallback.cache_clear()
    model = Decoder(tiny.CONFIG, attention="cudnn")
    for _ in range(2):
        jax.eval_shape(model.apply, model.shapes, np.ones((1, 8), np.int32))
    wanted = "attention: plain XLA runs; not cudnn: it needs an NVIDIA GPU\n"
    assert capsys.readouterr().err == wanted
    jax.eval_shape(Decoder(tiny.CONFIG).apply, model.shapes, np.ones((1, 8), np.int32))
    assert capsys.readouterr().err == ""


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="attention='flash': wanted one of auto, xla, splash"):
        Decoder(tiny.CONFIG, attention="flash")


def test_one_document_a_row_is_told_from_packed_rows():
    told = jax.jit(kernels._one_document)
    for rows, want in (
        ([[1, 1, 1], [1, 1, 0]], True),
        ([[3, 3, 0], [0, 0, 0]], True),
        ([[1, 1, 2], [1, 1, 1]], False),
        ([[0, 1, 1], [1, 1, 1]], False),
        ([[1, 0, 1], [1, 1, 1]], False),
    ):
        assert bool(told(jnp.asarray(rows))) is want, rows


@pytest.mark.parametrize("case", ["one document", "packed", "branches", "sequence"])
def test_what_cudnn_is_asked_for(case, monkeypatch):
    """The same call by XLA: JAX promises the same meaning for either implementation."""
    ask = jax.nn.dot_product_attention

    def by_xla(*args, implementation, **options):
        assert implementation == "cudnn"
        assert set(options) == {"scale", "is_causal", "local_window_size"}
        assert not args[0].shape[1] % 2  # its backward pass wants even lengths
        return ask(*args, implementation="xla", **options)

    monkeypatch.setattr(kernels.jax.nn, "dot_product_attention", by_xla)
    # Other rows go to the Pallas kernel, which has tests of its own; in the interpreter it is slow.
    monkeypatch.setattr(xla, "has_triton", lambda: False)
    rng = np.random.default_rng(3)
    rows, length, window = 2, 13, 4
    segments, positions = rows_of_documents(rng, rows, length)
    branches = None
    if case == "one document":
        segments = (np.arange(length)[None] < np.array([[13], [9]])).astype(np.int32)
        positions = np.arange(length)[None] * segments
    if case == "branches":
        branches = (np.arange(length)[None] // 3 % 3 + np.zeros((rows, 1))).astype(np.int32)
    mesh = make_mesh(fsdp=2, sequence=4) if case == "sequence" else make_mesh(fsdp=2, tensor=4)
    for windowed in (False, True):
        mask = mask_of(segments, positions, window if windowed else None, branches)

        def form(q, k, v, c, windowed=windowed):
            spec = spec_of(segments, positions, window, branches, jnp.asarray(windowed))
            return attend(q, k, v, spec, c, kind="cudnn")

        with jax.set_mesh(mesh):
            agree(form, mask, inputs_of(rng, rows, length), segments)
