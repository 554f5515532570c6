"""The command returns the memory that compilations freed, once for each and on glibc only."""

import ctypes

import jax
import jax.numpy as jnp
import pytest

from jaxalign.commands.startup import freed_memory


@pytest.fixture
def trimmed(monkeypatch):
    """Arguments of malloc_trim, in a process that has asked for nothing yet."""
    calls, listeners = [], []

    class Library:
        malloc_trim = calls.append

    register = jax.monitoring.register_event_duration_secs_listener

    def registering(listener):
        listeners.append(listener)
        register(listener)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", registering)
    monkeypatch.setattr(freed_memory, "_SHORTEST", 0.0)
    freed_memory.return_freed_memory.cache_clear()
    yield calls
    for listener in listeners:
        jax.monitoring.unregister_event_duration_listener(listener)
    freed_memory.return_freed_memory.cache_clear()


def test_memory_is_returned_after_a_compilation_and_not_after_a_call(trimmed):
    double = jax.jit(lambda x: 2 * x)
    x = jnp.arange(3)
    assert freed_memory.return_freed_memory()
    assert freed_memory.return_freed_memory()  # no second listener
    double(x)
    assert trimmed == [0]
    double(x)
    assert trimmed == [0]


def test_short_compilations_are_left_alone(trimmed, monkeypatch):
    monkeypatch.setattr(freed_memory, "_SHORTEST", 1e9)
    assert freed_memory.return_freed_memory()
    jax.jit(lambda x: 3 * x)(jnp.arange(3))
    assert trimmed == []


def test_other_c_libraries_have_no_such_function(trimmed, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not freed_memory.return_freed_memory()
