"""Hashes of the lowered programs of small models: shows that a refactoring changes none of them.

    python scripts/dev/lowered.py --out before.json --texts before
    python scripts/dev/lowered.py --against before.json --texts after
    python scripts/dev/lowered.py --only 'cpu-8/llama/dpo*' --texts after

The first line writes {"place/model/program": sha256 of its StableHLO text}. The second compares:
it lists what is new, gone and changed, and exits 1 where a program changed or could not be made.
`--only` takes a pattern of names, or a part of them. `--texts` keeps the texts, for `diff -r`.

Programs are lowered, not compiled, and nothing runs. Places are one CPU device, 8 fake ones with
data=2, fsdp=2, tensor=2, and the same mesh on TPUs and GPUs that need not be there. The latter two
want the compilers (`pip install "jaxalign[plan-tpu,plan-gpu]"`) and are left out without them.
Compare with the same versions of JAX, optax and flax: they shape the programs too.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import gc
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# All before JAX starts: every place is known to one process, and none needs an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxalign as ja
from jaxalign import dpo, kto, ppo, reward, sft

PLACES = {"cpu-1": "cpu:1", "cpu-8": "cpu:8", "v5e-2x4": "v5e:2x4", "h100-8": "h100:8"}
"""Name of a place → its topology, see `jaxalign.plan.topology`."""

ROWS, LENGTH = 8, 64
"""Enough rows for 4 row shards and 2 micro-batches, and for 2 chunks of the vocabulary head."""

LONG = 128
"""Rows that attention's kernels take."""

NEW = 64
"""Longest answers: on a CPU two loops, one after another."""

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 8,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "experts": {
        "num_experts": 4, "experts_per_token": 2, "router_aux_coef": 0.01, "family": "mixtral",
    },
    "windows": {
        "window": 16, "window_layers": (True, False), "tie_embeddings": True, "qk_norm": "head",
        "activation": "gelu_tanh", "norm": "rms_offset", "norm_place": "both", "embed_scale": 5.75,
        "logit_softcap": 30.0, "family": "gemma3",
    },
}  # fmt: skip

SOME = (
    "sft/*", "sft_long/*", "reward_pairs/step-1", "scorer/model_reward", "dpo/*", "kto/step-1",
    "ppo_critic/*", "sample/*", "head/gradient",
)  # fmt: skip
"""Programs of the models after the first: those in which a model can differ from another."""

Program = tuple[str, Callable[[], Any]]
"""A program's name, and what lowers it."""


def find(name: str, *modules: str) -> Any:
    """What is called `name` in the first of the modules that has it: modules move."""
    for module in modules:
        try:
            return getattr(importlib.import_module(f"jaxalign.{module}"), name)
        except (AttributeError, ModuleNotFoundError):
            continue
    raise ImportError(f"no {name} in {', '.join(modules)} of jaxalign; say here where it is now")


param_shardings = find("param_shardings", "parallel.sharding", "sharding")
rows_sharding = find("rows_sharding", "parallel.sharding", "sharding")
opt_state_shardings = find(
    "opt_state_shardings", "algorithms.state", "algorithms.step", "algorithms.compile"
)
DecoderConfig, RopeConfig = (find(name, "models.base") for name in ("DecoderConfig", "RopeConfig"))
find_devices = find("find_devices", "plan.topology")

empty_slots, read_prompts, decode = (
    find(name, "sampling.engine", "decoding") for name in ("empty_slots", "read_prompts", "decode")
)
end_of_answers = find("_ends", "sampling.generate", "generate")
Sampling = find("Sampling", "sampling.draw", "sampling")
Generation = find("Generation", "sampling.generate", "generate")


def jitted(function: Any) -> Any:
    """The jitted function that another one wraps: what it is asked for, or holds in its closure."""
    if hasattr(function, "lower"):
        return function
    held = inspect.getclosurevars(function).nonlocals.values()
    (found,) = (value for value in held if hasattr(value, "lower"))
    return found


