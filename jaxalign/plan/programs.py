"""The programs that a run compiles, compiled here from shapes, with what each one costs."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.kto import answer_logps
from jaxalign.algorithms.pairs import read_answers
from jaxalign.algorithms.ppo.experience import make_experience
from jaxalign.algorithms.state import opt_state_shardings
from jaxalign.models.base import combine
from jaxalign.models.flops import row_flops
from jaxalign.models.lm_head import head_chunks
from jaxalign.models.scorer import pooled_scores
from jaxalign.parallel.host_memory import is_offloaded, on_device
from jaxalign.parallel.sharding import axis_shards, replicated, row_shards, rows_sharding, use_mesh
from jaxalign.plan.costs import Costs, count_costs
from jaxalign.plan.parts import HostArray, Parts, array, relaid_shapes, rollout
from jaxalign.plan.topology import first_line, nodes_of
from jaxalign.sampling.draw import Sampling
from jaxalign.sampling.engine import decode, empty_slots, read_prompts, stages
from jaxalign.types import Params, TokenBatch, TrainState

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program; bytes and costs are those of one device, for one run of it.

    Attributes:
      name: e.g. "update".
      times: how often it runs in a step, or in an iteration of PPO.
      batch: data that lies in memory while it runs.
      cache: keys and values that do.
      temporary: gradients, activations, whatever the compiler keeps while it runs.
      other: padding of the arguments to the device's tiles, results that replace no argument.
      costs: what it does.
      useful: FLOPs that the mathematics asks for, on all devices together (see `models.flops`).
      seconds: tracing and compiling.
    """

    name: str
    times: int
    batch: int
    cache: int
    temporary: int
    other: int
    costs: Costs
    useful: float
    seconds: float

    @property
    def extra(self) -> int:
        """Bytes beside the parameters and optimizer states that stay all the time."""
        return self.batch + self.cache + self.temporary + self.other


class DoesNotFit(ValueError):
    """The compiler refused: the program wants more than the device has.

    Attributes:
      over: how many times the device's memory it wants, where the compiler says so.
    """

    def __init__(self, message: str, over: float | None):
        super().__init__(message)
        self.over = over


def train_state(parts: Parts, mesh: Mesh) -> TrainState:
    """The state of a run as shapes, laid out as `init_state` would."""

    def moment(path: Any, x: Any, sharding: Any) -> Any:
        make = HostArray if is_offloaded(path, x) else jax.ShapeDtypeStruct
        return make(x.shape, x.dtype, sharding=sharding)

    opt_state = jax.tree_util.tree_map_with_path(
        moment,
        jax.eval_shape(parts.tx.init, parts.params),
        opt_state_shardings(parts.params, parts.tx),
    )
    counter = array((), jnp.int32, replicated(mesh))
    return TrainState(counter, parts.params, parts.frozen, opt_state)


def device_bytes(tree: Any, *, host: bool = False) -> int:
    """Bytes of a tree on one device, by its layout; whole where it has none.

    Args:
      tree: of shapes.
      host: count what lies in the host's memory instead.
    """

    def one(x: Any) -> int:
        if host != isinstance(x, HostArray):
            return 0
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))


def on_rows(tree: Any, mesh: Mesh) -> Any:
    """A batch of shapes with its rows split over the mesh."""
    return jax.tree.map(lambda x: array(x.shape, x.dtype, rows_sharding(mesh)), tree)


class _Compiler:
    """Compiles programs one after the other and keeps what they cost."""

    def __init__(self, mesh: Mesh, say: Say):
        self.mesh, self.say = mesh, say
        self.done: list[Program] = []

    def __call__(
        self, name: str, lower: Callable[[], Any], *, known: Any, batch: Any = (), cache: Any = (),
        times: int = 1, trips: int = 1, useful: float = 0.0, made: str = "other",
    ) -> Any:  # fmt: skip
        """Compiles; gives the compiled program.

        Args:
          name: for people.
          lower: makes the lowered program.
          known: arguments that lie in memory all the time.
          batch: trees of data that lie in memory while it runs.
          cache: trees of keys and values that do.
          times, trips, useful: see `Program` and `count_costs`.
          made: what its results count as: "other", "batch" or "cache".
        """
        self.say(f"compiling {name} …")
        began = time.perf_counter()
        try:
            compiled = lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise _refused(name, str(error)) from error
        seconds = time.perf_counter() - began
        account = compiled.memory_analysis()
        nodes = nodes_of(list(self.mesh.devices.flat))
        costs = count_costs(compiled.as_text(), nodes, trips)
        made_bytes = max(0, account.output_size_in_bytes - account.alias_size_in_bytes)
        sizes = {"batch": device_bytes(batch), "cache": device_bytes(cache), "other": 0}
        # Arguments that a program does not read are left out of it, but lie in memory too.
        sizes["other"] += max(
            0,
            account.argument_size_in_bytes - sizes["batch"] - sizes["cache"] - device_bytes(known),
        )
        sizes[made] += made_bytes
        self.done.append(
            Program(
                name=name,
                times=times,
                temporary=account.temp_size_in_bytes,
                costs=costs,
                useful=useful,
                seconds=seconds,
                **sizes,
            )
        )
        self.say(f"compiled {name} in {seconds:.0f} s")
        return compiled


