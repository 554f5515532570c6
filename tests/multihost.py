"""Runs of several processes on this machine, as tests of several hosts start them."""

import os
import pathlib
import socket
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
DEVICES = 8


def start(arguments, processes, log, **environment):
    """Starts `jaxalign ARGUMENTS` on `processes` processes with 8 fake devices in all.

    Args:
      arguments: of the command; the same for all.
      processes: how many.
      log: a path; what process i says goes to `<log>.<i>`.
      **environment: more variables; a list gives each process its own.

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
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
    }
    if processes > 1:
        common |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    running = []
    for index in range(processes):
        own = {k: v[index] if isinstance(v, list) else v for k, v in environment.items()}
        with pathlib.Path(f"{log}.{index}").open("w", encoding="utf-8") as file:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "jaxalign.cli", *map(str, arguments)],
                    env=common | {"JAX_PROCESS_ID": str(index)} | own,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return running


def finish(running, log, timeout=240):
    """Waits for processes; gives their exit statuses and what they said."""
    try:
        statuses = [process.wait(timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    said = [
        pathlib.Path(f"{log}.{index}").read_text(encoding="utf-8") for index in range(len(running))
    ]
    return statuses, said
