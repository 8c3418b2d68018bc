#!/usr/bin/env bash
# Train on one host: launch_scripts/single_node.sh RANKS --ds_config ds_configs/zero2.json [options of pretrain.py]
set -euo pipefail
source "$(dirname "$0")/common.sh"
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] ||
  refuse "the number of ranks is '${1:-}'; start launch_scripts/single_node.sh RANKS --ds_config FILE [options of pretrain.py]."
ranks=$1
shift

# Two jobs on one host must not share DeepSpeed's default port.
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

MEGAMOE_EXIT_NOTE=$(mktemp)
export MEGAMOE_EXIT_NOTE
trap 'rm -f "$MEGAMOE_EXIT_NOTE"' EXIT
code=0
run_launcher "^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch .*--master_port=$port" "" \
  deepspeed --num_gpus "$ranks" --master_port "$port" --log_level warning "$root/megamoe/pretrain.py" "$@" || code=$?
leave "$code"
