"""Compiled programs in a bucket: written by one process, read by the next."""

import sys

import bucketfs
import fsspec
import jax
import jax.numpy as jnp
import pytest
from etils.epath import backend
from jax.experimental.compilation_cache import compilation_cache

from jaxalign.commands import cli
from jaxalign.commands.startup import program_cache
from jaxalign.commands.startup.program_cache import FOLDER, cache_programs

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """`gs://` stands for objects in a folder."""

    class Google(bucketfs.BucketFileSystem):
        protocol = ("gs", "gcs")

    monkeypatch.setenv(bucketfs.FOLDER, str(tmp_path / "bucket"))
    registered = vars(sys.modules["fsspec.registry"])["_registry"]
    for name in ("gs", "gcs"):
        monkeypatch.setitem(registered, name, Google)
    # It keeps the file system that it opened first.
    monkeypatch.setattr(
        type(backend.fsspec_backend), "fs", lambda self, path: fsspec.filesystem("gs")
    )
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(program_cache, "_SHORTEST", 0.0)
    yield tmp_path / "bucket"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def hits():
    """How often JAX found a program."""
    found = []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    jax.monitoring.register_event_listener(listen)
    yield found
    jax.monitoring.unregister_event_listener(listen)


def test_programs_are_kept_in_a_bucket_and_found_there(bucket, monkeypatch, hits):
    monkeypatch.setenv(FOLDER, "gs://store/programs/")
    address = cache_programs()
    assert address.startswith("gs://store/programs/")
    compilation_cache.reset_cache()
    assert not list(bucket.iterdir())  # the probe is gone

    def compute():
        return jax.jit(lambda x: jnp.sin(x) * 3.0 + x)(jnp.arange(5.0))

    first = compute()
    assert any(path.name.endswith("-cache") for path in bucket.iterdir())
    assert not hits
    jax.clear_caches()  # as after a restart
    compilation_cache.reset_cache()
    assert (compute() == first).all()
    assert hits


def test_a_bucket_that_may_only_be_read_is_read(bucket, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError("storage.objects.create denied")

    monkeypatch.setenv(FOLDER, "gs://store/programs")
    monkeypatch.setattr(fsspec.get_filesystem_class("gs"), "pipe_file", refuse)
    assert cache_programs() is not None
    said = capsys.readouterr().out
    assert f"{FOLDER}='gs://store/programs': no right to use it" in said
    assert "roles/storage.objectUser" in said
    assert "new ones are not kept" in said


@pytest.mark.parametrize("address", ["memory://x/programs", "https://host/x", "gs://"])
def test_what_the_cache_cannot_read_is_refused(bucket, monkeypatch, capsys, address):
    monkeypatch.setenv(FOLDER, address)
    assert cli.main(["generate", "absent", "x"]) == 2
    assert f"{FOLDER}='{address}': wanted" in capsys.readouterr().err
