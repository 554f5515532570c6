"""Initialization, host collectives and heartbeats; threads stand in for processes.

`test_multihost.py` starts real ones.
"""

import collections
import socket
import threading
import time

import jax
import pytest

from jaxalign.parallel import distributed
from jaxalign.parallel.distributed import collectives, heartbeat, initialize, service
from jaxalign.run import record
from jaxalign.run.config import runs

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "JOB_COMPLETION_INDEX",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "MEGASCALE_NUM_SLICES",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NUM_NODES",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_MCA_orte_hnp_uri",
    "JAXALIGN_LOST_SECONDS",
    "JAXALIGN_JOIN_SECONDS",
)
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "0",
}
GIVEN = {
    "coordinator_address": "10.0.0.1:1234",
    "num_processes": 4,
    "process_id": 0,
    "cluster_detection_method": "deactivate",
}
TIMES = {"initialization_timeout": 600, "heartbeat_timeout_seconds": 75}


@pytest.fixture
def starts(monkeypatch):
    """Calls of `jax.distributed.initialize`, recorded but not made; clears the environment."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    return calls


def set_environment(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_one_process_does_not_initialize(starts, monkeypatch):
    distributed.start()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")  # takes precedence over a cluster
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    distributed.start()
    assert starts == []


def test_explicit_settings_override_the_cluster(starts, monkeypatch):
    set_environment(
        monkeypatch, EXPLICIT | {"SLURM_STEP_NUM_TASKS": "2", "TPU_WORKER_HOSTNAMES": "a,b"}
    )
    distributed.start()
    assert starts == [GIVEN | TIMES]


def test_indexed_job_sets_the_process_id(starts, monkeypatch):
    set_environment(monkeypatch, EXPLICIT | {"JOB_COMPLETION_INDEX": "3"})
    monkeypatch.delenv("JAX_PROCESS_ID")
    distributed.start()
    assert starts == [GIVEN | TIMES | {"process_id": 3}]


def test_timeouts_from_the_environment(starts, monkeypatch):
    values = {"JAXALIGN_LOST_SECONDS": "8", "JAXALIGN_JOIN_SECONDS": "20"}
    set_environment(monkeypatch, EXPLICIT | values)
    distributed.start()
    # The service is the fallback: its timeout is longer than the heartbeat's.
    times = {"initialization_timeout": 20, "heartbeat_timeout_seconds": 31}
    assert starts == [GIVEN | times]
    monkeypatch.setenv("JAXALIGN_JOIN_SECONDS", "0")
    with pytest.raises(ValueError, match="JAXALIGN_JOIN_SECONDS='0': wanted a positive"):
        distributed.start()


@pytest.mark.parametrize("absent", ["JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"])
def test_incomplete_settings_are_refused(starts, monkeypatch, absent):
    set_environment(monkeypatch, EXPLICIT)
    monkeypatch.delenv(absent)
    with pytest.raises(ValueError, match=f"{absent} is not"):
        distributed.start()
    assert starts == []


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_settings_that_are_not_numbers_are_refused(starts, monkeypatch, name):
    set_environment(monkeypatch, EXPLICIT | {name: "two"})
    with pytest.raises(ValueError, match=f"{name}='two': wanted a whole number"):
        distributed.start()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "4")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID=4: wanted 0 to 3"):
        distributed.start()
    assert starts == []


ALL_DEVICES = {"local_device_ids": []}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
MPI5 = MPI | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, {}),  # one device per task
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, ALL_DEVICES),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        (MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}, {}),
        (MPI5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, GIVEN | ALL_DEVICES | {"process_id": 3}),
        (
            MPI5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            GIVEN | {"process_id": 3, "local_device_ids": [1]},
        ),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, {}),
        ({"TPU_PROCESS_ADDRESSES": "host-0:8471,host-1:8471"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_clusters_are_detected(starts, monkeypatch, environment, joins):
    set_environment(monkeypatch, environment)
    distributed.start()
    assert starts == ([] if joins is None else [joins | TIMES])


def test_open_mpi_5_without_an_address_is_refused(starts, monkeypatch):
    set_environment(monkeypatch, MPI)
    with pytest.raises(ValueError, match=r"4 processes but says no address.*mpirun -x JAX_COORD"):
        distributed.start()
    assert starts == []


@pytest.mark.parametrize(
    ("metadata", "joins"),
    [
        ({"worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2"}, True),
        ({"worker-network-endpoints": "a:1:10.0.0.1"}, False),
        ({"tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
        ({"tpu-env": "MEGASCALE_NUM_SLICES: ''\n"}, False),
        ({}, False),  # no metadata server, as on Kaggle
    ],
)
def test_tpu_pods_are_detected_by_metadata(starts, monkeypatch, metadata, joins):
    monkeypatch.setattr(initialize, "on_cloud_tpu_vm", lambda: True)
    monkeypatch.setattr(initialize, "_metadata", lambda name: metadata.get(name, ""))
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    distributed.start()
    assert starts == ([TIMES] if joins else [])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the TPU is not used
    distributed.start()
    assert len(starts) == int(joins)


def test_second_start_does_nothing(starts, monkeypatch):
    set_environment(monkeypatch, EXPLICIT)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.start()
    assert starts == []


def test_only_the_first_process_writes(monkeypatch):
    assert distributed.is_main()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert not distributed.is_main()


# --- several -------------------------------------------------------------------------------------


class Store:
    """A key-value store with barriers, as JAX's service has, for threads."""

    def __init__(self, count, absent=0):
        """`absent` processes never reach a barrier; it times out once all others have."""
        self.count, self.absent, self.values, self.gone = count, absent, {}, False
        self.changed = threading.Condition()
        self.barriers = collections.defaultdict(lambda: threading.Barrier(count - absent))

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            self._check()
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, folder):
        with self.changed:
            self._check()
            return [(k, v) for k, v in self.values.items() if k.startswith(folder + "/")]

    def key_value_delete(self, folder):
        with self.changed:
            for key in [k for k in self.values if k.startswith(folder + "/")]:
                del self.values[key]

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(
                lambda: key in self.values or self.gone, milliseconds / 1000
            ):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            self._check()
            return self.values[key]

    def wait_at_barrier(self, name, milliseconds):
        with self.changed:
            barrier = self.barriers[name]
        barrier.wait()
        if self.absent:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    def break_down(self):
        with self.changed:
            self.gone = True
            self.changed.notify_all()

    def _check(self):
        if self.gone:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")


