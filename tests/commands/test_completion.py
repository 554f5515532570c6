"""`jaxalign completion`: bash completes as typed; the other shells get the same words."""

import shutil
import subprocess

import pytest

from jaxalign.commands import cli
from jaxalign.commands.completion import SHELLS, script, words_of
from jaxalign.commands.options.table import sections_of_command
from jaxalign.run.config.recipes import recipes


@pytest.fixture(scope="module")
def scripts():
    commands = cli.commands()
    return {shell: script(shell, commands) for shell in SHELLS}


def complete(text, *words):
    """What bash offers for the last word."""
    typed = " ".join(f"'{word}'" for word in words)
    lines = (
        f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; compopt() {{ :; }}; "
        '_jaxalign; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-uc", f"{text}\n{lines}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bash(scripts):
    text = scripts["bash"]
    assert complete(text, "jaxalign", "pi") == ["pipeline"]
    assert complete(text, "jaxalign", "export", "--dt") == ["--dtype"]
    assert complete(text, "jaxalign", "export", "--dtype", "fl") == ["float32", "float16"]
    assert complete(text, "jaxalign", "ppo", "x.yaml", "ppo.kl_c") == ["ppo.kl_coef="]
    assert complete(text, "jaxalign", "sft", "ppo.kl_c") == []  # not an option of SFT: files
    assert complete(text, "jaxalign", "completion", "z") == ["zsh"]


def test_bash_completes_recipes(scripts):
    """A colon separates words in bash, so `recipe:qw` are three of them."""
    assert "recipe:sft" in complete(scripts["bash"], "jaxalign", "sft", "recipe")
    qwen = [name for name in recipes() if name.startswith("qwen3-4b/")]
    assert complete(scripts["bash"], "jaxalign", "sft", "recipe", ":", "qwen3-4b") == qwen
    assert len(complete(scripts["bash"], "jaxalign", "sft", "recipe", ":")) == len(recipes())


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_every_word(scripts, shell):
    text = scripts[shell]
    for command in cli.commands():
        words = words_of(command)
        assert command.name in text
        for flag in words.flags:
            assert flag.removeprefix("--") in text
        for key in words.keys:
            assert key in text
    assert all(f"recipe:{name}" in text for name in recipes())
    if shutil.which(shell) is not None:
        option = "--no-execute" if shell == "fish" else "-n"
        done = subprocess.run([shell, option], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_words_are_those_of_help():
    by_name = {command.name: words_of(command) for command in cli.commands()}
    flags = {"--help", "--topology", "--json", "--search", "--storage-gbps"}
    assert set(by_name["plan"].flags) == flags
    assert by_name["data"].values["--as"] == ("sft", "reward", "dpo", "kto", "ppo")
    options = {o.name for section in sections_of_command("dpo") for o in section.options}
    inside = {name for name in options if name.startswith(("data.train.", "data.eval."))}
    assert {key.removesuffix("=") for key in by_name["dpo"].keys} == options - inside
    assert len(inside) == 16  # of the entries of two lists, which key=value does not reach


def test_the_command(capsys):
    assert cli.main(["completion", "bash"]) == 0
    assert "complete -o default -F _jaxalign jaxalign" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["completion", "tcsh"])
