"""Large pages are asked for where they help, once, and never in place of what was said before."""

import os
import subprocess
import sys

import pytest

from jaxalign.commands.startup import huge_pages

SETTING = "glibc.malloc.hugetlb=1"


@pytest.fixture
def linux(monkeypatch):
    """A machine on which large pages help."""
    monkeypatch.setattr(huge_pages, "_glibc", lambda: (2, 36))
    monkeypatch.setattr(huge_pages, "_on_request", lambda: True)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return monkeypatch


def test_the_setting_is_added_to_what_is_there(linux):
    assert huge_pages.environment() == {"GLIBC_TUNABLES": SETTING}
    linux.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert huge_pages.environment() == {"GLIBC_TUNABLES": f"glibc.malloc.arena_max=2:{SETTING}"}


@pytest.mark.parametrize("said", ["glibc.malloc.hugetlb=0", f"glibc.malloc.check=0:{SETTING}"])
def test_what_is_said_already_stays(linux, said):
    linux.setenv("GLIBC_TUNABLES", said)
    assert huge_pages.environment() == {}


def test_nothing_where_it_would_not_help(linux):
    linux.setattr(huge_pages, "_glibc", lambda: (2, 34))
    assert huge_pages.environment() == {}
    linux.setattr(huge_pages, "_glibc", lambda: (2, 35))
    linux.setattr(huge_pages, "_on_request", lambda: False)
    assert huge_pages.environment() == {}


def restarts(monkeypatch, argv, orig_argv) -> bool:
    """Whether a process of these arguments starts over."""
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    huge_pages.restart_command()
    return bool(started)


COMMAND = (["/bin/jaxalign", "sft"], ["python", "/bin/jaxalign", "sft"])


def test_only_where_jax_will_use_a_cpu(linux):
    linux.setenv("JAX_PLATFORMS", "cuda")
    assert not restarts(linux, *COMMAND)
    linux.setenv("JAX_PLATFORMS", "cpu")
    assert restarts(linux, *COMMAND)
    linux.delenv("JAX_PLATFORMS")
    linux.setattr(huge_pages.importlib.util, "find_spec", lambda name: None)
    assert restarts(linux, *COMMAND)
    linux.setattr(huge_pages.importlib.util, "find_spec", lambda name: object())
    assert not restarts(linux, *COMMAND)


def test_only_the_command(linux):
    linux.setenv("JAX_PLATFORMS", "cpu")
    assert restarts(linux, ["-m", "sft"], ["python", "-m", "jaxalign.commands.cli", "sft"])
    assert not restarts(linux, ["train.py"], ["python", "train.py", "jaxalign"])
    assert not restarts(linux, ["-m", "tests"], ["python", "-m", "pytest", "jaxalign.commands.cli"])
    assert not restarts(linux, ["-c"], ["python", "-c", "import jaxalign"])
    assert not restarts(linux, [], ["python"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="wants Linux")
def test_a_process_restarts_once_with_its_own_arguments():
    code = (
        "import os, sys; from jaxalign import huge_pages as pages\n"
        "pages._on_request, pages._glibc = (lambda: True), (lambda: (2, 36))\n"
        "pages._is_command = lambda: True\n"
        "print('start', flush=True); pages.restart_command()\n"
        "print(os.getpid(), os.environ['GLIBC_TUNABLES'], *sys.argv[1:])"
    )
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "a b", "--c"], env=env, stdout=subprocess.PIPE, text=True
    )
    lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    assert lines == ["start", "start", f"{process.pid} {SETTING} a b --c"]