@pytest.fixture
def processes(monkeypatch):
    """Runs a function of the process index in one thread per process; returns results or errors."""
    mine = threading.local()

    class Counts:
        def __getitem__(self, name):
            return mine.used[name]

        def __setitem__(self, name, value):
            mine.used[name] = value

    def run(count, function, absent=0):
        store = Store(count, absent)
        announced = threading.Barrier(count)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: mine.index)
        monkeypatch.setattr(collectives, "_used", Counts())
        for module in (collectives, service, heartbeat):
            monkeypatch.setattr(module, "client", lambda: store)
        service.who.cache_clear()
        results = [None] * count

        def one(index):
            mine.index, mine.used = index, collections.Counter()
            try:
                service.announce()
                announced.wait()
                results[index] = function(index)
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run.store = store
        return results

    yield run
    service.who.cache_clear()


def test_all_gather_text_deletes_old_keys(processes):
    def talk_twice(index):
        first = distributed.all_gather_text("a/b", f"one {index}")
        return (
            first,
            distributed.all_gather_text("a/b", f"two {index}"),
            distributed.broadcast_random(),
        )

    results = processes(3, talk_twice)
    assert {number for *_, number in results} == {results[0][2]}
    for first, second, _ in results:
        assert first == ["one 0", "one 1", "one 2"]
        assert second == ["two 0", "two 1", "two 2"]
    kept = [key for key in processes.store.values if "/a b/" in key]
    assert kept
    assert all("/a b/2/" in key for key in kept)


def test_barrier_names_late_processes(processes):
    def come(index):
        if index != 1:
            distributed.barrier("reading", timeout=0.3)
        return "done"

    results = processes(3, come, absent=1)
    assert results[1] == "done"
    for late in (results[0], results[2]):
        assert isinstance(late, TimeoutError)
        assert f"reading: process 1 ({socket.gethostname()}, pid" in str(late)
        assert "did not come within 0.3 s" in str(late)


def test_failure_on_one_process_raises_on_all(processes):
    def write(index):
        with distributed.fail_together("writing"):
            if index == 1:
                raise OSError("disk full")

    ok, failed = processes(2, write)
    assert isinstance(failed, OSError)
    assert isinstance(ok, RuntimeError)
    assert str(ok).startswith("writing failed on process 1 (")
    assert str(ok).endswith("OSError: disk full")
    assert processes(2, lambda index: distributed.raise_on_all(None, "writing")) == [None, None]


def test_inconsistent_values_are_named_on_all(processes):
    def compare(index):
        facts = {"data.rows": 8 + (index == 2), "run.seed": 0} | ({"lora": 1} if index == 1 else {})
        distributed.check_consistent("the configuration", facts)

    for error in processes(3, compare):
        assert isinstance(error, ValueError)
        assert str(error).startswith(
            "the configuration must be the same on all hosts: lora is 1 on"
        )
        assert "lora is 1 on process 1 (" in str(error)
        assert "'missing' on process 0 (" in str(error)
        assert "data.rows is 9 on process 2 (" in str(error)
        assert "and 8 on process 0 (" in str(error)
        assert "seed" not in str(error)
    assert processes(2, lambda index: distributed.check_consistent("it", {"a": [1]})) == [
        None,
        None,
    ]


