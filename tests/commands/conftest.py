"""Fixtures of the commands."""

import pytest


@pytest.fixture
def timeless(monkeypatch):
    """Every reply of a synthesis was written at the same time."""
    monkeypatch.setattr("jaxalign.commands.synth.writer.now", lambda: "2026-01-01T00:00:00+00:00")
