"""`options`, `init`, `--version` and `--help`: what the commands say of themselves."""

import argparse
import dataclasses
import pathlib
import re
import tomllib
import typing

import pytest
import yaml

import jaxalign
from jaxalign.commands import cli
from jaxalign.commands.arguments import Parser
from jaxalign.commands.options.describe import attributes_of, options_of, sections_of
from jaxalign.commands.options.table import all_sections
from jaxalign.commands.synth.config import SynthRun, load_synth
from jaxalign.run.config.recipes import recipe_path, recipes
from jaxalign.run.config.runs import RUNS, load_config
from jaxalign.run.pipeline import load_stages

COMMON = ("model", "data", "run", "optimizer", "mesh")
ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = pathlib.Path(jaxalign.__file__).parent


def run(capsys, *arguments):
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


# Options


def classes():
    """All dataclasses that a configuration may hold, found without the code under test."""
    found, todo = [], [*RUNS.values(), SynthRun]
    while todo:
        hint = todo.pop()
        todo += typing.get_args(hint)
        if dataclasses.is_dataclass(hint) and hint not in found:
            found.append(hint)
            todo += hint.kinds().values() if hasattr(hint, "kinds") else ()
            todo += typing.get_type_hints(hint).values()
    return found


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_option_has_a_line(cls):
    """In a docstring; what `options` and `--help` print is read from there."""
    shown = {option.name: option.help for option in options_of(cls)}
    assert set(shown) == {field.name for field in dataclasses.fields(cls)}
    assert all(len(text) > 5 for text in shown.values())


def test_an_option_without_a_line_is_an_error():
    @dataclasses.dataclass
    class Config:
        """Options.

        Attributes:
          told: a line.
        """

        told: int = 1
        silent: int = 2

    with pytest.raises(ValueError, match=r"Config\.silent: no line under Attributes"):
        list(options_of(Config))


def test_a_docstring_is_read_whole():
    class Base:
        """Base.

        Attributes:
          old: from the base; None: none.
        """

    class Config(Base):
        """Options.

        Attributes:
          one, two: both
            on two lines.

          three: after a gap. "a: b": no name of its own.
        """

    assert attributes_of(Config) == {
        "old": "from the base; null: none.",
        "one": "both on two lines.",
        "two": "both on two lines.",
        "three": 'after a gap. "a: b": no name of its own.',
    }


def test_sections_lie_within_one_another():
    names = [section.name for section in sections_of(RUNS["ppo"])]
    assert names[0] == ""
    for name in ("model.lora", "data.train", "rewards.gsm8k", "critic_optimizer", "ppo"):
        assert name in names


def test_options_of_a_section_are_listed(capsys):
    text = run(capsys, "options", "optimizer", "ppo.kl_coef")
    assert re.search(r"^optimizer\.learning_rate = 1e-05   \(float\)$", text, re.MULTILINE)
    assert "peak rate, after warm-up" in text
    assert re.search(r"^optimizer\.max_grad_norm = 1\.0   \(float or null\)$", text, re.MULTILINE)
    assert text.count("ppo.") == 1
    everything = run(capsys, "options")
    assert all(re.search(rf"^{re.escape(name)} ", everything, re.M) for name in all_sections())


@pytest.mark.parametrize("algorithm", RUNS)
def test_help_has_every_option_with_its_default(algorithm, capsys):
    with pytest.raises(SystemExit):
        cli.main([algorithm, "--help"])
    text = capsys.readouterr().out
    for section in sections_of(RUNS[algorithm]):
        if section.name in ("data.eval", "ptx", "ptx.train", "ptx.eval", "critic_optimizer"):
            assert f"\n{section.name}: as " in text
            continue
        for option in section.options:
            if not section.name and option.name in (algorithm, *COMMON):
                continue  # a section
            default = "must be given" if option.default is None else f"= {option.default}"
            assert f"\n  {option.name} {default}" in text


def test_every_argument_of_every_command_has_help():
    for command in cli.commands():
        parser = Parser()
        command.add_arguments(parser)
        for action in vars(parser)["_actions"]:  # argparse has no public list
            assert action.help, f"{command.name} {action.dest}"
            plain = isinstance(action.default, (int, float, str)) and action.option_strings
            if plain and not isinstance(action.default, bool) and action.default is not None:
                if action.default == argparse.SUPPRESS:
                    continue
                text = parser.format_help()
                assert re.search(rf"default\s+{re.escape(str(action.default))}", text) or (
                    "the default" in action.help
                ), f"{command.name} {action.dest}"


def test_version(capsys):
    text = run(capsys, "--version")
    assert re.fullmatch(r"jaxalign \S+ \(jax [\d.]+, flax [\d.]+, Python 3\.\d+\.\d+\)\n", text)


# Recipes


def test_recipes_are_the_files_of_configs():
    files = set((ROOT / "configs").rglob("*.yaml"))
    assert {path.resolve() for path in recipes().values()} == files
    assert recipe_path("recipe:llama-3.1-8b/ppo").name == "ppo.yaml"


def test_recipes_are_in_the_wheel():
    """The patterns of pyproject.toml, which setuptools reads with the same rules, find them all."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["jaxalign"]
    import glob

    found = {
        pathlib.Path(path).resolve()
        for pattern in patterns
        for path in glob.glob(str(PACKAGE / pattern), recursive=True)
    }
    assert {path.resolve() for path in recipes().values()} <= found


def test_a_recipe_stands_for_a_file():
    path = ROOT / "configs/recipes/qwen3-8b/dpo.yaml"
    changed = ["data.rows=256"]
    assert load_config("dpo", "recipe:qwen3-8b/dpo", changed) == load_config("dpo", path, changed)
    assert load_stages("recipe:pipeline") == load_stages(ROOT / "configs/pipeline.yaml")
    assert load_synth("recipe:synth_preferences").preferences is not None


# init


def test_init_writes_a_commented_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, algorithm in (("sft", "sft"), ("grpo", "ppo"), ("llama-3.1-8b/dpo", "dpo")):
        told = run(capsys, "init", name)
        file = name.replace("/", "-") + ".yaml"
        assert f"jaxalign {algorithm} {file}" in told
        text = (tmp_path / file).read_text("utf-8")
        assert text.count("#") > 3
        assert load_config(algorithm, file) == load_config(
            algorithm, recipe_path({"grpo": "ppo_grpo"}.get(name, name))
        )
    assert "jaxalign sft sft.yaml run.folder" in (tmp_path / "sft.yaml").read_text("utf-8")


def test_init_overwrites_nothing(tmp_path, capsys):
    target = tmp_path / "mine.yaml"
    target.write_text("mine: true\n")
    assert cli.main(["init", "dpo", "--out", str(target)]) == 2
    assert f"{target} is there already" in capsys.readouterr().err
    assert target.read_text() == "mine: true\n"
    assert yaml.safe_load(run(capsys, "init", "dpo", "--out", "-"))["dpo"]["beta"] == 0.1