def array(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def tokens_of(rows: int, length: int, *, branches: bool = False) -> ja.TokenBatch:
    ids = array((rows, length), jnp.int32)
    batch = ja.TokenBatch(ids, ids, ids, ids, array((rows, length), jnp.bool_))
    return batch._replace(branch_ids=ids) if branches else batch


def reward_batch(objective: str, attributes: int) -> Any:
    tokens, answers = tokens_of(ROWS, LENGTH), 3
    if objective == "ranking":
        each = (ROWS, answers)
        several = jax.tree.map(lambda x: array((*each, LENGTH), x.dtype), tokens)
        return ja.RankedBatch(several, array(each, jnp.float32), array(each, jnp.bool_))
    if objective == "regression":
        each = (ROWS, attributes)
        return ja.GradedBatch(tokens, array(each, jnp.float32), array(each, jnp.bool_))
    if objective == "steps":
        return ja.StepBatch(tokens, array((ROWS, LENGTH), jnp.float32), tokens.loss_mask)
    return ja.PairBatch(tokens, tokens, margin=array((ROWS,), jnp.float32))


def pair_batch(form: str) -> Any:
    """Pairs a row each, several in a row, or with their prompt in the row once."""
    pairs = (ROWS,) if form == "plain" else (ROWS, 3)
    logps = array(pairs, jnp.float32)
    mask = None if form == "plain" else array(pairs, jnp.bool_)
    if form == "shared_prefix":
        tokens = tokens_of(ROWS, LENGTH, branches=True)
        return ja.SharedPairBatch(tokens, logps, logps, mask=mask)
    tokens = tokens_of(ROWS, LENGTH)
    return ja.PairBatch(tokens, tokens, logps, logps, mask=mask)


def rollout_batch(options: ppo.Config) -> ja.RolloutBatch:
    tokens = tokens_of(ROWS, LENGTH)
    each, row = array((ROWS, LENGTH), jnp.float32), array((ROWS,), jnp.float32)
    flags = array((ROWS,), jnp.bool_)
    values = each if options.has_critic else None
    return ja.RolloutBatch(
        tokens, each, each, values, each, values, value_mask=tokens.loss_mask, rewards=each,
        scores=row, sampler_logprobs=each, finished=flags, valid=flags, temperature=row,
        kl_coef=row if options.kl_in == "loss" else None,
    )  # fmt: skip


class Case:
    """One model on one mesh."""

    def __init__(self, shape: dict[str, Any], mesh: Mesh):
        self.mesh = mesh
        self.whole, self.split = NamedSharding(mesh, PartitionSpec()), rows_sharding(mesh)
        compute = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
        local = {"local_rope": RopeConfig(theta=500.0)} if "window" in shape else {}
        config = DecoderConfig(**TINY, **shape, **local)
        self.model = ja.Decoder(config, compute_dtype=compute)
        self.adam = ja.make_optimizer(ja.OptimizerConfig(learning_rate=1e-3, weight_decay=0.1))
        # The optimizer is most of a small program's text, and the same in all of them.
        self.tx = optax.sgd(1e-3)

    def params(self, model: Any) -> Any:
        layout = param_shardings(model.axes, self.mesh, model.shapes)
        return jax.tree.map(lambda x, s: array(x.shape, x.dtype, s), model.shapes, layout)

    def state(self, params: Any, tx: Any, frozen: Any = None) -> ja.TrainState:
        opt_state = jax.tree.map(
            lambda x, s: array(x.shape, x.dtype, s),
            jax.eval_shape(tx.init, params),
            opt_state_shardings(params, tx),
        )
        counter = array((), jnp.int32, self.whole)
        return ja.TrainState(counter, params, frozen or {}, opt_state)

    def on_rows(self, batch: Any) -> Any:
        return jax.tree.map(lambda x: array(x.shape, x.dtype, self.split), batch)

    def lower(self, function: Any, *args: Any, **options: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return jitted(function).lower(*args, **options)

    def steps(
        self, name: str, make: Callable[..., Any], state: ja.TrainState, batch: Any
    ) -> Iterator[Program]:
        """A train step on the whole batch, and in two micro-batches."""
        for count in (1, 2):

            def lower(count: int = count) -> Any:
                step = make(micro_batches=count)
                return ja.compile_step(step, state, self.mesh).lower(state, batch)

            yield (f"{name}/step-{count}", lower)

    def sft(self) -> Iterator[Program]:
        model, tx, batch = self.model, self.adam, tokens_of(ROWS, LENGTH)
        state = self.state(self.params(model), tx)
        yield from self.steps("sft", functools.partial(sft.make_step, model, tx), state, batch)
        evaluate = ja.make_eval(sft.make_loss(model, sft.Config(log_entropy=True)))
        yield ("sft/eval", lambda: self.lower(evaluate, state, self.on_rows(batch)))
        make = functools.partial(sft.make_step, dataclasses.replace(model, remat="block"), tx)
        yield next(self.steps("sft_long", make, state, tokens_of(ROWS, LONG)))
        adapted = dataclasses.replace(model, lora=ja.LoraConfig(rank=4))
        adapters, base = parted(self.params(adapted))
        make, state = functools.partial(sft.make_step, adapted, tx), self.state(adapters, tx, base)
        yield from self.steps("sft_lora", make, state, batch)

    def reward(self) -> Iterator[Program]:
        for objective in reward.OBJECTIVES:
            names = ("helpful", "verbose") if objective == "regression" else ()
            scorer = ja.Scorer(self.model, names)
            options = reward.Config(objective=objective, attributes=names)
            state, batch = self.state(self.params(scorer), self.tx), reward_batch(objective, 2)
            make = functools.partial(reward.make_step, scorer, self.tx, options)
            yield from self.steps(f"reward_{objective}", make, state, batch)
            measure = reward.make_measure(scorer, options)
            args = (measure, state, self.on_rows(batch))
            yield (f"reward_{objective}/eval", functools.partial(self.lower, *args))

    def scorer(self) -> Iterator[Program]:
        scorer = ja.Scorer(self.model)
        params, tokens = self.params(scorer), self.on_rows(tokens_of(ROWS, LENGTH))
        score = ja.model_reward(scorer, params, shift=0.5, scale=2.0)
        yield ("scorer/model_reward", lambda: self.lower(score, params, tokens))
        pooled = jax.jit(lambda params, tokens: ja.pooled_scores(scorer, params, tokens, count=3))
        yield ("scorer/packed", lambda: self.lower(pooled, params, tokens))
        graded = ja.Scorer(self.model, ("helpful", "verbose"))
        grades = self.params(graded)

        def outputs(params: Any, tokens: ja.TokenBatch) -> jax.Array:
            hidden = graded.apply(params, tokens.inputs, tokens.positions, tokens.segment_ids)
            return graded.outputs(params, hidden)

        yield ("scorer/outputs", lambda: self.lower(jax.jit(outputs), grades, tokens))

    def dpo(self) -> Iterator[Program]:
        model, params = self.model, self.params(self.model)
        state = self.state(params, self.tx)
        for name, form, options in (
            ("dpo", "plain", dpo.Config()),
            ("dpo_ld_alpha", "plain", dpo.Config(ld_alpha=0.5)),
            ("dpo_shared_prefix", "shared_prefix", dpo.Config()),
            ("dpo_packed", "packed", dpo.Config()),
        ):
            batch = pair_batch(form)
            make = functools.partial(dpo.make_step, model, self.tx, options)
            yield from self.steps(name, make, state, batch)
            asked = self.on_rows(batch._replace(ref_chosen_logps=None, ref_rejected_logps=None))
            args = (dpo.make_prepare(model, options), params, asked)
            yield (f"{name}/prepare", functools.partial(self.lower, *args))
        evaluate, batch = ja.make_eval(dpo.make_loss(model)), self.on_rows(pair_batch("plain"))
        yield ("dpo/eval", lambda: self.lower(evaluate, state, batch))

    def kto(self) -> Iterator[Program]:
        model, params = self.model, self.params(self.model)
        state, tokens = self.state(params, self.tx), tokens_of(ROWS, LENGTH)
        row = array((ROWS,), jnp.float32)
        batch = ja.UnpairedBatch(tokens, array((ROWS,), jnp.bool_), tokens, row, row)
        make = functools.partial(kto.make_step, model, self.tx)
        yield from self.steps("kto", make, state, batch)
        prepare = kto.make_prepare(model)
        asked = self.on_rows(batch._replace(ref_logps=None, kl=None))
        # Before `prepare` had `lower`, the jitted function in it took the policy's parameters.
        policy = state if hasattr(prepare, "lower") else params
        yield ("kto/prepare", lambda: self.lower(prepare, policy, params, asked))

    def ppo(self) -> Iterator[Program]:
        model, policy = self.model, self.params(self.model)
        critic = ja.Scorer(model)
        own = self.params(critic)
        head = {"score": own["score"]}
        free = ppo.Config(
            advantage_estimator="grpo", samples=2, kl_in="loss", kl_estimator="k3",
            scale_rewards="group", loss_aggregation="sequence",
        )  # fmt: skip
        for name, judge, weights, options in (
            ("ppo_critic", critic, own, ppo.Config()),
            ("ppo_shared_critic", critic, head, ppo.Config(shared_critic=True, entropy_coef=0.01)),
            ("ppo_critic_free", None, None, free),
        ):
            tx = self.adam if name == "ppo_critic" else self.tx
            tx = ppo.make_optimizer(tx, None if judge is None else tx)
            state = self.state(ppo.init_params(policy, weights), tx)
            batch = rollout_batch(options)
            make = functools.partial(ppo.make_step, model, judge, tx, options)
            yield from self.steps(name, make, state, batch)
            experience = ppo.make_experience(model, judge, options)
            number, row = array((), jnp.float32, self.whole), array((ROWS,), jnp.float32)
            answers = (batch.tokens, row, batch.finished, batch.old_logprobs)
            args = (experience, state, policy, *self.on_rows(answers), number, number)
            yield (f"{name}/prepare", functools.partial(self.lower, *args))
            args = (ppo.rollout_metrics, self.on_rows(batch))
            metrics = functools.partial(self.lower, *args, samples=options.samples)
            yield (f"{name}/metrics", metrics)

    def sampling(self) -> Iterator[Program]:
        """What `ja.sample` runs: slots, prompts, answers, their ends; then rows made of them."""
        model, params = self.model, self.params(self.model)
        number, scalar = array((), jnp.float32, self.whole), array((), jnp.int32, self.whole)
        stops, flag = array((2,), jnp.int32, self.whole), array((), jnp.bool_, self.whole)
        how = Sampling(number, scalar, number, stops, scalar)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=self.whole)
        kind = jnp.dtype(model.compute_dtype).name
        ids, mask = self.on_rows((array((ROWS, LONG), jnp.int32), array((ROWS, LONG), bool)))

        def empty(slots: int, samples: int) -> Any:
            limits = array((ROWS * samples,), jnp.int32, self.whole)
            return self.lower(
                empty_slots, model, scalar, limits, slots=slots, prompt_length=LONG,
                max_new_tokens=NEW, cache_dtype=kind,
            )  # fmt: skip

        def prefill() -> Any:
            return self.lower(read_prompts, model, params, ids, mask, scalar, kind)

        def write(slots: int, samples: int) -> Any:
            state, read = shapes_of(empty(slots, samples)), shapes_of(prefill())
            args = (decode, model, params, state, read, key, how, flag)
            return self.lower(*args, samples=samples)

        yield ("sample/prefill", prefill)
        # A slot for every answer, and slots that are given away again.
        for name, slots, samples in (("all", ROWS, 1), ("queue", ROWS, 2)):
            yield (f"sample/slots-{name}", functools.partial(empty, slots, samples))
            yield (f"sample/decode-{name}", functools.partial(write, slots, samples))
        new, row = (ROWS, NEW), array((ROWS,), jnp.int32)
        answers = (array(new, jnp.int32), row)
        yield ("sample/ends", lambda: self.lower(end_of_answers, *answers, stops))
        prompts = ja.PromptBatch(ids, mask, self.on_rows(row))
        written = Generation(
            array(new, jnp.int32), array(new, jnp.float32), array(new, bool), array((ROWS,), bool)
        )
        join = jax.jit(ppo.join_tokens)
        yield ("sample/join", lambda: self.lower(join, prompts, self.on_rows(written)))

    def head(self) -> Iterator[Program]:
        """Log-probabilities and entropies of targets, and the gradient of both."""
        model, params = self.model, self.params(self.model)
        batch = self.on_rows(tokens_of(ROWS, LENGTH))
        heat = array((), jnp.float32, self.whole)

        def read(params: Any, batch: ja.TokenBatch, heat: Any, masked: bool) -> Any:
            hidden = model.apply(params, batch.inputs, batch.positions, batch.segment_ids)
            return ja.target_logprobs(
                model, params, hidden, batch.targets, heat, entropy=True,
                mask=batch.loss_mask if masked else None,
            )  # fmt: skip

        def loss(params: Any, batch: ja.TokenBatch, heat: Any) -> jax.Array:
            logprobs, entropy = read(params, batch, heat, True)
            return jnp.sum(logprobs) + jnp.sum(entropy)

        for name, masked in (("masked", True), ("whole", False)):
            run = jax.jit(functools.partial(read, masked=masked))
            yield (f"head/{name}", functools.partial(self.lower, run, params, batch, heat))
        gradient = jax.jit(jax.grad(loss))
        yield ("head/gradient", lambda: self.lower(gradient, params, batch, heat))

    def programs(self) -> Iterator[Program]:
        rooms = (self.sft, self.reward, self.scorer, self.dpo, self.kto, self.ppo)
        for room in (*rooms, self.sampling, self.head):
            yield from room()


def parted(node: Any) -> tuple[Any, Any]:
    """(adapters, the rest) of a tree of parameters."""
    adapters, base = {}, {}
    for name, value in node.items():
        if isinstance(value, dict):
            inside, outside = parted(value)
            adapters |= {name: inside} if inside else {}
            base |= {name: outside} if outside else {}
        else:
            (adapters if name.startswith("lora_") else base)[name] = value
    return adapters, base


def shapes_of(lowered: Any) -> Any:
    """What a program gives, as arguments of the next; their layout is left to the compiler."""
    return jax.tree.map(lambda info: array(info.shape, info.dtype), lowered.out_info)


def text_of(lowered: Any) -> str:
    """The StableHLO text with numbered functions: what a nested one is called is no difference."""
    text = re.sub(r"^module @\S+", "module @program", lowered.as_text(), count=1, flags=re.M)
    names = re.findall(r"func\.func (?:public |private )?@([\w.$-]+)", text)
    numbers: dict[str, str] = {}
    for name in re.findall(r"@([\w.$-]+)", text):
        if name in names and name != "main":
            numbers.setdefault(name, f"f{len(numbers)}")
    return re.sub(r"@([\w.$-]+)", lambda found: "@" + numbers.get(found[1], found[1]), text)


def wanted(name: str, pattern: str | None) -> bool:
    return pattern is None or pattern in name or fnmatch.fnmatchcase(name, pattern)


def keep(file: pathlib.Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")


def place_of(name: str) -> str:
    return name.partition("/")[0]


def places() -> Iterator[tuple[str, Mesh | None, str]]:
    """(name, mesh or None, why there is none)."""
    for name, topology in PLACES.items():
        try:
            devices = find_devices(topology)
        except ValueError as error:
            yield name, None, str(error)
        else:
            size = 1 if len(devices) == 1 else 2
            yield name, ja.make_mesh(size, size, size, devices), ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="write the hashes to this file")
    parser.add_argument("--against", type=pathlib.Path, help="compare with the hashes of this file")
    parser.add_argument("--texts", type=pathlib.Path, help="keep the texts in this folder")
    parser.add_argument("--only", help="names to look at: a pattern, or a part of them")
    given = parser.parse_args()
    # Kernels carry their own code in the text, and in it the lines of Python that made them.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    before = {} if given.against is None else json.loads(given.against.read_text("utf-8"))
    # Tracing makes much garbage and keeps most: to look for it all the time takes a fifth longer.
    gc.disable()
    hashes: dict[str, str] = {}
    failed: list[str] = []
    left_out: list[str] = []
    for place, mesh, why in places():
        if mesh is None:
            print(f"left out: {place}: {why}", flush=True)
            left_out.append(place)
            continue
        began, count = time.perf_counter(), len(hashes)
        for model, shape in MODELS.items():
            gc.collect()
            for program, lower in Case(shape, mesh).programs():
                name = f"{place}/{model}/{program}"
                listed = not shape or any(fnmatch.fnmatchcase(program, x) for x in SOME)
                if not listed or not wanted(name, given.only):
                    continue
                try:
                    text = text_of(lower())
                except Exception as error:  # the others are wanted all the same
                    failed.append(name)
                    print(f"failed: {name}: {type(error).__name__}: {error}", flush=True)
                    continue
                hashes[name] = hashlib.sha256(text.encode()).hexdigest()
                if given.texts is not None:
                    keep(given.texts / f"{name}.mlir", text)
        seconds = time.perf_counter() - began
        print(f"{place}: {len(hashes) - count} programs in {seconds:.0f} s", flush=True)
    if given.out is not None:
        keep(given.out, json.dumps(hashes, indent=1, sort_keys=True) + "\n")
    if given.against is None:
        return int(bool(failed))
    known = {x: before[x] for x in before if wanted(x, given.only) and place_of(x) not in left_out}
    lists = {
        "new": sorted(hashes.keys() - known.keys()),
        "gone": sorted(known.keys() - hashes.keys() - set(failed)),
        "changed": sorted(x for x in hashes.keys() & known.keys() if hashes[x] != known[x]),
    }
    for what, names in lists.items():
        for name in names:
            print(f"{what}: {name}")
    same = len(hashes) - len(lists["new"]) - len(lists["changed"])
    counts = ", ".join(f"{len(names)} {what}" for what, names in lists.items())
    print(f"{same} the same, {counts}, {len(failed)} failed, {len(left_out)} places left out")
    return 1 if lists["changed"] or failed else 0


if __name__ == "__main__":
    sys.exit(main())
