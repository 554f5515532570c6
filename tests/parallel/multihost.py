"""Starts a program on several processes of this machine, as a job of several hosts."""

import os
import pathlib
import socket
import subprocess
import sys

TESTS = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 8
RUN = ("-m", "jaxalign")


def start(arguments, processes, log, *, program=RUN, folders=None, **environment):
    """Starts a program on several processes with 8 fake devices in all.

    Args:
      arguments: of the program; the same for all.
      processes: how many.
      log: a path; the output of process i goes to `<log>.<i>`.
      program: what Python runs; the command line of jaxalign by default.
      folders: working directory of each process; the current one by default.
      **environment: more variables.

    Returns:
      The running processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={DEVICES // processes}")
    common = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path]),
        "JAX_NUM_PROCESSES": str(processes),
    }
    if processes > 1:
        common["JAX_COORDINATOR_ADDRESS"] = address
    running = []
    for index in range(processes):
        with pathlib.Path(f"{log}.{index}").open("w", encoding="utf-8") as file:
            running.append(
                subprocess.Popen(
                    [sys.executable, *program, *map(str, arguments)],
                    env=common | {"JAX_PROCESS_ID": str(index)} | environment,
                    cwd=None if folders is None else folders[index],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return running


def finish(running, log, timeout=850):
    """Waits for processes; returns their exit statuses and outputs."""
    try:
        statuses = [process.wait(timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    logs = [
        pathlib.Path(f"{log}.{index}").read_text(encoding="utf-8") for index in range(len(running))
    ]
    return statuses, logs
