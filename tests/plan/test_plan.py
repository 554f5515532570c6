"""Plans: memory counted by hand and by the compiler, from `config.json` alone."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import chatmodel
import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.algorithms.moving_reference import MovingReferenceState
from jaxalign.commands import cli
from jaxalign.parallel.host_memory import HOST
from jaxalign.parallel.mesh import make_mesh
from jaxalign.plan import find_devices, make_plan, parse_topology, resident_bytes, topology
from jaxalign.plan.loader import HostArray
from jaxalign.plan.make import frozen_models, run_shapes
from jaxalign.plan.programs import device_bytes
from jaxalign.plan.topology import nearest_mesh, next_that_holds
from jaxalign.run.config.runs import load_config
from jaxalign.run.tasks import ALGORITHMS

pytestmark = pytest.mark.usefixtures("kept_programs")

# Parameters of `chatmodel.DECODER` (V 260, D 32, F 48, L 2, H·hd 32, K·hd 16) on one of 8 devices:
# whatever has the axis "embed" is cut in 8, the norms are whole.
EMBEDDING = 260 * 32 // 8
BLOCKS = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) // 8
NORMS = 5 * 32
PARAMS = 4 * (2 * EMBEDDING + BLOCKS + NORMS)  # with the output head
SCORER = 4 * (EMBEDDING + BLOCKS + NORMS + 32 // 8)
# A device has 1 of 8 rows of 32 tokens: four int32 and a bool a token.
TOKENS = 32 * (4 * 4 + 1)
# 32 + 6 − 1 columns: four int32, seven float32, two masks; score, rewards but for it, temperature
# and two flags a row, and of the reward that was added up its score and whether it applies. Of the
# 6 + 1 columns that an update reads, the numbers.
ROLLOUT = 37 * ((4 + 7) * 4 + 2) + 3 * 4 + 2 + 4 + 1 + 7 * 4

PROGRAMS = {
    "sft": ["update"],
    "reward": ["update"],
    "dpo": ["reference", "update"],
    "ppo": ["prefill", "decode", "score", "experience", "update"],
}
# One row of 32 tokens on a device. Weights: a product forward, two backward; attention: two
# forward, five backward (the scores are formed again); the head: all three forward.
SFT_FLOPS = (
    3 * 2 * 32 * 8 * BLOCKS
    + 2 * 7 * 2 * 32 * 32 * 32
    + 3 * 2 * 32 * 32 * 260
)  # fmt: skip


@pytest.fixture(scope="module")
def shapes(chat_models, tmp_path_factory):
    """The tiny models without weights and tokenizer."""
    folder = tmp_path_factory.mktemp("shapes")
    for name in ("chat", "scorer"):
        (folder / name).mkdir()
        shutil.copy(chat_models / name / "config.json", folder / name)
    return folder


def config(algorithm, shapes, tmp_path, *overrides):
    values = chatmodel.settings(algorithm, shapes, tmp_path / "run")
    values["data"]["train"] = ["absent.jsonl"]
    return load_config(algorithm, values, overrides)


def adam(params, trees=1):
    """Two moments, and the updates counted by Adam and by the schedule, for each optimizer."""
    return 2 * params + trees * 2 * 4


@pytest.mark.parametrize(
    ("algorithm", "params", "optimizer", "batch", "models"),
    [
        ("sft", PARAMS, adam(PARAMS), TOKENS, 0),
        ("reward", SCORER, adam(SCORER), 2 * TOKENS, 0),
        ("dpo", PARAMS, adam(PARAMS), 2 * (TOKENS + 4), PARAMS),
        # the rollout, and one mini-batch of it: here as much again
        ("ppo", PARAMS + SCORER, adam(PARAMS + SCORER, 2), 2 * ROLLOUT, PARAMS + SCORER),
    ],
)
def test_bytes_by_hand(algorithm, params, optimizer, batch, models, shapes, tmp_path):
    plan = make_plan(algorithm, config(algorithm, shapes, tmp_path), "cpu:8", storage=2e9)
    assert plan.mesh == {"data": 1, "fsdp": 8, "tensor": 1}
    assert plan.devices == "8 × cpu"
    assert (plan.params, plan.frozen, plan.optimizer) == (params, 0, optimizer)
    assert (plan.batch, plan.models) == (batch, models)
    # Gradients at the least live as long as the step.
    assert plan.temporary > params
    assert 0 <= plan.other < 4096
    parts = plan.params + plan.optimizer + plan.batch + plan.models + plan.temporary + plan.other
    assert plan.total == parts + plan.cache
    assert (plan.peak, plan.cache) == ("update", 0)
    names = [program.name for program in plan.programs]
    assert names == PROGRAMS[algorithm]
    saved = plan.checkpoint
    if algorithm == "sft":
        # Whole weights, both moments, the counters of Adam, of the schedule and of the steps.
        whole = 4 * (2 * 260 * 32 + 8 * BLOCKS + NORMS)
        assert saved.bytes == 3 * whole + 3 * 4
        assert (saved.hosts, saved.bandwidth) == (1, 2e9)
        assert saved.seconds == saved.bytes / 2e9
        assert plan.costs.flops == pytest.approx(SFT_FLOPS, rel=0.02)
        # FSDP: every weight that is cut is gathered at least once forward and once backward.
        assert plan.costs.inner > 2 * 7 * 4 * (EMBEDDING + BLOCKS)
    if algorithm == "ppo":
        held = {program.name: program.cache for program in plan.programs}
        # Keys and values, 2 layers of 2 heads of 8, float32; a segment and a position a column.
        column = 2 * 2 * 2 * 8 * 4
        assert held["decode"] >= (32 + 6) * column + 32 * column
        assert held["prefill"] >= 32 * column
    assert plan.compile_seconds > 0


def test_adapters_freeze_the_base_and_are_the_reference(shapes, tmp_path):
    given = ["model.lora.rank=2", "model.lora.targets=[query]", "model.dtype=bfloat16"]
    plan = make_plan("dpo", config("dpo", shapes, tmp_path, *given), "cpu:8")
    # A [L, D, r] is cut along D, B [L, r, H·hd] is whole; float32 whatever the base is.
    adapters = 4 * (2 * 32 * 2 // 8 + 2 * 2 * 32)
    assert (plan.params, plan.frozen, plan.models) == (adapters, PARAMS // 2, 0)
    assert plan.optimizer == adam(adapters)


@pytest.mark.parametrize(
    ("overrides", "held"),
    [
        ((), PARAMS),
        (("reference_cache=cache",), 0),
        (("dpo.loss_type=simpo",), 0),
        (("reference_sync={every: 8}",), 0),
    ],
)
def test_what_a_reference_takes(overrides, held, shapes, tmp_path):
    """Parts only, nothing compiled: a reference that follows lies in the optimizer's state."""
    run = config("dpo", shapes, tmp_path, *overrides)
    state, parts = run_shapes("dpo", run, make_mesh(1, 8, 1))
    assert device_bytes(frozen_models(state, parts)) == held
    assert isinstance(state.opt_state, MovingReferenceState) == (run.reference_sync is not None)
    assert (parts.prepare is not None) == run.dpo.has_reference
    if parts.prepare is not None:
        ready = parts.prepare.shapes(ALGORITHMS["dpo"].shapes(run))
        assert ready.ref_chosen_logps.shape == (8,)