@pytest.mark.parametrize("differs", ["versions", "configuration", "nothing"])
def test_run_refuses_inconsistent_hosts(processes, monkeypatch, tmp_path, differs):
    def options(index):
        rows = 8 * (1 + index * (differs == "configuration"))
        values = {
            "model": {"source": "m"}, "data": {"train": ["d.jsonl"], "rows": rows, "length": 32},
            "run": {"folder": str(tmp_path), "steps": 1},
        }  # fmt: skip
        return runs.load_config("sft", values)

    def versions():
        return {"jax": f"0.1{jax.process_index() * (differs == 'versions')}"}

    monkeypatch.setattr(record, "versions", versions)
    found = processes(2, lambda index: record.check_hosts(tmp_path, options(index)))
    if differs == "nothing":
        assert found == [None, None]
        return
    start = {
        "versions": "package versions must be the same on all hosts: jax is '0.11' on process 1 (",
        "configuration": "the configuration must be the same on all hosts: data.rows is 16 on",
    }[differs]
    for error in found:
        assert isinstance(error, ValueError)
        assert str(error).startswith(start)


def test_flatten():
    values = {"data": {"rows": 8, "train": ["a"]}, "lora": None}
    flat = {"data.rows": 8, "data.train": ["a"], "lora": None}
    assert distributed.flatten(values) == flat


def test_unshared_folder_is_refused(processes, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxalign.parallel.distributed.consistency._NETWORK_FOLDER", 0.3)

    def check_own_folder(index):
        distributed.check_shared_folder(tmp_path / f"host{index}")

    for error in processes(2, check_own_folder):
        assert isinstance(error, ValueError)
        assert "is not seen by process 1 (" in str(error)
    shared = tmp_path / "shared"
    assert processes(2, lambda index: distributed.check_shared_folder(shared)) == [None, None]
    assert list(shared.iterdir()) == []


# --- heartbeats ----------------------------------------------------------------------------------


class Hosts:
    """Heartbeats of several processes over one store, and the message with which each stopped."""

    def __init__(self, count, patience, clock):
        self.store, self.clock = Store(count), clock
        self.messages = {}
        self.heartbeats = [
            heartbeat.Heartbeat(
                self.store, i, count, patience, lambda text, i=i: self.messages.setdefault(i, text)
            )
            for i in range(count)
        ]

    def wait(self, count):
        while len(self.messages) < count:
            time.sleep(0.01)

    def pass_time(self, seconds, *alive):
        """Advances the clock, and waits until each of `alive` has sent a heartbeat or stopped."""

        def beats():
            return [self.store.values.get(f"jaxalign/beat/{index}") for index in alive]

        before = beats()
        self.clock.now += seconds
        while any(
            old == new and index not in self.messages
            for index, old, new in zip(alive, before, beats(), strict=True)
        ):
            time.sleep(0.01)


class Clock:
    """Replaces the module `time`; tests advance it."""

    now = 0.0
    sleep = staticmethod(time.sleep)

    def monotonic(self):
        return self.now


@pytest.fixture
def hosts(monkeypatch):
    monkeypatch.setattr(heartbeat, "who", lambda index: f"process {index} (host{index})")
    monkeypatch.setattr(heartbeat, "_REPORT_SECONDS", 0.5)
    made = []
    monkeypatch.setattr(heartbeat, "reachable", lambda: not made[-1].store.gone)

    def make(count, patience, clock=None):
        if clock is not None:
            monkeypatch.setattr(heartbeat, "time", clock)
        made.append(Hosts(count, patience, clock))
        return made[-1]

    yield make
    for each in made:
        for one in each.heartbeats:
            one.end()


def test_failure_report_reaches_all_processes(hosts):
    group = hosts(3, patience=30)
    for one in group.heartbeats:
        one.start()
    group.heartbeats[1].fail("process 1 (host1) failed: ValueError: no")
    group.wait(2)
    assert group.messages == dict.fromkeys((0, 2), "process 1 (host1) failed: ValueError: no")
    group.heartbeats[1].fail("again")  # a process reports once
    assert len(group.messages) == 2


def test_missing_heartbeats_are_reported_but_not_after_end(hosts):
    group = hosts(4, patience=0.6, clock=Clock())
    group.store.key_value_set("jaxalign/beat/2", "7")  # its last heartbeat
    for index in (0, 1, 3):
        group.heartbeats[index].start()
    group.heartbeats[3].end()
    while not {0, 1} <= set(group.messages):
        group.pass_time(0.2, 0, 1)
    assert group.clock.now > 0.6
    assert set(group.messages) == {0, 1}
    for text in group.messages.values():
        assert text.startswith("process 2 (host2) is lost: no sign of life for")


def test_heartbeats_keep_processes_alive(hosts):
    group = hosts(2, patience=0.6, clock=Clock())
    for one in group.heartbeats:
        one.start()
    for _ in range(10):
        group.pass_time(0.2, 0, 1)
    assert group.messages == {}


def test_lost_store_means_process_0_is_lost(hosts):
    group = hosts(2, patience=30)
    group.heartbeats[1].start()
    group.store.break_down()
    group.wait(1)
    assert group.messages == {
        1: "process 0 (host0) is lost: it was killed, or its machine cannot be reached"
    }


def test_only_the_first_failure_is_reported(hosts):
    group = hosts(3, patience=30)
    group.heartbeats[0].start()
    group.store.key_value_set("jaxalign/failed", "process 2 (host2) failed: OSError: disk full")
    group.heartbeats[1].fail("process 1 (host1) failed: TimeoutError: process 2")
    assert group.messages == {}
