"""Every block of code in README and docs works: Python runs, commands and YAML are accepted."""

import os
import re
import shlex
import subprocess
import sys
import tomllib

import blocks
import chatmodel
import jax
import pytest
import yaml

from jaxalign.commands import cli
from jaxalign.commands.synth.config import load_synth
from jaxalign.run.config.recipes import find_config
from jaxalign.run.config.runs import RUNS, load_config
from jaxalign.run.config.yaml import merge, read_yaml
from jaxalign.run.pipeline import load_stages
from jaxalign.run.tasks.rows import check_rows

ROOT = blocks.ROOT
TESTED = ("python", "bash", "yaml")


def cases(language):
    """The blocks of a language as parameters; slow and skipped ones are marked."""
    marks = {"slow": lambda _: pytest.mark.slow, "skip": lambda b: pytest.mark.skip(b.reason)}
    return [
        pytest.param(block, id=block.name, marks=[marks[block.mark](block)] if block.mark else [])
        for block in blocks.BLOCKS
        if block.language == language
    ]


# --- none escapes --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", blocks.PAGES, ids=lambda path: path.name)
def test_no_block_escapes(path):
    found = blocks.blocks_of(path)
    text = path.read_text("utf-8")
    assert 2 * len(found) == len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE))
    assert text.count("<!-- test:") == sum(bool(block.mark) for block in found)
    for block in found:
        known = block.language in (*TESTED, "") or block.mark == "skip"
        assert known, f"{block.name}: no test for {block.language!r}"
        assert block.mark in ("", "slow", "skip"), block.name
        assert bool(block.reason) == (block.mark == "skip"), f"{block.name}: why is it skipped?"
        if not block.language:  # drawings and output
            code = re.search(r"^((jaxalign|bash|python|pip|import|from) |\w+ = )", block.code, re.M)
            assert code is None, f"{block.name}: name the language, so that it is tested"


def test_there_are_blocks_of_every_language():
    for language in TESTED:
        assert len(cases(language)) > 3


# --- Python --------------------------------------------------------------------------------------

# Page → what its examples take for granted, and numbers that a tiny model needs smaller.
SMALLER = {
    "README.md": {
        "make_mesh(data=1, fsdp=-1, tensor=1)": "make_mesh(devices=jax.devices()[:1])",
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': "MODEL",
        "rows=64, length=2048": "rows=8, length=32",
        "rows=32, length=1024": "rows=8, length=32",
        "rows=128, length=256": "rows=8, length=32",
        "epochs=4, count=4": "epochs=1, count=1",
        "max_new_tokens=64": "max_new_tokens=4",
    },
    "docs/ppo.md": {"samples=8": "samples=2", "count=4": "count=1"},
}
SETUP = {
    "docs/adapters.md": """
import jax
import jaxalign as ja
model, params = ja.load_pretrained(MODEL)
config = ja.LoraConfig(rank=2)
model, adapters, base = ja.add_lora(model, params, jax.random.key(0), config)
ja.save_adapter(model, ja.combine(adapters, base), "adapter", base=MODEL)
""",
    "docs/data.md": "from jaxalign.data import Faults, read_examples, to_conversation",
    "docs/research.md": """
import jax, numpy as np
import jax.numpy as jnp
import jaxalign as ja
from jaxalign import dpo, ppo, sft
model, params = ja.load_pretrained(MODEL)
ref_params, key, tx = params, jax.random.key(0), ja.make_optimizer()
""",
    "docs/ppo.md": """
import jax
import jaxalign as ja
from jaxalign import ppo
model, params = ja.load_pretrained(MODEL)
tok, key, ref_params = ja.load_tokenizer(MODEL), jax.random.key(0), params
prompts = next(iter(ja.prompt_batches(["prompts.jsonl"], tok, rows=8, length=32)))
reward_fn = ja.text_reward(lambda prompt, answer: float("a" in answer), tok)
""",
}
# Page → what must hold afterwards.
AFTER = {
    "README.md": "assert ja.load_pretrained('out/') and int(ppo_state.step) > 0 < int(state.step)",
    "docs/adapters.md": "assert model.config and ja.load_adapter",
    "docs/data.md": "assert faults.read == faults.kept == len(examples) > 0",
    "docs/ppo.md": "assert int(state.step) == 1 and 'loss' in metrics",
    "docs/research.md": "assert int(state.step) == 1 and 'loss' in metrics",
    "docs/rewards.md": (
        "assert polite('hi', 'please', {'task': 'chat'}) == 1.0\n"
        "assert polite('hi', 'please', {'task': 'maths'}) is None"
    ),
}


