#!/usr/bin/env bash
# Trains on a Cloud TPU slice of several VMs (a pod), through gcloud.
#
#   scripts/launch/tpu_pod.sh create --name my-pod --zone us-west4-a --type v5litepod-16
#   scripts/launch/tpu_pod.sh setup  --name my-pod --zone us-west4-a
#   scripts/launch/tpu_pod.sh run    --name my-pod --zone us-west4-a -- sft configs/sft.yaml \
#     run.folder=/mnt/shared/runs/mine
#   scripts/launch/tpu_pod.sh log | stop | delete --name my-pod --zone us-west4-a
#
#   create    makes the slice: --type and, if it is not the usual one, --version; --spot
#   setup     copies this checkout to all VMs and installs it; --bucket mounts one at /mnt/shared
#   run       starts the same command on all VMs, in the background
#   log       follows the log of the first VM, which is the one that says how training goes
#   stop      ends the run on all VMs; it saves a checkpoint first
#   delete    gives the slice back
#
#   --name, --zone      of the slice; --project if it is not gcloud's current one
#   --type T            accelerator type, such as v5litepod-16 or v5p-32
#   --version V         image of the VMs; by the type if not given
#   --spot              cheaper, and may be taken away
#   --bucket B          a Cloud Storage bucket that all VMs mount at /mnt/shared
#   --dry-run           show the commands, run nothing
#
# docs/launching.md has the steps.

set -euo pipefail
# shellcheck source=scripts/launch/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

[[ "${1:-}" != --help && "${1:-}" != -h ]] || usage
what="${1:-}"
(($#)) && shift
name="" zone="" type="" version="" bucket="" spot=false
place=()
while (($#)); do
  case "$1" in
    --name) name="${2:-}" && shift 2 ;;
    --zone) zone="${2:-}" && shift 2 ;;
    --project) place+=("--project=${2:-}") && shift 2 ;;
    --type) type="${2:-}" && shift 2 ;;
    --version) version="${2:-}" && shift 2 ;;
    --bucket) bucket="${2:-}" && shift 2 ;;
    --spot) spot=true && shift ;;
    --dry-run) dry_run=true && shift ;;
    --help | -h) usage ;;
    --) shift && break ;;
    *) die "unknown option $1; $0 --help shows all options" ;;
  esac
done
wants --name "$name"
wants --zone "$zone"
place=("--zone=$zone" ${place[@]+"${place[@]}"})
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# The same command on every VM of the slice.
everywhere() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

usual_version() {
  case "$1" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "--type $1: no image is known for it; give --version (gcloud compute tpus versions list)" ;;
  esac
}

case "$what" in
  create)
    wants --type "$type"
    [[ -n "$version" ]] || version="$(usual_version "$type")"
    options=("--accelerator-type=$type" "--version=$version")
    ! $spot || options+=(--spot)
    run gcloud compute tpus tpu-vm create "$name" "${place[@]}" "${options[@]}"
    ;;
  setup)
    # What is committed, without what lies about: the same on every VM.
    archive="${TMPDIR:-/tmp}/jaxalign-$name.tar.gz"
    run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name:jaxalign.tar.gz" "${place[@]}" --worker=all
    run rm -f "$archive"
    everywhere "mkdir -p jaxalign && tar -xzf jaxalign.tar.gz -C jaxalign && cd jaxalign && \
PYTHON=\$(command -v python3.12 || command -v python3.11 || command -v python3) && \
\$PYTHON -m venv .venv && .venv/bin/python -m pip install --quiet --editable '.[tpu]'"
    if [[ -n "$bucket" ]]; then
      everywhere "sudo mkdir -p /mnt/shared && sudo chown \$(id -u) /mnt/shared && \
{ mountpoint -q /mnt/shared || gcsfuse --implicit-dirs $(quoted "$bucket") /mnt/shared; }"
    fi
    ;;
  run)
    (($#)) || die "nothing to run; give a command after --, such as: -- sft configs/sft.yaml"
    # No addresses: the VMs find each other by the metadata of the slice.
    everywhere "cd jaxalign || exit 1; if [ -f run.pid ] && kill -0 \$(cat run.pid) 2> /dev/null; then \
echo 'a run is under way; stop it first' >&2; exit 1; fi; \
nohup .venv/bin/python -m jaxalign $(quoted "$@") > run.log 2>&1 < /dev/null & \
echo \$! > run.pid"
    ;;
  log)
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=0 \
      --command="tail -n 100 -f jaxalign/run.log"
    ;;
  stop)
    everywhere "kill -TERM \$(cat jaxalign/run.pid)"
    ;;
  delete)
    run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
    ;;
  *) die "${what:-no command}: wanted create, setup, run, log, stop or delete; $0 --help says more" ;;
esac
