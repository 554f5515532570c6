# shellcheck shell=bash
# Sourced by the launchers beside it: options, and commands that are shown instead of run.
#
#   dry_run=true           `run` and `send` print what they would do, and do nothing
#   run COMMAND …          runs a command
#   send COMMAND …         runs a command with what comes on standard input
#   wants OPTION VALUE     ends with a message where an option was not given
#   quoted WORD …          the words as a shell would read them back
#   resume_of COMMAND      the override that makes a command of jaxalign go on where it stopped
#   variable NAME[=VALUE]  checks a variable; without a value it must be set in this shell
#   offline                the variables under which nothing is asked of the hub

dry_run=false

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The comment at the head of the script.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
  exit 0
}

wants() {
  [[ -n "$2" ]] || die "$1 is missing; $0 --help shows all options"
}

whole() {
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || die "$1 $2: wanted a positive whole number"
}

quoted() {
  local word line=""
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+=" $word"
  done
  printf '%s' "${line# }"
}

variable() {
  [[ "$1" =~ ^[A-Za-z_][A-Za-z0-9_]*(=.*)?$ ]] || die "--env $1: wanted NAME or NAME=VALUE"
  [[ "$1" == *=* || -n "${!1+set}" ]] || die "--env $1: it is not set in this shell; give $1=VALUE"
}

# shellcheck disable=SC2034  # the launchers read it
offline=(HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1)

resume_of() {
  [[ "$1" == pipeline ]] && echo defaults.run.resume=auto || echo run.resume=auto
}

run() {
  if $dry_run; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

send() {
  if $dry_run; then
    printf '# to: %s\n' "$(quoted "$@")"
    cat
  else
    "$@"
  fi
}
