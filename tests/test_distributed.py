"""Joining other processes: what the environment says, and nothing when it says nothing."""

import jax
import pytest
from jax.experimental import multihost_utils

from jaxalign import distributed

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "TPU_WORKER_HOSTNAMES",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
)
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "0",
}


@pytest.fixture
def starts(monkeypatch):
    """Calls of `jax.distributed.initialize`, which is not really called; an empty environment."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    return calls


def set_environment(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_alone_nothing_happens(starts):
    distributed.start()
    assert starts == []


def test_explicit_settings_are_passed_on(starts, monkeypatch):
    # They come before what a cluster says.
    set_environment(
        monkeypatch, EXPLICIT | {"SLURM_STEP_NUM_TASKS": "2", "TPU_WORKER_HOSTNAMES": "a,b"}
    )
    distributed.start()
    assert starts == [{"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 0}]


@pytest.mark.parametrize("absent", ["JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"])
def test_half_of_the_settings_is_an_error(starts, monkeypatch, absent):
    set_environment(monkeypatch, EXPLICIT)
    monkeypatch.delenv(absent)
    with pytest.raises(ValueError, match=f"{absent} is not"):
        distributed.start()
    assert starts == []


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_a_setting_that_is_no_number_is_named(starts, monkeypatch, name):
    set_environment(monkeypatch, EXPLICIT | {name: "two"})
    with pytest.raises(ValueError, match=f"{name}='two': wanted a whole number"):
        distributed.start()
    assert starts == []


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_clusters_are_recognised(starts, monkeypatch, environment, joins):
    set_environment(monkeypatch, environment)
    distributed.start()
    assert starts == ([{}] if joins else [])


def test_a_second_start_does_nothing(starts, monkeypatch):
    set_environment(monkeypatch, EXPLICIT)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.start()
    assert starts == []


def test_only_the_first_process_writes(monkeypatch):
    assert distributed.is_main()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert not distributed.is_main()


def test_a_barrier_waits_only_where_there_are_others(monkeypatch):
    waited = []
    monkeypatch.setattr(multihost_utils, "sync_global_devices", waited.append)
    distributed.barrier("alone")
    assert waited == []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    distributed.barrier("together")
    assert waited == ["together"]