@pytest.mark.parametrize(
    ("algorithm", "overrides", "away", "held"),
    [
        ("dpo", (), PARAMS, 0),
        ("ppo", (), PARAMS + SCORER, 0),
        # The base of the adapters is the reference: the policy needs it, it is there once.
        ("ppo", ("model.lora.rank=2", "ppo.advantage_estimator=rloo", "ppo.samples=2"), SCORER, 0),
    ],
)
def test_frozen_models_in_host_memory(algorithm, overrides, away, held, shapes, tmp_path):
    """Parts only, nothing compiled."""
    run = config(algorithm, shapes, tmp_path, "offload_frozen=true", *overrides)
    state, parts = run_shapes(algorithm, run, make_mesh(1, 8, 1))
    frozen = frozen_models(state, parts)
    assert device_bytes(frozen, host=True) == away
    assert device_bytes(frozen) == held
    assert resident_bytes(state, parts)["models"] == held


def test_policy_and_critic_of_adapters_take_one_base(shapes, tmp_path):
    """Parts only, nothing compiled: the reference is the same base."""
    given = ("model.lora.rank=2", "model.lora.targets=[query]", "critic=adapter")
    run = config("ppo", shapes, tmp_path, *given)
    state, parts = run_shapes("ppo", run, make_mesh(1, 8, 1))
    adapters = 4 * (2 * 32 * 2 // 8 + 2 * 2 * 32)
    sizes = resident_bytes(state, parts)
    assert (sizes["frozen"], sizes["params"]) == (PARAMS, 2 * adapters + 4 * 32 // 8)
    assert sizes["models"] == SCORER  # the reward model alone


def test_what_is_away_counts_as_away_for_compilers_without_host_memory():
    """Those of GPUs, ahead of time, drop the kind of memory from the sharding."""
    sharding = NamedSharding(make_mesh(1, 8, 1), PartitionSpec("fsdp"))
    assert sharding.memory_kind != HOST
    away = HostArray((16, 4), jnp.float32, sharding=sharding)
    here = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)
    assert device_bytes((away, here)) == 2 * 4 * 4
    assert device_bytes((away, here, here), host=True) == 2 * 4 * 4
    # What such a compiler takes for an argument on the device is not known to lie there.
    lowered = jax.jit(lambda x: x + 1).lower(away)
    assert lowered.compile().memory_analysis().argument_size_in_bytes == 2 * 4 * 4


def test_kto_by_hand(shapes, tmp_path):
    plan = make_plan("kto", config("kto", shapes, tmp_path), "cpu:8")
    assert (plan.params, plan.optimizer, plan.models) == (PARAMS, adam(PARAMS), PARAMS)
    # A row on each device: its answer, that of another row, a mark, log π_ref and the KL.
    assert plan.batch == 2 * TOKENS + 1 + 4 + 4


def test_mesh_and_length_change_the_plan(shapes, tmp_path):
    small = make_plan("sft", config("sft", shapes, tmp_path), "cpu:8")
    given = ["mesh.data=8", "mesh.fsdp=1", "data.length=64"]
    large = make_plan("sft", config("sft", shapes, tmp_path, *given), "cpu:8")
    assert large.params == 4 * (8 * 2 * EMBEDDING + 8 * BLOCKS + NORMS)
    assert large.batch == 2 * small.batch
    assert large.temporary > small.temporary


def test_the_command(shapes, tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(chatmodel.settings("sft", shapes, tmp_path / "run")))
    # Overrides may stand on either side of an option.
    command = ["plan", "sft", str(path), "data.rows=16", "--topology", "cpu:8"]
    assert cli.main([*command, "data.length=16", "--json", "--storage-gbps", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["checkpoint"]["seconds"] == told["checkpoint"]["bytes"] / 5e8
    assert (told["params"], told["batch"]) == (PARAMS, TOKENS)
    assert cli.main(command[:3]) == 0
    told = capsys.readouterr().out
    assert told.startswith("sft step on 8 × cpu, mesh data=1 × fsdp=8 × tensor=1; on each device:")
    assert f"params         {PARAMS / 1024:.1f} KiB" in told
    assert "s to write and as much to restore at 1 GB/s of each of 1 host" in told
    assert cli.main([*command, "--storage-gbps", "0"]) == 2
    assert "storage bandwidth 0 bytes/s: wanted a positive number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["--wrong", "-x"])
def test_an_unknown_option_is_no_override(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "sft", "x.yaml", "--json", text])
    assert f"unrecognized arguments: {text}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpu:9", "8 CPU devices.*XLA_FLAGS=--xla_force_host_platform_device_count=9"),
        ("cpu:0", "wanted one such as"),
        ("v5e", "no such devices; wanted one such as"),
        ("gpu:8", "nearest kind is cpu; wanted one such as"),
        ("v5p-100", "named by TensorCores.*nearest are v5p-64 and v5p-128"),
        ("v6e-48", "named by chips.*nearest are v6e-32 and v6e-64"),
        ("v5p:4x4", "slices of v5p are shaped 2x2x1, "),
        ("h100:16", "a node has 8 GPUs; the nearest is h100:8x2"),
        ("h100-80g:8", "nearest kind is"),
    ],
)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        find_devices(name)


