"""SFT, reward and DPO steps, as a run makes them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.algorithms import dpo, reward, sft
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import init_state
from jaxalign.commands.bench.case import Case, Runner, Sample
from jaxalign.commands.bench.rows import pair_batches, token_batches
from jaxalign.commands.bench.sizes import SIZES
from jaxalign.models.decoder import Decoder
from jaxalign.models.flops import forward_flops, update_flops, work_of
from jaxalign.models.scorer import with_scalar_head
from jaxalign.parallel.sharding import param_shardings, shard_batch
from jaxalign.types import Params, TokenBatch


def decoder(case: Case, mesh: Mesh, dtype: str | None = None) -> tuple[Decoder, Params]:
    """A language model with random weights on the mesh, in `dtype` or the case's `param_dtype`."""
    model = Decoder(
        SIZES[case.size], compute_dtype=case.dtype, remat=case.remat, attention=case.attention
    )
    kind = case.param_dtype if dtype is None else dtype
    layout = param_shardings(model.axes, mesh, model.shapes)
    draw = lambda key: jax.tree.map(lambda x: x.astype(kind), model.init(key))  # noqa: E731
    return model, jax.jit(draw, out_shardings=layout)(jax.random.key(0))


def adam(case: Case) -> Any:
    """AdamW as in the recipes, the learning rate so small that nothing diverges."""
    config = OptimizerConfig(
        learning_rate=1e-6, total_steps=10**6, schedule="linear", moments=case.optimizer_dtype
    )
    return make_optimizer(config)


def update_runner(case: Case, mesh: Mesh) -> Runner:
    """One step of SFT, a reward model or DPO; DPO asks the reference for every batch."""
    model, params = decoder(case, mesh)
    tx, parts = adam(case), case.parts(mesh)
    batches: Iterator[Any] = token_batches(case) if case.what == "sft" else pair_batches(case)
    prepare = None
    reference: Params = None
    if case.what == "sft":
        step = sft.make_step(model, tx, micro_batches=parts)
    elif case.what == "reward":
        model, params = with_scalar_head(model, params, jax.random.key(1))
        step = reward.make_step(model, tx, micro_batches=parts)
    else:
        step = dpo.make_step(model, tx, micro_batches=parts)
        prepare, reference = dpo.make_prepare(model), params
    state = init_state(params, tx)
    del params
    compiled = compile_step(step, state, mesh)
    head = case.what != "reward"

    def run() -> Sample:
        nonlocal state
        start = time.perf_counter()
        batch = next(batches)
        placed = shard_batch(batch, mesh)
        waited = time.perf_counter()
        marks = {"data": waited - start}
        if prepare is not None:
            placed = jax.block_until_ready(prepare(reference, placed))
            marks["reference"] = time.perf_counter() - waited
        state, metrics = compiled(state, placed)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - start
        work = work_of(batch)
        flops = update_flops(model, batch, head=head)
        if prepare is not None:
            flops += forward_flops(model.config, work)
        marks["update"] = seconds - sum(marks.values())
        return Sample(seconds, work.tokens, flops, marks, 1 - work.tokens / _room(batch))

    return Runner(run, lambda: compiled.compiles)


def _room(batch: Any) -> int:
    if isinstance(batch, TokenBatch):
        return batch.inputs.size
    return sum(_room(part) for part in batch if isinstance(part, TokenBatch))
