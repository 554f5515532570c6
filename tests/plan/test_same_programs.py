"""What is planned is what runs: both compile the same programs, as text."""

import contextlib
import re

import chatmodel
import jax
import pytest

from jaxalign.plan import make_plan
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge

pytestmark = pytest.mark.usefixtures("kept_programs")


@contextlib.contextmanager
def compiled_texts(folder):
    """Texts of all programs that JAX hands to the compiler, as JAX itself dumps them."""
    texts = set()
    jax.clear_caches()  # what is compiled already is not handed over again
    jax.config.update("jax_dump_ir_to", str(folder))
    try:
        yield texts
    finally:
        jax.config.update("jax_dump_ir_to", "")
    texts.update(without_places(path.read_text("utf-8")) for path in folder.rglob("*.mlir"))


def without_places(text):
    """A program without the lines of Python that it came from."""
    lines = [line for line in text.splitlines() if not line.startswith("#loc")]
    place = r'"[^"]*"(?:\([^()]*\))?|callsite\([^()]*\)|[^()"]*'
    return re.sub(rf" loc\((?:{place})\)", "", "\n".join(lines))


@pytest.mark.parametrize(
    ("algorithm", "changes", "programs"),
    [
        ("sft", {"model": {"lora": {"rank": 2}}}, {"update"}),
        ("reward", {"run": {"micro_batches": 1}}, {"update"}),
        ("dpo", {"dpo": {"ld_alpha": 0.5}}, {"reference", "update"}),
        ("kto", {}, {"reference", "update"}),
        (
            "ppo",
            {"ppo": {"stop_tokens": [2], "samples": 2}, "data": {"rows": 8}},
            {"prefill", "decode", "score", "experience", "update"},
        ),
        (
            "ppo",
            {
                "ppo": {
                    "stop_tokens": [2],
                    "score_early": True,
                    "advantage_estimator": "rloo",
                    "samples": 2,
                },
                "reward_model": None,
                "rewards": [{"kind": "regex", "pattern": "a"}],
            },
            {"prefill", "decode", "experience", "update"},
        ),
        (
            "ppo",
            {"ppo": {"stop_tokens": [2], "speculate": 2, "sampling_weights": "int8"}},
            {"sampling weights", "prefill", "decode", "score", "experience", "update"},
        ),
        (
            "ppo",
            {
                "model": {"lora": {"rank": 2, "targets": [r"layers\.1\..*"]}},
                "critic": "adapter",
                "ppo": {"stop_tokens": [2], "keep_lower_states": True},
            },
            {"prefill", "decode", "score", "experience", "update"},
        ),
    ],
)
def test_a_plan_compiles_the_programs_of_the_run(
    algorithm, changes, programs, chat_models, tmp_path
):
    values = chatmodel.settings(algorithm, chat_models, tmp_path / "run", steps=2)
    values = merge(values, {"run": {"checkpoint": False, "export": False}})
    config = load_config(algorithm, merge(values, changes))
    with compiled_texts(tmp_path / "ran") as ran:
        loop.train(config)
    with compiled_texts(tmp_path / "planned") as planned:
        plan = make_plan(algorithm, config, "cpu:8")
    assert {program.name for program in plan.programs} == programs
    assert len(planned) >= len(programs)
    missing = planned - ran
    assert not missing, "\n".join(text[:1500] for text in missing)