@pytest.mark.parametrize("block", cases("python"))
def test_python_runs(block, chat_models, tmp_path, monkeypatch, kept_programs):
    page = block.name.partition(":")[0]
    code = block.code
    for long, short in SMALLER.get(page, {}).items():
        assert long in code, f"{block.name}: {long} is gone; update the test"
        code = code.replace(long, short)
    for name, rows in (
        ("chat", chatmodel.CONVERSATIONS),
        ("talks", chatmodel.CONVERSATIONS),
        ("pairs", chatmodel.PAIRS),
        ("prompts", chatmodel.PROMPTS),
    ):
        chatmodel.write_rows(tmp_path / f"{name}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(chat_models / "chat")}
    with jax.numpy_rank_promotion("raise"):
        exec(compile(SETUP.get(page, "") + "\n" + code, block.name, "exec"), names)
        exec(AFTER[page], names)


# --- YAML ----------------------------------------------------------------------------------------

# Page → the configuration into which its sections fit.
BASE = {"docs/ppo.md": "ppo_grpo", "docs/rewards.md": "ppo", "docs/parallel.md": "ppo"}


@pytest.mark.parametrize("block", cases("yaml"))
def test_yaml_is_accepted(block):
    page = block.name.partition(":")[0]
    values = yaml.safe_load(block.code)
    assert isinstance(values, dict)
    if page == "docs/synthesis.md":
        base = read_yaml(ROOT / "configs/synth_instruct.yaml")
        base.pop("writer")
        load_synth(base | values)
        return
    name = BASE.get(page, "sft")
    algorithm, base = name.partition("_")[0], read_yaml(ROOT / f"configs/{name}.yaml")
    if "rewards" in values:
        base.pop("reward_model", None)
    config = load_config(algorithm, merge(base, values))
    if page == "docs/ppo.md":
        check_rows(config, config.mesh.make())  # of 8 devices
    for section, options in values.items():
        if isinstance(options, dict):
            assert all(hasattr(getattr(config, section), name) for name in options)
        else:
            assert hasattr(config, section)


# --- shell ---------------------------------------------------------------------------------------


def commands_of(code):
    """The commands of a block: without comments, environment and what separates them."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        command: list[str] = []
        for word in [*words, "&"]:
            if word != "&":
                command.append(word)
            elif command:
                yield command
                command = []


def check_command(words):
    """Accepts a command, or fails; see the branches for what is checked of each kind."""
    while words and re.fullmatch(r"[A-Z_]+=.*|export|\w+=.*", words[0]):
        words = words[1:]
    if not words or words[0].startswith("scripts/bench/_peers.sh"):  # of PEER=$(bash scripts/…)
        return
    first = words[0]
    if first == "jaxalign":
        check_jaxalign(words[1:])
    elif first == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for name in re.findall(r"\[(\w[\w-]*)\]", words[-1]):
            assert name in extras["optional-dependencies"]
    elif first.startswith("scripts/launch/"):
        check_launcher(["bash", *words])
    elif first == "kubectl":  # no cluster is at hand; the manifests are tested with the launcher
        assert words[1] in ("create", "wait", "get", "logs")
    elif first == "bash" and (ROOT / words[1]).suffix == ".sh":
        subprocess.run(["bash", "-n", str(ROOT / words[1])], check=True)
    elif first == "python" and words[1].startswith("scripts/launch/"):
        check_launcher([sys.executable, *words[1:]])
    elif first == "python":
        check_script(words[1:])
    else:
        raise AssertionError(f"no way to check {shlex.join(words)!r}; mark the block")


def check_jaxalign(words):
    """The command line is parsed; a YAML of configs/ is loaded with its overrides."""
    if any(word in ("CONFIG", "…]", "[key=value") for word in words):  # a synopsis
        words = re.sub(r"[\[\]]|…", "", " ".join(words)).split()
        words = [{"CONFIG": "x.yaml", "N": "1", "key=value": "a=b"}.get(w, w) for w in words]
    try:
        parsed = cli.parse(words)
    except SystemExit as error:
        if error.code == 0:  # --help
            return
        raise AssertionError(f"jaxalign {shlex.join(words)}: refused") from error
    config = getattr(parsed, "config", None)
    overrides = list(getattr(parsed, "overrides", []))
    algorithm = parsed.command
    if config in RUNS:  # `plan ppo FILE`
        algorithm, config, *overrides = config, *overrides
    if config is None or not config.startswith(("configs/", "recipe:")):
        return
    path = find_config(config if config.startswith("recipe:") else ROOT / config)
    if algorithm == "pipeline":
        load_stages(path, overrides)
    elif algorithm == "synth":
        load_synth(path, overrides)
    else:
        if algorithm not in RUNS:
            algorithm = next(name for name in RUNS if name in path.stem)
        load_config(algorithm, path, overrides)


def check_launcher(words):
    """The launcher runs with `--dry-run`, which sends nothing; what it starts is checked too."""
    program, script, *own = words
    command: list[str] = []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    own = " ".join(own).replace("$pod", "--name p --zone z").split()
    if "--dry-run" not in own:
        own.append("--dry-run")
    tail = ["--", *command] if command else []
    done = subprocess.run(
        [program, str(ROOT / script), *own, *tail],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_TOKEN": "hf_…"},  # the pages export it before
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if command:
        assert all(word in done.stdout for word in command)
        check_jaxalign(command)


def check_script(words):
    """Every option in the line is one of the script's."""
    done = subprocess.run(
        [sys.executable, str(ROOT / words[0]), "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for word in words[1:]:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", done.stdout), f"{words[0]} has no {word}"


@pytest.mark.parametrize("block", cases("bash"))
def test_commands_are_accepted(block):
    commands = list(commands_of(block.code))
    assert commands
    for words in commands:
        check_command(words)


def test_wrong_commands_are_refused():
    for line in (
        "jaxalign sftt configs/sft.yaml",
        "jaxalign generate m --no-such-flag 1",
        "scripts/launch/gpu_node.sh --no-such-flag -- sft configs/sft.yaml",
        "python scripts/dev/tree.py --no-such-flag",
        "curl example.org",
    ):
        with pytest.raises(AssertionError):
            check_command(shlex.split(line))
    with pytest.raises(ValueError, match="rowz"):
        check_command(shlex.split("jaxalign sft configs/sft.yaml data.rowz=1"))
