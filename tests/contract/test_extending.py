"""Code outside the package adds an algorithm by one call, and a preference loss by one call."""

import dataclasses
from typing import ClassVar, NamedTuple

import chatmodel
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses
from jaxalign.algorithms import dpo
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.step import Loss, make_step
from jaxalign.commands.bench.case import Case, make_case
from jaxalign.commands.bench.runs import case_runner
from jaxalign.data import sft_batches
from jaxalign.losses.masked import weighted
from jaxalign.models.lm_head import target_logprobs
from jaxalign.plan import make_plan
from jaxalign.run import loop
from jaxalign.run.config.base import Run
from jaxalign.run.config.runs import RUNS, load_config
from jaxalign.run.tasks import ALGORITHMS, Algorithm, register
from jaxalign.run.tasks.models import load_policy
from jaxalign.run.tasks.parts import Parts, scheduled_optimizer
from jaxalign.run.tasks.shapes import array, text_shapes
from jaxalign.types import TokenBatch

pytestmark = pytest.mark.usefixtures("kept_programs")


# --- an algorithm: rows weigh what their data says, L = Σ w_b · −log π(y_b) / Σ w_b · n_b ---------


class WeighedBatch(NamedTuple):
    """Conversations with a weight each: float32 `[B]`."""

    tokens: TokenBatch
    weight: np.ndarray


class WeighedBatches:
    """Those of `sft_batches`; a row weighs `scale` for each of its trained tokens."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __len__(self):
        return len(self._inner)

    def __iter__(self):
        for batch in self._inner:
            yield WeighedBatch(batch, batch.loss_mask.sum(1).astype(np.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeighedConfig:
    power: float = 1.0

    def __post_init__(self):
        if self.power < 0:
            raise ValueError(f"weighed power={self.power}: wanted 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeighedRun(Run):
    weighed: WeighedConfig = WeighedConfig()
    algorithm: ClassVar[str] = "weighed"


def make_loss(model, config):
    def weights(batch):
        rows = jnp.asarray(batch.weight)[:, None] ** config.power
        return jnp.where(batch.tokens.loss_mask, rows, 0.0)

    def count(batch):
        return {"weighed": jnp.sum(weights(batch))}

    def terms(params, batch):
        tokens = batch.tokens
        hidden = model.apply(params, tokens.inputs, tokens.positions, tokens.segment_ids)
        logprobs = target_logprobs(model, params, hidden, tokens.targets, mask=tokens.loss_mask)
        total = -jnp.sum(weights(batch) * logprobs)
        return {"weighed": total}, {"nll": weighted(-logprobs, tokens.loss_mask)}

    return Loss(count, terms)


def build(config, mesh, loader, data):
    policy = load_policy(config, mesh, loader, data.tok)
    tx = scheduled_optimizer(config.optimizer, data.total)
    loss = make_loss(policy.model, config.weighed)
    state = loader.init_state(policy.params, tx, policy.frozen)
    step = compile_step(make_step(loss, tx, config.run.micro_batches), state, mesh)
    return state, Parts(policy=policy.model, adapted=bool(policy.frozen), step=step, loss=loss)


@pytest.fixture
def algorithm():
    row = Algorithm(
        config=WeighedRun,
        help="rows weigh what they hold",
        example="sft.yaml",
        batches=lambda config: (
            lambda *args, **options: WeighedBatches(sft_batches(*args, **options))
        ),
        shapes=lambda config: WeighedBatch(text_shapes(config), array(config.data.rows)),
        build=build,
    )
    register(row)
    yield row
    del ALGORITHMS[row.name], RUNS[row.name]


def values_of(models, folder, **run):
    values = chatmodel.settings("sft", models, folder, checkpoint=False, export=False, **run)
    return values | {"weighed": {"power": 1.0}}


def test_an_algorithm_from_outside_trains(algorithm, chat_models, tmp_path):
    values = values_of(chat_models, tmp_path / "run", steps=4)
    held_out = chatmodel.write_rows(tmp_path / "held_out.jsonl", chatmodel.CONVERSATIONS[:8])
    values["data"]["eval"] = [held_out]
    result = loop.train(load_config("weighed", values))
    assert [row["compiles"] for row in result.history] == [1] * 4
    assert result.after["loss/weighed"] < result.before["loss/weighed"]
    # All rows have as many trained tokens, n = 4 ("ok", a letter, the end): all weigh n.
    assert result.history[0]["loss"] == pytest.approx(result.history[0]["nll"], rel=1e-5)
    assert result.history[0]["weight/weighed"] == 8 * 4 * 4
    with pytest.raises(ValueError, match=r"weighed power=-1\.0"):
        load_config("weighed", values, ["weighed.power=-1"])


def test_an_algorithm_from_outside_is_planned(algorithm, chat_models, tmp_path):
    config = load_config("weighed", values_of(chat_models, tmp_path / "run"))
    plan = make_plan("weighed", config, "cpu:8")
    assert [program.name for program in plan.programs] == ["update"]
    assert plan.batch == 32 * (4 * 4 + 1) + 4  # a row on each device, and its weight
    assert plan.tokens == 8 * 32


def test_an_algorithm_from_outside_is_measured(algorithm):
    case = make_case("weighed", "XS", "full", {"rows": 8, "length": 16}).resolved()
    runner = case_runner(case, case.mesh())
    first = runner.run()
    runner.run()
    assert first.tokens == 8 * 16
    assert runner.compiles() == 1
    with pytest.raises(ValueError, match="layout='packed'"):
        Case(what="weighed", layout="packed")


def test_an_algorithm_of_a_known_name_is_refused(algorithm):
    with pytest.raises(ValueError, match="'weighed' is there already"):
        register(algorithm)


# --- a preference loss with an option: max(0, m − β (s_c − s_r)) ---------------------------------


def test_a_preference_loss_from_outside_trains(chat_models, tmp_path):
    def far_hinge(chosen, rejected, *, beta, far_margin):
        return jax.nn.relu(far_margin - beta * (chosen - rejected))

    option = losses.preference.Option(2.0)
    losses.preference.register("far_hinge", far_hinge, {"far_margin": option})
    try:
        values = chatmodel.settings("dpo", chat_models, tmp_path / "run", steps=2)
        values["run"] |= {"checkpoint": False, "export": False}
        own = {"loss_type": "far_hinge", "loss_options": {"far_margin": 3.0}}
        result = loop.train(load_config("dpo", values | {"dpo": own}))
        # Policy = reference: the loss is the margin.
        assert result.history[0]["loss"] == pytest.approx(3.0, rel=1e-5)
        assert result.history[1]["loss"] < 3.0
        assert dpo.Config(loss_type="far_hinge").loss_type == "far_hinge"
        with pytest.raises(ValueError, match="far_margni"):
            dpo.Config(loss_type="far_hinge", loss_options={"far_margni": 3.0})
    finally:
        del losses.preference.TABLE["far_hinge"]
