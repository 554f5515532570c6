#!/usr/bin/env bash
# Submits a run on several GPU nodes to Slurm: one process a node, over all of its GPUs.
#
#   scripts/launch/slurm.sh --nodes 2 --gpus 8 [options] -- sft configs/sft.yaml run.folder=/shared/x
#
#   --nodes N           how many
#   --gpus N            GPUs of a node
#   --name NAME         of the job; jaxalign by default
#   --time T            limit, as sbatch takes it, such as 24:00:00
#   --partition P, --account A, --qos Q
#   --cpus N            cores of a node that the process gets; all that --exclusive gives if not set
#   --venv FOLDER       the virtual environment with jaxalign, on a file system that all nodes mount;
#                       .venv of this checkout by default
#   --container IMAGE   run inside this image (pyxis/enroot) in place of the virtual environment
#   --log FOLDER        where the log goes, a file a job; logs by default
#   --no-requeue        do not start again after a preemption or the loss of a node
#   --dry-run           show the batch script, submit nothing
#
# What follows `--` goes to `jaxalign` as it stands. docs/launching.md has the steps.

set -euo pipefail
# shellcheck source=scripts/launch/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

nodes="" gpus="" name="jaxalign" container="" log="logs" requeue=true
venv="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv"
extra=()
while (($#)); do
  case "$1" in
    --nodes) nodes="${2:-}" && shift 2 ;;
    --gpus) gpus="${2:-}" && shift 2 ;;
    --name) name="${2:-}" && shift 2 ;;
    --time | --partition | --account | --qos) extra+=("$1=${2:-}") && shift 2 ;;
    --cpus) whole --cpus "${2:-}" && extra+=("--cpus-per-task=$2") && shift 2 ;;
    --venv) venv="${2:-}" && shift 2 ;;
    --container) container="${2:-}" && shift 2 ;;
    --log) log="${2:-}" && shift 2 ;;
    --no-requeue) requeue=false && shift ;;
    --dry-run) dry_run=true && shift ;;
    --help | -h) usage ;;
    --) shift && break ;;
    *) die "unknown option $1; $0 --help shows all options" ;;
  esac
done
wants --nodes "$nodes"
wants --gpus "$gpus"
whole --nodes "$nodes"
whole --gpus "$gpus"
(($#)) || die "nothing to run; give a command after --, such as: -- sft configs/sft.yaml"

inside=()
python="$venv/bin/python"
if [[ -n "$container" ]]; then
  inside=("--container-image=$container" "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD")
  python="python3"
fi
if $requeue; then
  extra+=(--requeue)
  again="$(resume_of "$1")"
else
  extra+=(--no-requeue)
  again=""
fi

batch() {
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus
#SBATCH --exclusive
#SBATCH --output=$log/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
END
  ((${#extra[@]} == 0)) || printf '#SBATCH %s\n' "${extra[@]}"
  cat <<END
set -euo pipefail
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
# A step that lost a node ends as a whole; a job that was put back into the queue goes on from its
# newest checkpoint.
again=()
[[ "\${SLURM_RESTART_COUNT:-0}" == 0 ]] || again=($again)
srun --kill-on-bad-exit=1 --label $(quoted ${inside[@]+"${inside[@]}"} "$python" -m jaxalign "$@") \\
  "\${again[@]}"
END
}

$dry_run || mkdir -p "$log"
batch "$@" | send sbatch
