#!/usr/bin/env bash
# Trains on a Cloud TPU slice of several VMs (a pod), through gcloud.
#
#   scripts/launch/tpu_pod.sh create --name my-pod --zone us-west4-a --type v5litepod-16
#   scripts/launch/tpu_pod.sh setup  --name my-pod --zone us-west4-a
#   scripts/launch/tpu_pod.sh run    --name my-pod --zone us-west4-a -- sft configs/sft.yaml \
#     run.folder=/mnt/shared/runs/mine
#   scripts/launch/tpu_pod.sh status | log | stop | delete --name my-pod --zone us-west4-a
#
#   create    makes the slice: --type and, if it is not the usual one, --version; --spot. With
#             --queued it waits in line for capacity, which is how large slices are had; --reserved
#   status    where a queued slice stands
#   setup     copies this checkout to all VMs and installs it; --bucket mounts one at /mnt/shared;
#             --hf-token FILE gives the VMs a token for gated models
#   fetch     downloads what a run reads, on the first VM, into --hf-home on the shared folder
#   run       starts the same command on all VMs, in the background
#   log       follows the log of the first VM, which is the one that says how training goes
#   stop      ends the run on all VMs; it saves a checkpoint first
#   delete    gives the slice back; with --queued its place in line too
#
#   --name, --zone      of the slice; --project if it is not gcloud's current one
#   --type T            accelerator type, such as v5litepod-16 or v5p-32
#   --version V         image of the VMs; by the type if not given
#   --spot              cheaper, and may be taken away
#   --bucket B          a Cloud Storage bucket that all VMs mount at /mnt/shared
#   --hf-home FOLDER    HF_HOME of fetch and run, such as /mnt/shared/hf
#   --env NAME[=VALUE]  a variable of fetch and run; may be given several times; without a value this
#                       shell's. For a token take setup --hf-token: commands can be read by others
#   --offline           run without asking the hub: fetch has been called
#   --dry-run           show the commands, run nothing
#
# docs/launching.md has the steps.

set -euo pipefail
# shellcheck source=scripts/launch/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

[[ "${1:-}" != --help && "${1:-}" != -h ]] || usage
what="${1:-}"
(($#)) && shift
name="" zone="" type="" version="" bucket="" spot=false queued=false reserved=false
hf_home="" hf_token=""
place=() variables=()
while (($#)); do
  case "$1" in
    --name) name="${2:-}" && shift 2 ;;
    --zone) zone="${2:-}" && shift 2 ;;
    --project) place+=("--project=${2:-}") && shift 2 ;;
    --type) type="${2:-}" && shift 2 ;;
    --version) version="${2:-}" && shift 2 ;;
    --bucket) bucket="${2:-}" && shift 2 ;;
    --hf-home) hf_home="${2:-}" && shift 2 ;;
    --hf-token) hf_token="${2:-}" && shift 2 ;;
    --env) variable "${2:-}" && variables+=("$2") && shift 2 ;;
    --offline) variables+=("${offline[@]}") && shift ;;
    --queued) queued=true && shift ;;
    --reserved) reserved=true && shift ;;
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

# The same command on every VM of the slice, or on one of them.
everywhere() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="${2:-all}" --command="$1"
}

# The variables of a run as `env` takes them, with a blank behind.
environment() {
  local entry words=()
  # The token stays where setup put it, on each VM, rather than on the shared folder.
  [[ -z "$hf_home" ]] || words+=("HF_HOME=$hf_home" HF_TOKEN_PATH=../.cache/huggingface/token)
  for entry in ${variables[@]+"${variables[@]}"}; do
    [[ "$entry" == *=* ]] || entry="$entry=${!entry}"
    words+=("$entry")
  done
  ((${#words[@]} == 0)) || printf '%s ' "$(quoted env "${words[@]}")"
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
    options=("--accelerator-type=$type")
    ! $spot || options+=(--spot)
    ! $reserved || options+=(--reserved)
    if $queued; then
      run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
        "${options[@]}" --runtime-version="$version"
    else
      run gcloud compute tpus tpu-vm create "$name" "${place[@]}" "${options[@]}" \
        --version="$version"
    fi
    ;;
  status)
    run gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format="value(state)"
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
    if [[ -n "$hf_token" ]]; then
      $dry_run || [[ -s "$hf_token" ]] || die "--hf-token $hf_token: no such file, or it is empty"
      everywhere "mkdir -p .cache/huggingface && chmod 700 .cache/huggingface"
      run gcloud compute tpus tpu-vm scp "$hf_token" "$name:.cache/huggingface/token" "${place[@]}" \
        --worker=all
    fi
    if [[ -n "$bucket" ]]; then
      everywhere "sudo mkdir -p /mnt/shared && sudo chown \$(id -u) /mnt/shared && \
{ mountpoint -q /mnt/shared || gcsfuse --implicit-dirs $(quoted "$bucket") /mnt/shared; }"
    fi
    ;;
  fetch)
    (($#)) || die "nothing to fetch; give the run's command after --, such as: -- sft configs/sft.yaml"
    [[ -n "$hf_home" ]] || die "--hf-home is missing: a folder that all VMs mount, /mnt/shared/hf"
    everywhere "cd jaxalign && $(environment).venv/bin/python -m jaxalign fetch $(quoted "$@")" 0
    ;;
  run)
    (($#)) || die "nothing to run; give a command after --, such as: -- sft configs/sft.yaml"
    # No addresses: the VMs find each other by the metadata of the slice.
    everywhere "cd jaxalign || exit 1; if [ -f run.pid ] && kill -0 \$(cat run.pid) 2> /dev/null; then \
echo 'a run is under way; stop it first' >&2; exit 1; fi; \
nohup $(environment).venv/bin/python -m jaxalign $(quoted "$@") > run.log 2>&1 < /dev/null & \
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
    if $queued; then
      run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
    else
      run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
    fi
    ;;
  *)
    die "${what:-no command}: wanted create, status, setup, fetch, run, log, stop or delete; \
$0 --help says more"
    ;;
esac
