"""Two processes with 4 devices each train like one with 8, and stop together when one is lost."""

import json
import pathlib
import shutil
import signal
import socket
import time

import chatmodel
import jax
import multihost
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jaxalign.hf import load_pretrained, load_tokenizer
from jaxalign.hf.gguf_write import save_gguf
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge

pytestmark = pytest.mark.usefixtures("kept_programs")

SPREAD = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
HOST = socket.gethostname()


def configured(algorithm, models, folder, changes=None, **run):
    """A YAML file of a tiny run, over hosts (data) and within them (fsdp, tensor)."""
    values = chatmodel.settings(algorithm, models, folder, **run)
    path = pathlib.Path(f"{folder}.yaml")
    path.write_text(yaml.safe_dump(merge(merge(values, SPREAD), changes or {})), encoding="utf-8")
    return path


def same_metrics(one, two):
    assert len(one) == len(two)
    for ours, theirs in zip(chatmodel.timeless(one), chatmodel.timeless(two), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def same_weights(one, two):
    ours, theirs = (load_file(pathlib.Path(folder) / "model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-5)


PROGRAM = """
import os, sys
from jaxalign.parallel import distributed
from jaxalign.parallel.distributed import collectives
distributed.start()
import jax, numpy as np
import jaxalign
from jaxalign.parallel.sharding import all_gather_rows, part_of_rows
from jaxalign.parallel.jax_private import count_compiled

me = jax.process_index()
mesh = jaxalign.make_mesh(2, 4, dcn={"fsdp": 2})
print("HOSTS", [[device.process_index for device in row] for row in mesh.devices[..., 0]])
print("PARTS", *[part_of_rows(jaxalign.make_mesh(*sizes)) for sizes in ((2, 2, 2), (1, 1, 8))])
for sizes in ((2, 2, 2), (1, 8, 1), (1, 1, 8)):
    mesh = jaxalign.make_mesh(*sizes)
    index, count = part_of_rows(mesh)
    every = np.arange(16.0).reshape(8, 2)
    mine = every[index * 8 // count : (index + 1) * 8 // count]
    batch = jaxalign.shard_batch({"x": mine}, mesh)
    assert batch["x"].shape == (8, 2), batch["x"].shape
    assert not batch["x"].is_fully_addressable
    assert (jaxalign.local_rows(batch)["x"] == mine).all()
    assert (all_gather_rows(batch)["x"] == every).all()
    turned = jaxalign.shard_batch(jax.jit(lambda x: x[::-1])(batch["x"]), mesh)
    expected = every[::-1][index * 8 // count : (index + 1) * 8 // count]
    assert (jaxalign.local_rows(turned, mesh) == expected).all()

import chatmodel
from jaxalign.types import PromptBatch, TokenBatch
mesh, yes, no = jaxalign.make_mesh(2, 2, 2), np.ones((4, 4), bool), np.zeros((4, 4), bool)
ids = np.full((4, 4), 70 + 4 * me, np.int32) + np.arange(4, dtype=np.int32)[:, None]
rows = TokenBatch(ids, ids, ids, ids, yes), PromptBatch(ids, no, ids[:, 0])
rows = jaxalign.shard_batch(rows, mesh)
heard = []
tok = chatmodel.make_tokenizer()
reward = jaxalign.text_reward(lambda prompt, answer: heard.append(answer) or me, tok)
assert (reward(*rows) == np.full(4, me)).all()
assert heard == [tok.decode(row) for row in ids], heard
print("SUMS", distributed.all_reduce_sum([me + 1, 2**31 - 1])())
distributed.all_reduce_sum([me, 1])()
assert count_compiled(collectives._all_gather()[1]) == 1  # every step calls it
try:
    distributed.check_consistent("the configuration", {"data.rows": 8 + me})
except ValueError as error:
    print("DIFFER", error)
from jaxalign.parallel.distributed.service import client
if me == 0:  # arrives only after the other has timed out
    client().blocking_key_value_get("test/given-up", 900_000)
try:
    distributed.barrier("slow", timeout=1)
    print("LATE", None)
except (TimeoutError, jax.errors.JaxRuntimeError) as error:
    print("LATE", type(error).__name__, error)
if me == 1:
    client().key_value_set("test/given-up", "")

from jaxalign.hf import load_pretrained, save, save_pretrained
model, params = load_pretrained(os.environ["SAVED"], mesh=mesh)
written, Writer = [], save.Writer
class Watched(Writer):
    def __init__(self, folder, file, pool):
        if "failing" in str(folder) and me == 1:
            raise OSError("disk full")
        written.append(file.name)
        super().__init__(folder, file, pool)
save.Writer = Watched
save_pretrained(model, params, os.environ["SAVE_TO"] + "/out", max_shard_bytes=9000)
print("WROTE", *written)
try:
    save_pretrained(model, params, os.environ["SAVE_TO"] + "/failing", max_shard_bytes=9000)
except (OSError, RuntimeError) as error:
    print("FAILED", error)
save.Writer = Writer

from jaxalign.run.export_as import ExportOptions, export
options = ExportOptions(("hf", "gguf", "orbax"), gguf_dtype="F32")
done = export(os.environ["SAVED"], os.environ["SAVE_TO"] + "-as", options)
print("CHECKED", *(note["verified"]["jaxalign"] for note in done.notes.values()))

from jaxalign.commands import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def check_saved(logs, source, place):
    """Both processes wrote their files of one folder; the failed folder is gone."""
    assert "FAILED saving a model failed on process 1" in logs[0]
    assert "FAILED disk full" in logs[1]
    (one,), (other,) = (
        [line.split()[1:] for line in text.splitlines() if line.startswith("WROTE")]
        for text in logs
    )
    assert one
    assert other
    files = sorted(path.name for path in (place / "out").glob("*.safetensors"))
    assert sorted(one + other) == files
    assert len(files) > 2
    assert [path.name for path in place.iterdir()] == ["out"]
    again = {}
    for name in files:
        again |= load_file(place / "out" / name)
    stored = load_file(source / "model.safetensors")
    assert again.keys() == stored.keys()
    for name, value in stored.items():
        assert again[name].tobytes() == value.tobytes(), name
    assert (place / "out/config.json").is_file()


def check_exported(logs, source, place, alone):
    """Formats that two processes wrote hold what one writes, and both processes compared them."""
    for text in logs:
        (line,) = (line for line in text.splitlines() if line.startswith("CHECKED"))
        assert line.count("'rejected': False") == 3, line
    assert sorted(path.name for path in place.iterdir()) == ["export.json", "gguf", "hf", "orbax"]
    model, params = load_pretrained(source)
    tok = load_tokenizer(source)
    save_gguf(model, params, alone / "model.gguf", tokenizer=tok, dtype="F32", name="chat")
    written = (place / "gguf/model-F32.gguf").read_bytes()
    assert written == (alone / "model.gguf").read_bytes()
    for name in ("hf", "orbax"):
        _, again = load_pretrained(place / name)
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_two_processes_equal_one(chat_models, tmp_path):
    """Rows, sums, files and errors between two processes; then SFT equals SFT in one process."""
    changes = {"data": {"packing": True, "length": 96, "rows": 4}}
    config = configured("sft", chat_models, tmp_path / "two", changes, steps=2, export=False)
    log = tmp_path / "log"
    source, place = chat_models / "chat", tmp_path / "saved"
    running = multihost.start(
        ["sft", config], 2, log, program=("-c", PROGRAM), SAVED=str(source), SAVE_TO=str(place)
    )
    alone = load_config("sft", config, [f"run.folder={tmp_path / 'one'}"])
    one = loop.train(alone)
    statuses, logs = multihost.finish(running, log)
    assert statuses == [0, 0], logs
    check_saved(logs, source, place)
    check_exported(logs, source, tmp_path / "saved-as", tmp_path)

    for index, text in enumerate(logs):
        assert f"PARTS ({index}, 2) (0, 1)\n" in text
        assert "HOSTS [[0, 0, 1, 1], [0, 0, 1, 1]]" in text
        assert "SUMS [3, 4294967294]\n" in text
        assert "DIFFER the configuration must be the same on all hosts: data.rows is 9 on" in text
        assert f"process 1 ({HOST}, pid {running[1].pid}) and 8 on process 0 (" in text
    assert f"LATE TimeoutError slow: process 0 ({HOST}, pid" in logs[1]
    # Only process 0 logs.
    assert "run folder:" in logs[0]
    assert "run folder:" not in logs[1]
    same_metrics(chatmodel.lines(tmp_path / "two"), chatmodel.lines(one.folder))
    versions = json.loads((tmp_path / "two/versions.json").read_text(encoding="utf-8"))
    assert versions["processes"] == "2"
    assert versions["devices"].startswith("8 ×")


# --- slow ----------------------------------------------------------------------------------------


def stages(models, folder):
    """All algorithms in one pipeline: packed, with held-out data, checkpoints and exports."""
    made = []
    for algorithm in ("sft", "reward", "dpo", "kto", "ppo"):
        values = chatmodel.settings(algorithm, models, folder / algorithm)
        rows = chatmodel.ROWS[algorithm][:9]
        changes = SPREAD | {
            "data": {"eval": [chatmodel.write_rows(folder / f"held-{algorithm}.jsonl", rows)]},
            "run": {"save_every": 2, "eval_every": 2, "seed": 1},
        }
        if algorithm in ("sft", "reward", "dpo"):
            changes["data"] |= {"packing": True, "length": 96}
        if algorithm == "ppo":
            changes["data"]["rows"] = 16
            changes |= {"minibatches": 2, "ppo_epochs": 2}
            # With a smaller eps, Adam turns rounding errors near 1e-8 into full steps.
            changes["optimizer"] = {"eps": 1e-5}
            # Frozen models on separate devices of both hosts;
            # rollout with replicated weights and a cache sharded along time.
            changes["mesh"] = {
                "data": 2,
                "fsdp": 2,
                "apart": {"reference": 2, "reward": 2},
                "rules_of": {"rollout": {"embed": None, "cache_length": "fsdp", "rows": "data"}},
            }
        values = merge(values, changes)
        del values["run"]["folder"]
        made.append({"name": algorithm, "algorithm": algorithm} | values)
    return made


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_algorithm_equals_one_process(chat_models, tmp_path):
    """The same YAML and command: losses, rewards, KL, held-out figures and exported weights."""
    path = tmp_path / "all.yaml"
    values = {"folder": str(tmp_path / "none"), "stages": stages(chat_models, tmp_path)}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    for processes in (2, 1):
        log, folder = tmp_path / f"log{processes}", tmp_path / str(processes)
        running = multihost.start(["pipeline", path, f"folder={folder}"], processes, log)
        statuses, logs = multihost.finish(running, log, 900)
        assert statuses == [0] * processes, logs
    for stage in values["stages"]:
        one, two = (tmp_path / number / stage["name"] for number in ("1", "2"))
        rows = chatmodel.lines(two)
        assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
        same_metrics(rows, chatmodel.lines(one))
        same_weights(one / "model", two / "model")
        assert not list(two.glob(".*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_stops_the_other_and_both_resume(chat_models, tmp_path, victim):
    folder, log = tmp_path / "run", tmp_path / "log"
    config = configured(
        "sft", chat_models, folder, steps=1_000_000, save_every=2, export=False, log_every=1_000_000
    )
    running = multihost.start(["sft", config], 2, log)
    while not (folder / "checkpoints/4").exists():
        assert all(process.poll() is None for process in running), multihost.finish(running, log)
        time.sleep(0.1)
    running[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    status = running[1 - victim].wait(600)
    took = time.monotonic() - killed
    _, logs = multihost.finish(running, log)
    print(f"process {1 - victim} ended {took:.1f} s after process {victim} was killed, {status}")
    assert status != 0
    assert f"process {victim} ({HOST}, pid {running[victim].pid}) is lost" in logs[1 - victim]

    shutil.copytree(folder, tmp_path / "copy")
    there = [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()]
    steps = max(there) + 2
    ends = [f"run.steps={steps}", "run.resume=true"]
    log = tmp_path / "log2"
    two = multihost.start(["sft", config, *ends], 2, log)
    statuses, logs = multihost.finish(two, log)
    assert statuses == [0, 0], logs
    again = load_config("sft", config, [*ends, f"run.folder={tmp_path / 'copy'}"])
    one = loop.train(again)
    assert [row["step"] for row in chatmodel.lines(one.folder)] == list(range(1, steps + 1))
    whole = loop.train(
        load_config("sft", config, [f"run.folder={tmp_path / 'whole'}", f"run.steps={steps}"])
    )
    same_metrics(chatmodel.lines(folder), chatmodel.lines(whole.folder))
    same_metrics(chatmodel.lines(one.folder), chatmodel.lines(whole.folder))


FAILING = """
import sys
import jax
from jaxalign.commands import cli
from jaxalign.run import reporter
check = reporter.check_finite
def fail(metrics, step):
    if jax.process_index() == 1 and step == 2:
        raise FloatingPointError("step 2: loss=nan")
    check(metrics, step)
reporter.check_finite = fail
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_failing_host_stops_all_with_its_message(chat_models, tmp_path):
    config = configured("sft", chat_models, tmp_path / "run", steps=1_000_000, save_every=1)
    log = tmp_path / "log"
    running = multihost.start(["sft", config], 2, log, program=("-c", FAILING))
    statuses, logs = multihost.finish(running, log)
    assert statuses == [1, 2]
    failed = f"process 1 ({HOST}, pid {running[1].pid}) failed"
    assert f"{failed}: FloatingPointError: step 2: loss=nan" in logs[0]
    assert "jaxalign sft: error: step 2: loss=nan" in logs[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_hosts_with_different_data_are_refused(chat_models, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        chatmodel.write_rows(folder / "data.jsonl", chatmodel.CONVERSATIONS[number:])
    changes = {"data": {"train": ["data.jsonl"]}}
    config = configured("sft", chat_models, tmp_path / "run", changes)
    running = multihost.start(["sft", config], 2, tmp_path / "log", folders=folders)
    statuses, logs = multihost.finish(running, tmp_path / "log")
    assert 0 not in statuses
    for text in logs:
        assert "the data (by its checksum) must be the same on all hosts: data.train is" in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_preempted_run_saves_and_resumes(chat_models, tmp_path, number):
    folder, log = tmp_path / "run", tmp_path / "log"
    config = configured("sft", chat_models, folder, steps=1_000_000, export=False)
    running = multihost.start(["sft", config], 2, log)
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text(encoding="utf-8").count("\n") < 2:
        assert all(process.poll() is None for process in running), multihost.finish(running, log)
        time.sleep(0.2)
    running[1].send_signal(number)  # one host gets the signal; all stop after the same step
    statuses, logs = multihost.finish(running, log)
    assert statuses == [75, 75], logs
    done = len(chatmodel.lines(folder))
    assert f"stopped after step {done} of 1000000" in logs[0]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [str(done)]
