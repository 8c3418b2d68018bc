#!/usr/bin/env bash
# Train on the hosts of a hostfile ("HOST slots=RANKS" a line), by DeepSpeed's launcher over pdsh and ssh:
#   launch_scripts/multi_node_pdsh.sh HOSTFILE --ds_config ds_configs/zero2.json [options of pretrain.py]
#
# MAX_RESTARTS=N restarts from the last checkpoint after a rank or a host was lost, up to N times (default 0).
# MIN_HOSTS=N continues with the hosts that answer, if at least N do (default: all hosts must answer).
set -euo pipefail
source "$(dirname "$0")/common.sh"
[[ ${1:--} != -* ]] ||
  refuse "the hostfile is '${1:-}'; start launch_scripts/multi_node_pdsh.sh HOSTFILE --ds_config FILE [options of pretrain.py]."
[[ ${MAX_RESTARTS:-0} =~ ^[0-9]+$ ]] || refuse "MAX_RESTARTS is '$MAX_RESTARTS'; give a whole number."
for folder in "$root" "$PWD"; do
  [[ $folder != *" "* ]] || refuse "DeepSpeed's launcher for several hosts takes no path with a space; rename $folder."
done
hostfile=$1
shift

folder=$(mktemp -d)
export MEGAMOE_EXIT_NOTE=
trap 'rm -rf "$folder" "$MEGAMOE_EXIT_NOTE"' EXIT
# DeepSpeed forwards the variables in .deepspeed_env, and few others, to the other hosts.
export DS_ENV_FILE=$folder/.deepspeed_env
libraries='TORCH|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|CUBLAS|NCCL|GLOO|FI|MALLOC|HF|DS|MEGAMOE'
forwarded="^(PATH|LD_LIBRARY_PATH|LD_PRELOAD|OMP_NUM_THREADS|($libraries)_[A-Z0-9_]*)="
of_this_host='^(CUDA_VISIBLE_DEVICES|DS_ENV_FILE)='
# ssh would wait for hours for a host that has lost its power.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=5 -o ServerAliveCountMax=4"

# make_note RUN_DIR: the file for the ranks' exit code, where all hosts see it: next to the run folder.
make_note() {
  local above
  [[ -z $MEGAMOE_EXIT_NOTE ]] || return 0
  above=$(realpath -m "$1/..")
  while [[ ! -d $above ]]; do above=$(dirname "$above"); done
  MEGAMOE_EXIT_NOTE=$(mktemp "$above/.exit-XXXXXX")
}

for ((attempt = 0; ; attempt++)); do
  # Prints every problem and its host, or the address and a free port of the first host.
  checked=$(python "$root/tools/preflight.py" hostfile "$hostfile" --usable "$folder/hostfile" \
    ${MASTER_PORT:+--port "$MASTER_PORT"} ${MIN_HOSTS:+--min_hosts "$MIN_HOSTS"} -- "$@" | tail -n 1)
  read -r first address port run_dir <<< "$checked"
  make_note "$run_dir"
  grep -sh '^[A-Za-z0-9_]*=' ~/.deepspeed_env ./.deepspeed_env > "$DS_ENV_FILE" || true
  env | grep -E "$forwarded" | grep -vE "$of_this_host" >> "$DS_ENV_FILE"
  code=0
  job="deepspeed.launcher.launch .*--master_addr=$address --master_port=$port"
  run_launcher "^[^ ]*python[^ ]* -u -m $job" "$first" \
    deepspeed --log_level critical --hostfile "$folder/hostfile" --force_multi \
    --master_addr "$address" --master_port "$port" "$root/megamoe/pretrain.py" "$@" || code=$?
  # The ssh processes of a launcher that was killed; the ranks detect it, save and exit.
  pkill -TERM -f "^ssh .* -m $job" || true
  case $code in 0 | 2 | 75) exit "$code" ;; esac # done, an error for the user to fix, or asked to stop
  if [[ -n $stopping ]] || ((attempt >= ${MAX_RESTARTS:-0})); then leave "$code"; fi
  while read -r host _; do # the ranks may still be saving
    while ssh -n -o BatchMode=yes -o ConnectTimeout=5 "$host" "pgrep -f '^[^ ]*python[^ ]* -u -m $job'" > /dev/null; do
      sleep 1
    done
  done < "$folder/hostfile"
  echo "the ranks exited with code $code; restart $((attempt + 1)) of $MAX_RESTARTS" >&2
  [[ " $* " == *" --auto_resume "* ]] || set -- "$@" --auto_resume
done