def _refused(name: str, text: str) -> DoesNotFit:
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", text)
    if found is None:
        return DoesNotFit(f"{name} does not fit the device: {first_line(ValueError(text))}", None)
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used, there = float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]
    return DoesNotFit(
        f"{name} does not fit the device: it wants {used / 2**30:.2f} GiB of {there / 2**30:.2f} "
        f"GiB, {(used - there) / 2**30:.2f} GiB too much",
        used / there,
    )


def compile_programs(
    algorithm: str, config: Any, mesh: Mesh, parts: Parts, say: Say
) -> list[Program]:
    """Compiles all that one step of a run executes, or one iteration of PPO."""
    compiler = _Compiler(mesh, say)
    state = train_state(parts, mesh)
    rows, length = config.data.rows, config.data.length
    micro = config.run.micro_batches
    model, _ = parts.roles["policy"]
    batch = on_rows(parts.batch, mesh)
    update = compile_step(parts.step, state, mesh)
    passes = 2 if parts.frozen else 3  # frozen weights need no gradient

    def step(useful: float, trips: int, times: int = 1, held: Any = ()) -> None:
        compiler(
            "update", lambda: update.lower(state, parts.batch), known=state, batch=(batch, held),
            times=times, trips=trips, useful=useful,
        )  # fmt: skip

    def forward(part: Any, count: int, tokens: int, *, head: bool) -> float:
        return row_flops(part.config, count, tokens, head=head)

    if algorithm == "ppo":
        with config.mesh.use_rules("rollout"):
            _sample(compiler, config, mesh, parts, say)
        _experience(compiler, config, mesh, parts, state)
        answers = rows * config.ppo.samples
        each = answers // config.minibatches
        whole = length + config.ppo.max_new_tokens - 1
        trips = _chunks(model, each // micro, whole, mesh)
        useful = forward(model, each, whole, head=True)
        if "critic" in parts.roles and not config.ppo.shared_critic:
            useful += forward(parts.roles["critic"][0], each, whole, head=False)
        held = on_rows(rollout(config, answers), mesh)
        step(passes * useful, trips, config.ppo_epochs * config.minibatches, held)
        return compiler.done
    sides = {"sft": 1, "reward": 1, "dpo": 2, "kto": 1}[algorithm]
    sequences = _sequences(parts.batch) if algorithm == "reward" else sides * rows
    headless = algorithm == "reward"
    trips = 1 if headless else _chunks(model, sequences // micro, length, mesh)
    useful = forward(model, sequences, length, head=not headless)
    if "reference" in parts.roles:
        reference, weights = parts.roles["reference"]
        whole = 1 if headless else _chunks(reference, sequences, length, mesh)
        _prepare(compiler, algorithm, mesh, parts, reference, weights, batch, whole, useful)
    step(passes * useful, trips)
    return compiler.done


def _sequences(batch: Any) -> int:
    """Rows that a reward model reads of a batch."""
    return sum(
        math.prod(part.inputs.shape[:-1])
        for part in jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, TokenBatch))
        if isinstance(part, TokenBatch)
    )


def _chunks(model: Any, rows: int, length: int, mesh: Mesh) -> int:
    """How many chunks the vocabulary head takes when all positions are trained."""
    cuts = axis_shards("length", mesh)
    parts = row_shards(mesh) * cuts
    lines = (rows * cuts, math.ceil(length / cuts)) if parts > 1 else (1, rows * length)
    with use_mesh(mesh):
        return head_chunks(*lines, model.config.vocab_size, parts)[1]


def _prepare(
    compiler: _Compiler, algorithm: str, mesh: Mesh, parts: Parts, reference: Any,
    weights: Params, batch: Any, trips: int, useful: float,
) -> None:  # fmt: skip
    """What DPO and KTO ask of the reference before a step."""
    policy, params = parts.roles["policy"]

    def dpo(ref: Params, pairs: Any) -> Any:
        answers = read_answers(reference, on_device(ref), pairs)
        return answers.chosen, answers.rejected

    def kto(own: Params, ref: Params, answers: Any) -> Any:
        other, ref = answers.mismatched, on_device(ref)
        return (
            answer_logps(policy, own, other)[0],
            answer_logps(reference, ref, other)[0],
            answer_logps(reference, ref, answers.tokens)[0],
        )

    def lower() -> Any:
        with use_mesh(mesh):
            if algorithm == "dpo":
                return jax.jit(dpo).lower(weights, batch)
            own = combine(parts.params, parts.frozen)
            return jax.jit(kto).lower(own, weights, batch)

    times = 1 if algorithm == "dpo" else 3
    compiler(
        "reference", lower, known=(weights, params) if algorithm == "kto" else weights,
        batch=batch, trips=trips, useful=times * useful,
    )  # fmt: skip


