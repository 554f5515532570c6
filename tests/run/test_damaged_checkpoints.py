"""Damaged checkpoints: found, named, passed over for the newest sound one, and kept aside."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.algorithms.state import init_state
from jaxalign.hf import checksums
from jaxalign.run.checkpoint import Checkpoints


def state(value):
    return init_state({"w": jnp.full((4, 300), float(value))}, optax.adam(1e-3))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints 1, 2 and 3, with their step as weights."""
    folder = tmp_path_factory.mktemp("run")
    store = Checkpoints(folder, keep=None)
    for step in (1, 2, 3):
        store.save(step, state(step), {"done": step})
    store.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def restore(folder, step=None):
    """(weights' value, position, what was there before the store was closed)."""
    store = Checkpoints(folder, keep=None)
    try:
        got, loop = store.restore(state(0), step)
    finally:
        store.close()
    values = np.unique(np.asarray(got.params["w"]))
    assert values.size == 1
    assert values[0] == loop["done"]
    return loop["done"]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder):
    """The file with the arrays' bytes."""
    files = (path for path in (folder / "state").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def test_all_files_but_orbaxs_marks_are_summed(folder):
    listed = set(json.loads((folder / "3" / "checksums.json").read_text())["files"])
    there = {
        p.relative_to(folder / "3").as_posix() for p in (folder / "3").rglob("*") if p.is_file()
    }
    left_out = {name.rpartition("/")[2] for name in there - listed}
    assert left_out == {"_CHECKPOINT_METADATA", "commit_success.txt", "checksums.json"}
    assert restore(folder) == 3


def test_flipped_bits_in_every_file_are_found(folder):
    rng = np.random.default_rng(0)
    silent = []
    for path in files(folder / "3"):
        whole = path.read_bytes()
        for bit in rng.integers(0, 8 * len(whole), 4) if whole else ():
            data = bytearray(whole)
            data[bit // 8] ^= 1 << int(bit) % 8
            path.write_bytes(data)
            if not checksums.check(folder / "3"):
                silent.append(path.name)
        path.write_bytes(whole)
    assert set(silent) <= {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert restore(folder) == 3  # all as it was


def cut(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "cut": (cut, r"is cut: "),
    "flip": (flip, r"has other bytes than were written"),
    "state gone": (lambda folder: shutil.rmtree(folder / "state"), "state missing"),
    "loop gone": (lambda folder: shutil.rmtree(folder / "loop"), "loop missing"),
    "metadata gone": (lambda folder: (folder / "state" / "_METADATA").unlink(), "is missing"),
    "empty folder": (empty, "state and loop missing"),
    "loop cut": (
        lambda folder: (folder / "loop" / "metadata").write_text("{"),
        r"loop/metadata is cut",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_newest_sound_one_is_taken_and_the_damaged_one_kept_aside(folder, name, capfd):
    damage, message = DAMAGES[name]
    damage(folder / "3")
    assert restore(folder) == 2
    said = capfd.readouterr().out
    assert f"{folder}/3 is passed over: " in said
    assert message in said
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3.damaged"]
    # The run comes to step 3 again, and saves it.
    store = Checkpoints(folder, keep=None)
    store.save(3, state(3), {"done": 3})
    store.close()
    assert restore(folder) == 3


def test_one_that_was_damaged_and_saved_again_is_read_again(folder):
    flip(folder / "3")
    store = Checkpoints(folder, keep=None)
    assert store.restore(state(0))[1] == {"done": 2}
    store.save(3, state(3), {"done": 3})
    store._manager.wait_until_finished()
    assert store.restore(state(0))[1] == {"done": 3}
    store.close()


def test_a_damaged_one_that_is_asked_for_is_an_error(folder):
    flip(folder / "2")
    with pytest.raises(ValueError, match=r"/2 is damaged: .*other bytes.*checkpoint 3 is sound"):
        restore(folder, step=2)
    assert restore(folder) == 3
    assert (folder / "2").is_dir()


def test_nothing_sound_is_an_error_that_names_each(folder, capfd):
    for step in "123":
        flip(folder / step)
    with pytest.raises(ValueError, match=r"none of the 3 checkpoints in .* is sound"):
        restore(folder)
    assert capfd.readouterr().out.count("is passed over") == 3
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_an_older_one_without_checksums_is_taken_and_its_errors_are_short(folder, capfd):
    (folder / "3" / "checksums.json").unlink()
    assert restore(folder) == 3
    assert "has no checksums.json: taken unchecked" in capfd.readouterr().out
    cut(folder / "3")
    with pytest.raises(ValueError, match=r"/3 cannot be read: ") as error:
        restore(folder)
    assert len(str(error.value)) < 1000
