"""The command restarts once with huge pages where they help; importing never restarts."""

import os
import subprocess
import sys

import pytest

from jaxalign.commands.startup import huge_pages
from jaxalign.parallel import platforms

SETTING = "glibc.malloc.hugetlb=1"


@pytest.fixture
def linux(monkeypatch):
    """A machine on which huge pages help."""
    monkeypatch.setattr(huge_pages, "_glibc", lambda: (2, 36))
    monkeypatch.setattr(huge_pages, "_on_request", lambda: True)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return monkeypatch


def test_the_setting_joins_other_tunables(linux):
    assert huge_pages.environment() == {"GLIBC_TUNABLES": SETTING}
    linux.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert huge_pages.environment() == {"GLIBC_TUNABLES": f"glibc.malloc.arena_max=2:{SETTING}"}


@pytest.mark.parametrize("tunables", ["glibc.malloc.hugetlb=0", f"glibc.malloc.check=0:{SETTING}"])
def test_a_setting_of_the_user_stays(linux, tunables):
    linux.setenv("GLIBC_TUNABLES", tunables)
    assert huge_pages.environment() == {}


def test_nothing_where_it_would_not_help(linux):
    linux.setattr(huge_pages, "_glibc", lambda: (2, 34))
    assert huge_pages.environment() == {}
    linux.setattr(huge_pages, "_glibc", lambda: (2, 35))
    linux.setattr(huge_pages, "_on_request", lambda: False)
    assert huge_pages.environment() == {}


def restarts(monkeypatch) -> bool:
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    huge_pages.restart_with_huge_pages()
    return bool(started)


def test_only_where_jax_will_use_a_cpu(linux):
    linux.setenv("JAX_PLATFORMS", "cuda")
    assert not restarts(linux)
    linux.setenv("JAX_PLATFORMS", "cpu")
    assert restarts(linux)
    linux.delenv("JAX_PLATFORMS")
    linux.setattr(platforms.importlib.util, "find_spec", lambda name: None)
    assert restarts(linux)
    linux.setattr(platforms.importlib.util, "find_spec", lambda name: object())
    assert not restarts(linux)


# A process on a machine where huge pages help, that reports when it would be replaced.
HELPFUL = """
import os, runpy, sys
from jaxalign.commands.startup import huge_pages
huge_pages._on_request, huge_pages._glibc = (lambda: True), (lambda: (2, 36))
"""


def run(code, *arguments):
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", HELPFUL + code, *arguments],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    return process.pid, lines


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_a_process_restarts_once_with_its_own_arguments():
    pid, lines = run(
        "print('start', flush=True); huge_pages.restart_with_huge_pages()\n"
        "print(os.getpid(), os.environ['GLIBC_TUNABLES'], *sys.argv[1:])",
        "a b",
        "--c",
    )
    assert lines == ["start", "start", f"{pid} {SETTING} a b --c"]


REPORT = """
os.execve = lambda *call: print('replaced:', 'jax' in sys.modules)
sys.argv = ['jaxalign', '--help']
"""


@pytest.mark.parametrize("module", ["jaxalign", "jaxalign.commands.cli"])
def test_the_command_restarts_before_it_loads_jax(module):
    code = f"try: runpy.run_module({module!r}, run_name='__main__')\nexcept SystemExit: pass"
    _, lines = run(REPORT + code)
    assert lines[0] == "replaced: False"
    assert lines[1].startswith("usage: jaxalign")


def test_nothing_else_replaces_a_process():
    code = """
import jaxalign
for name in jaxalign.__all__: getattr(jaxalign, name)
from jaxalign.commands import cli
try: cli.main(['--help'])
except SystemExit: pass
"""
    _, lines = run(REPORT + code)
    assert lines[0].startswith("usage: jaxalign")
    assert not any(line.startswith("replaced") for line in lines)