def _sample(compiler: _Compiler, config: Any, mesh: Mesh, parts: Parts, say: Say) -> None:
    """PPO's rollout: prompts are read, answers written, as `generate.sample` goes about it."""
    model, params = parts.roles["policy"]
    if parts.frozen:
        params = combine(params, parts.frozen["policy"])
    own = config.mesh.rules_of.get("rollout")
    known = () if own else params  # a copy of its own for as long as it writes
    params = relaid_shapes(model, params, mesh, own)
    options, length, new = config.ppo, config.data.length, config.ppo.max_new_tokens
    answers = config.data.rows * options.samples
    slots = answers if options.slots is None else min(options.slots, answers)
    rows = min(config.data.rows, slots)
    groups = math.ceil(config.data.rows / rows)
    kind = jnp.dtype(options.cache_dtype or model.compute_dtype).name
    whole, split = replicated(mesh), rows_sharding(mesh)
    scalar = array((), jnp.int32, whole)
    tokens, mask = array((rows, length), jnp.int32, split), array((rows, length), bool, split)
    sampling = Sampling(
        array((), jnp.float32, whole),
        scalar,
        array((), jnp.float32, whole),
        array((max(1, len(options.stop_tokens)),), jnp.int32, whole),
        scalar,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)

    def empty() -> Any:
        with use_mesh(mesh):
            limits = array((answers,), jnp.int32, whole)
            return empty_slots.lower(
                model, scalar, limits, slots=slots, prompt_length=length, max_new_tokens=new,
                cache_dtype=kind,
            )  # fmt: skip

    def prefill() -> Any:
        with use_mesh(mesh):
            return read_prompts.lower(model, params, tokens, mask, scalar, kind)

    say("compiling empty slots …")
    lowered = empty()
    state = _outputs(lowered, lowered.compile())
    useful = row_flops(model.config, rows, length, head=False)
    compiled = compiler(
        "prefill", prefill, known=known, batch=(tokens, mask), times=groups, useful=useful,
        made="cache",
    )  # fmt: skip
    # The slots are there before the prompts are read.
    first = compiler.done[-1]
    compiler.done[-1] = dataclasses.replace(first, cache=first.cache + device_bytes(state))
    read = _outputs(prefill(), compiled)

    def writing() -> Any:
        with use_mesh(mesh):
            last = array((), bool, whole)
            return decode.lower(
                model, params, state, read, key, sampling, last, samples=options.samples
            )

    both = row_flops(model.config, slots, length + new, head=False)
    both -= row_flops(model.config, slots, length, head=False)
    head = 2.0 * slots * new * model.config.hidden_size * model.config.vocab_size
    with use_mesh(mesh):
        loops = len(stages(new)) if slots == answers == rows * options.samples else 1
    compiler(
        "decode", writing, known=known, batch=(tokens, mask), cache=(state, read),
        trips=math.ceil(new / loops), times=math.ceil(answers / slots), useful=both + head,
    )  # fmt: skip


def _outputs(lowered: Any, compiled: Any) -> Any:
    """Results of a program as shapes laid out as it lays them out."""
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )


def _experience(
    compiler: _Compiler, config: Any, mesh: Mesh, parts: Parts, state: TrainState
) -> None:
    """PPO's scoring of the answers, and what policy, reference and critic say of them."""
    model, _ = parts.roles["policy"]
    critic = parts.roles["critic"][0] if "critic" in parts.roles else None
    reference, ref_params = parts.roles["reference"]
    options, split = config.ppo, rows_sharding(mesh)
    rows = config.data.rows * options.samples
    length = config.data.length + options.max_new_tokens
    ids = array((rows, length), jnp.int32, split)
    tokens = TokenBatch(ids, ids, ids, ids, array((rows, length), jnp.bool_, split))
    scores = array((rows,), jnp.float32, split)
    finished = array((rows,), jnp.bool_, split)
    recorded = array((rows, length), jnp.float32, split)

    for name, (scorer, weights) in parts.roles.items():
        if not name.startswith("reward"):
            continue

        def score(scorer: Any = scorer, weights: Any = weights) -> Any:
            with use_mesh(mesh):
                run = jax.jit(lambda own, tokens: pooled_scores(scorer, on_device(own), tokens))
                return run.lower(weights, tokens)

        flops = row_flops(scorer.config, rows, length, head=False)
        compiler(name.replace("reward", "score"), score, known=weights, batch=tokens, useful=flops)

    def experience() -> Any:
        with use_mesh(mesh):
            run: Any = make_experience(model, critic, options, reference=reference)
            number = array((), jnp.float32, replicated(mesh))
            scale = (number, number) if options.normalize_scores else None
            return run.lower(
                state, ref_params, tokens, scores, finished, recorded, number, number, scale
            )

    flops = 2 * row_flops(model.config, rows, length - 1, head=True)
    if critic is not None and not options.shared_critic:
        flops += row_flops(critic.config, rows, length - 1, head=False)
    known = (state.params, state.frozen, ref_params)
    compiler(
        "experience", experience, known=known, batch=(tokens, scores, finished, recorded),
        trips=_chunks(model, rows, length - 1, mesh), useful=flops, made="batch",
    )  # fmt: skip