@pytest.mark.parametrize(
    ("name", "shape", "devices"),
    [
        ("v4-8", (2, 2, 1), 4), ("v5e-16", (4, 4), 16), ("v5p-8", (2, 2, 1), 4),
        ("v5p-128", (4, 4, 4), 64), ("v5p-4096", (8, 16, 16), 2048), ("v6e-256", (16, 16), 256),
        ("v5e-16x2", (4, 4), 32), ("v5e:2x4", (2, 4), 8), ("h100:8", (1, 8), 8),
        ("h100:8x16", (16, 8), 128), ("a100-80g:4", (1, 4), 4), ("cpu:8", (8,), 8),
    ],
)  # fmt: skip
def test_names_of_topologies(name, shape, devices):
    named = parse_topology(name)
    assert (named.shape, named.devices) == (shape, devices)


def test_the_nearest_that_would_do():
    assert next_that_holds(parse_topology("v5p-8"), 9) == "v5p-32"
    assert next_that_holds(parse_topology("v5e-16"), 300) is None
    assert next_that_holds(parse_topology("h100:4"), 7) == "h100:8"
    assert next_that_holds(parse_topology("h100:8"), 20) == "h100:8x4"
    assert nearest_mesh(1, -1, 3, 8) == "data=1 × fsdp=2 × tensor=4"


