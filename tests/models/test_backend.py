"""Settings by platform: what the head reads and holds, alike in results, and in one file."""

import ast
import pathlib
import types

import jax
import numpy as np
import plain_llama
import pytest
import tiny

import jaxalign
from jaxalign.models import decoder, lm_head, ops, rope
from jaxalign.models.backend import Backend, backend
from jaxalign.models.lm_head import head_chunks, target_sum
from jaxalign.parallel.mesh import make_mesh
from jaxalign.sampling import engine

PACKAGE = pathlib.Path(jaxalign.__file__).parent

LLAMA3, GEMMA, SMALL = 128_256, 262_144, 49_152


def device(platform, kind):
    return types.SimpleNamespace(platform=platform, device_kind=kind)


H100 = device("gpu", "NVIDIA H100 80GB HBM3")
V5P = device("tpu", "TPU v5p")
V5E = device("tpu", "TPU v5 lite")
UNKNOWN = device("gpu", "AMD Instinct MI300X")


def test_the_device_that_is_present():
    assert backend() is backend(jax.devices()[0])
    assert (backend().platform, backend().default_dtype) == ("cpu", "float32")
    assert backend(H100).default_dtype == backend(V5E).default_dtype == "bfloat16"
    assert backend(H100).pallas_interpret
    assert not backend(V5E).pallas_interpret
    assert backend(H100).unrolled_layers == backend(V5E).unrolled_layers == 0


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("lines", [1, 2, 4, 10, 16, 64])
@pytest.mark.parametrize("chip", [H100, V5P], ids=["h100", "v5p"])
def test_the_head_is_read_every_4096_positions_at_128k(chip, lines, masked, monkeypatch):
    monkeypatch.setattr(lm_head, "backend", lambda: backend(chip))
    positions = 2**16 // lines
    chunk, count = head_chunks(lines, positions, LLAMA3, 1, masked=masked)
    assert 4096 * 15 / 16 <= chunk * lines <= 4096  # 8 · lines positions are the least step
    assert (count - 1) * chunk < positions <= count * chunk
    # Over 8 devices, each with so many lines, the same.
    assert head_chunks(8 * lines, positions, LLAMA3, 8, masked=masked) == (chunk, count)


@pytest.mark.parametrize("vocabulary", [SMALL, LLAMA3, GEMMA])
@pytest.mark.parametrize(
    ("chip", "memory"), [(H100, 80e9), (V5P, 103e9), (V5E, 17e9), (UNKNOWN, 2**34)]
)
def test_logits_stay_in_their_budget(chip, memory, vocabulary, monkeypatch):
    """A 32nd of the memory, of 16 GiB where it is not known."""
    monkeypatch.setattr(lm_head, "backend", lambda: backend(chip))
    for lines in (1, 8):
        chunk, _ = head_chunks(lines, 2**14, vocabulary, 1)
        assert 4 * chunk * lines * vocabulary <= memory / 32
        # Neither limit is far away.
        assert chunk * lines > 0.85 * min(4096, memory / 32 / 4 / vocabulary)


def test_columns_over_devices_leave_room_for_more_positions(monkeypatch):
    monkeypatch.setattr(lm_head, "backend", lambda: backend(V5E))
    whole, _ = head_chunks(1, 2**14, LLAMA3, 1)
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        half, _ = head_chunks(4, 2**14, LLAMA3, 4)
        uneven, _ = head_chunks(4, 2**14, LLAMA3 + 1, 4)
    assert (whole, half, uneven) == (1024, 2056, 1024)


def test_chunks_on_a_cpu():
    """Figures of docs/performance.md: 512 positions, 256 where few count, 32 M logits."""
    assert head_chunks(1, 2048, SMALL, 1, masked=False) == (512, 4)
    assert head_chunks(1, 2048, SMALL, 1) == (256, 8)
    assert head_chunks(1, 1024, SMALL, 1, 508) == (508, 3)
    assert head_chunks(1, 2048, LLAMA3, 1, masked=False) == (256, 8)
    assert head_chunks(8, 2048, LLAMA3, 4, masked=False)[0] == 2**25 // (2 * LLAMA3) - 2


@pytest.fixture
def as_accelerator(monkeypatch):
    settings = Backend(platform="gpu", head_positions=16)
    for module in (decoder, lm_head, ops, rope, engine):
        monkeypatch.setattr(module, "backend", lambda: settings)


@pytest.mark.usefixtures("as_accelerator")
def test_settings_of_accelerators_give_the_same_numbers():
    """Logits against numpy, and a gradient against finite differences of numpy's log-probs."""
    model, params = tiny.DECODER, tiny.random_params(tiny.DECODER)
    ids = np.random.default_rng(1).integers(0, tiny.VOCAB, (1, 40))
    targets, mask = np.roll(ids, -1, 1), np.ones((1, 40), bool)

    def loss(params):
        hidden = model.apply(params, ids)
        return target_sum(model, params, hidden, targets, mask).total

    def numpy_loss(params):
        logits = plain_llama.logits(tiny.CONFIG, params, ids[0]).astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return logits[np.arange(40), targets[0]].sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, numpy_loss(params), 1e-5)
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    slope = sum(
        float(np.sum(np.asarray(g, np.float64) * d))
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    ends = [
        numpy_loss(jax.tree.map(lambda x, d, e=e: np.asarray(x) + e * d, params, direction))
        for e in (1e-3, -1e-3)
    ]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-3, 2e-2)


WORDS = ("cpu", "gpu", "tpu", "current_device", "platform_dependent", "default_backend")

ALLOWED = ("models/backend.py", "models/attention/dispatch.py", "parallel/", "plan/")


def words_of(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias | ast.keyword):
            yield node.lineno, node.name if isinstance(node, ast.alias) else node.arg


def test_platforms_are_named_in_few_files():
    named = {
        f"{path.relative_to(PACKAGE)}:{line}: {word}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, word in words_of(path)
        if word in WORDS and not path.relative_to(PACKAGE).as_posix().startswith(ALLOWED)
    }
    assert not named


def test_the_search_for_platforms_finds_them():
    words = {word for _, word in words_of(PACKAGE / "models/backend.py")}
    assert {"cpu", "current_device"} <= words
