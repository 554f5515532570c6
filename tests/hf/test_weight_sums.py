"""Checksums in the header of exported weights: damage is found, other tools' files are loaded."""

import shutil

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxalign.hf import load_pretrained, safetensors_write, save_pretrained, weight_sums

PARAMS = tiny.random_params(tiny.DECODER)


@pytest.fixture(scope="module", params=[5_000_000_000, 20_000], ids=["one file", "several"])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(tiny.DECODER, PARAMS, folder, max_shard_bytes=request.param)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


def weights(folder):
    return sorted(folder.glob("*.safetensors"))


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def loaded(folder):
    """(error, None) or ("", parameters)."""
    try:
        return "", load_pretrained(folder)[1]
    except ValueError as error:
        return str(error), None


def test_an_untouched_model_is_loaded_without_a_word(folder, capfd):
    _, params = load_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert capfd.readouterr().out == ""


def test_flipped_bits_anywhere_in_the_weights_are_found_or_change_nothing(folder):
    rng = np.random.default_rng(0)
    for path in weights(folder):
        whole = path.read_bytes()
        header = 8 * (8 + int.from_bytes(whole[:8], "little"))
        bits = [*rng.integers(0, header, 20), *rng.integers(header, 8 * len(whole), 4)]
        for bit in map(int, bits):
            flip(path, bit)
            message, params = loaded(folder)
            if params is None:
                assert path.name in message or "do not fit config.json" in message
            else:
                assert bit < header
                jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
            path.write_bytes(whole)


def test_damage_names_the_file(folder):
    path = weights(folder)[-1]
    flip(path, 8 * path.stat().st_size - 3)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: .*get the file again"):
        load_pretrained(folder)


def test_weights_that_another_tool_wrote_over_are_loaded_unchecked(folder):
    for path in weights(folder):
        save_file({k: 2 * v for k, v in load_file(path).items()}, path, {"format": "pt"})
    _, params = load_pretrained(folder)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), params, PARAMS)


def test_the_piece_of_the_writer_is_the_readers(folder, tmp_path, monkeypatch):
    """A file written in small pieces is checked by those, whatever a later version takes."""
    monkeypatch.setattr(safetensors_write, "PIECE", 512)
    save_pretrained(tiny.DECODER, PARAMS, tmp_path / "small")
    monkeypatch.undo()
    _, params = load_pretrained(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


def test_checksums_of_another_version_are_not_understood_and_damaged_ones_are_damage():
    assert weight_sums.expected(None) is None
    assert weight_sums.expected('{"algorithm": "md5"}') is None
    with pytest.raises(ValueError, match="damaged"):
        weight_sums.expected("{")