@pytest.mark.parametrize(
    ("module", "name"), [("libtpu", "v5e-16"), ("jax_cuda12_plugin", "h100:8")]
)
def test_without_the_compiler(module, name, monkeypatch):
    find = importlib.util.find_spec
    gone = (module, "jax_cuda13_plugin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in gone else find(n))
    extra = "plan-tpu" if module == "libtpu" else "plan-gpu"
    with pytest.raises(ValueError, match=rf'pip install "jaxalign\[{extra}\]"'):
        find_devices(name)


REQUIRED = [
    "numpy>=2.0",
    'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"',
    'libtpu==0.0.42.*; extra == "tpu"',
    'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
    'jax-cuda12-plugin<=0.10.2,>=0.10.2; extra == "cuda12-local"',
    'jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda13"',
]


@pytest.fixture
def compilers(monkeypatch):
    """Sets which compilers are installed, by package; finding devices then gives the platform."""

    def install(**versions):
        versions = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(package):
            if package not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package]

        there = lambda module: module.replace("_", "-") in versions or None  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", there)
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", {"jax": REQUIRED}.get)
        monkeypatch.setattr(jax, "__version__", "0.10.2")
        for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        monkeypatch.setattr(topology, "_described", lambda name, platform, *_: platform)

    return install


def test_a_compiler_of_the_version_that_jax_wants_is_taken(compilers):
    compilers(libtpu="0.0.42.1", jax_cuda12_plugin="0.10.2", jax_cuda13_plugin="0.10.2+built.here")
    assert find_devices("v5p-8") == "tpu"
    assert find_devices("h100:8") == "cuda"


