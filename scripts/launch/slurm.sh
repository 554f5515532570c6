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
#   --mem M             memory of a node, as sbatch takes it; 0, all of it, if not given
#   --container IMAGE   run inside this image (pyxis/enroot) in place of the virtual environment
#   --mount FOLDER[:AT] with --container: a folder that is there inside too; the current one always is
#   --env NAME[=VALUE]  a variable of the run; without a value this shell's, which no file shows, so
#                       that `--env HF_TOKEN` passes a token on
#   --before LINE       a line of the batch script before the run, such as 'module load cuda/12.6'
#   --hf-home FOLDER    HF_HOME, the cache of models and data, on a file system that all nodes mount
#   --fetch             download what the run reads once, on one node, and run without network
#   --offline           run without network: `jaxalign fetch` has been called beforehand
#   --log FOLDER        where the log goes, a file a job; logs by default
#   --no-requeue        do not start again after a preemption or the loss of a node
#   --dry-run           show the batch script, submit nothing
#
# --mount, --env and --before may be given several times. What follows `--` goes to `jaxalign` as it
# stands. docs/launching.md has the steps.

set -euo pipefail
# shellcheck source=scripts/launch/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

nodes="" gpus="" name="jaxalign" container="" log="logs" requeue=true mem=0 hf_home=""
fetch=false without_network=false
mounts=() variables=() before=()
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
    --mem) mem="${2:-}" && shift 2 ;;
    --container) container="${2:-}" && shift 2 ;;
    --mount) mounts+=("${2:-}") && shift 2 ;;
    --env) variable "${2:-}" && variables+=("$2") && shift 2 ;;
    --before) before+=("${2:-}") && shift 2 ;;
    --hf-home) hf_home="${2:-}" && shift 2 ;;
    --fetch) fetch=true && shift ;;
    --offline) without_network=true && shift ;;
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

[[ "$mem" =~ ^[0-9]+[KMGT]?$ ]] || die "--mem $mem: wanted a number such as 0, 512G or 1T"
[[ -n "$container" || ${#mounts[@]} == 0 ]] || die "--mount: has no meaning without --container"
[[ -z "$hf_home" ]] || variables+=("HF_HOME=$hf_home")

# Whether a folder is one of those that the container has from outside.
mounted() {
  local mount at
  for mount in "$PWD" ${mounts[@]+"${mounts[@]}"} ${hf_home:+"$hf_home"}; do
    at="${mount#*:}"
    [[ "$1/" != "${at%/}/"* ]] || return 0
  done
  return 1
}

inside=()
python="$venv/bin/python"
if [[ -n "$container" ]]; then
  for word in "$@"; do
    if [[ "$word" =~ ^([a-z_]+\.)*(folder|out|cache|source)=(/.*)$ ]]; then
      mounted "${BASH_REMATCH[3]}" || die "$word: the container does not have this folder, and what \
is written there ends with it; add --mount FOLDER"
    fi
  done
  all="$PWD:$PWD"
  for mount in ${mounts[@]+"${mounts[@]}"} ${hf_home:+"$hf_home"}; do
    [[ "$mount" == *:* ]] || mount="$mount:$mount"
    all+=",$mount"
  done
  inside=("--container-image=$container" "--container-mounts=$all" "--container-workdir=$PWD")
  names=""
  for entry in ${variables[@]+"${variables[@]}"}; do names+=",${entry%%=*}"; done
  [[ -z "$names" ]] || inside+=("--container-env=${names#,}")
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
#SBATCH --mem=$mem
#SBATCH --exclusive
#SBATCH --output=$log/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
END
  ((${#extra[@]} == 0)) || printf '#SBATCH %s\n' "${extra[@]}"
  cat <<END
set -euo pipefail
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
END
  local entry line
  for entry in ${variables[@]+"${variables[@]}"}; do
    # A name alone stands for what sbatch passes on: the value is in no file.
    if [[ "$entry" == *=* ]]; then printf 'export %s\n' "${entry%%=*}=$(quoted "${entry#*=}")"; fi
  done
  for line in ${before[@]+"${before[@]}"}; do printf '%s\n' "$line"; done
  if $fetch; then
    printf '# Once for all nodes: they read the same cache.\n'
    printf 'srun --nodes=1 --ntasks=1 %s\n' \
      "$(quoted ${inside[@]+"${inside[@]}"} "$python" -m jaxalign fetch "$@")"
  fi
  if $fetch || $without_network; then printf 'export %s\n' "${offline[*]}"; fi
  cat <<END
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
