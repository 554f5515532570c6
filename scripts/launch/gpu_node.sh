#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process.
#
#   scripts/launch/gpu_node.sh [options] -- sft configs/sft.yaml run.folder=runs/mine
#
#   --gpus 0,1,2,3      which GPUs; all by default
#   --python PATH       the Python that jaxalign is installed in; by default that of .venv of this
#                       checkout, or python3 where there is none
#   --dry-run           show the command, run nothing
#
# What follows `--` goes to `jaxalign` as it stands. docs/launching.md has the steps.

set -euo pipefail
# shellcheck source=scripts/launch/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

gpus=""
python="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/python"
[[ -x "$python" ]] || python="python3"
while (($#)); do
  case "$1" in
    --gpus) gpus="${2:-}" && shift 2 ;;
    --python) python="${2:-}" && shift 2 ;;
    --dry-run) dry_run=true && shift ;;
    --help | -h) usage ;;
    --) shift && break ;;
    *) die "unknown option $1; $0 --help shows all options" ;;
  esac
done
(($#)) || die "nothing to run; give a command after --, such as: -- sft configs/sft.yaml"
[[ -z "$gpus" || "$gpus" =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--gpus $gpus: wanted numbers such as 0,1"

# One process, whatever a scheduler left in the environment of this shell.
settings=(JAX_NUM_PROCESSES=1)
# All but a little of the memory is JAX's: nothing else runs on these GPUs.
settings+=("XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}")
[[ -z "$gpus" ]] || settings+=("CUDA_VISIBLE_DEVICES=$gpus")
run env -u JAX_COORDINATOR_ADDRESS -u JAX_PROCESS_ID "${settings[@]}" \
  "$python" -m jaxalign "$@"