@pytest.mark.parametrize(
    ("name", "installed", "told"),
    [
        (
            "v5p-8",
            {"libtpu": "0.0.52"},
            "topology 'v5p-8': libtpu 0.0.52 is installed, JAX 0.10.2 wants libtpu ==0.0.42.*; "
            'pip install "libtpu==0.0.42.*"',
        ),
        (
            "h100:8",
            {"jax_cuda12_plugin": "0.12.0"},
            "topology 'h100:8': jax-cuda12-plugin 0.12.0 is installed, JAX 0.10.2 wants "
            "jax-cuda12-plugin <=0.10.2,>=0.10.2; "
            'pip install "jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2"',
        ),
        (
            "h100:8",
            {"jax_cuda13_plugin": "0.9.0"},
            "topology 'h100:8': jax-cuda13-plugin 0.9.0 is installed, JAX 0.10.2 wants "
            "jax-cuda13-plugin <=0.10.2,>=0.10.2; "
            'pip install "jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2"',
        ),
    ],
)
def test_a_compiler_of_another_version_is_refused(compilers, name, installed, told):
    compilers(**installed)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        find_devices(name)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("algorithm", "overrides", "message"),
    [
        ("sft", ["data.rows=12"], "data.rows=12: .*multiple of 8 rows, the nearest is 16"),
        ("sft", ["run.micro_batches=2"], "data.rows=8: .*multiple of 16 rows"),
        ("sft", ["model.source=absent/model.gguf"], "no such folder or .gguf file"),
        ("sft", ["mesh.tensor=3"], "does not divide the 8 devices.*nearest mesh for 8 is data=1"),
        ("ppo", ["data.packing=true"], "not packed"),
    ],
)
def test_wrong_configurations(algorithm, overrides, message, shapes, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_plan(algorithm, config(algorithm, shapes, tmp_path, *overrides), "cpu:8")


def test_models_in_the_wrong_place(shapes, tmp_path):
    chat, scorer = shapes / "chat", shapes / "scorer"
    with pytest.raises(ValueError, match="is a reward model; wanted a language model"):
        make_plan("sft", config("sft", shapes, tmp_path, f"model.source={scorer}"), "cpu:8")
    with pytest.raises(ValueError, match="without a score; wanted a reward model"):
        make_plan("ppo", config("ppo", shapes, tmp_path, f"reward_model={chat}"), "cpu:8")
    with pytest.raises(ValueError, match=r"reference=.* is a reward model"):
        make_plan("dpo", config("dpo", shapes, tmp_path, f"reference={scorer}"), "cpu:8")


# --- with the TPU compiler -----------------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (extra plan-tpu) is not installed"
)


def plan_apart(shapes, tmp_path, devices, *overrides):
    """The command in a process of its own: libtpu ends the process at the tests' XLA_FLAGS."""
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(chatmodel.settings("sft", shapes, tmp_path / "run")))
    command = [sys.executable, "-m", "jaxalign", "plan", "sft", str(path), *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [*command, "--devices", devices, "--json"],
        env=environment | {"TPU_SKIP_MDS_QUERY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_libtpu
def test_compiles_for_absent_tpus(shapes, tmp_path):
    done = plan_apart(shapes, tmp_path, "v5e:2x4")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["devices"] == "8 × TPU v5 lite"
    assert (told["params"], told["optimizer"]) == (PARAMS, adam(PARAMS))
    assert told["batch"] == TOKENS
    assert told["temporary"] > 0


@needs_libtpu
@pytest.mark.parametrize(
    ("devices", "overrides", "message"),
    [
        ("v5e:3x5", [], r"'v5e:3x5': slices of v5e are shaped|knows no such devices"),
        (
            "v5e:2x4",
            ["data.rows=8192", "data.length=8192"],
            r"update does not fit the device: |cannot fit",
        ),
    ],
)
def test_what_the_tpu_compiler_refuses(devices, overrides, message, shapes, tmp_path):
    done = plan_apart(shapes, tmp_path, devices, *overrides)
    assert done.returncode == 2
    assert re.search(message, done.stderr.splitlines()[-1])
