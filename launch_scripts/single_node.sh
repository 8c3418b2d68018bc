#!/usr/bin/env bash
# Train on one host: launch_scripts/single_node.sh RANKS --ds_config ds_configs/zero2.json [options of pretrain.py]
# Evaluate: PROGRAM=tools/evaluate.py launch_scripts/single_node.sh RANKS runs/mine data/mine [options of evaluate.py]
set -euo pipefail
source "$(dirname "$0")/common.sh"
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] ||
  refuse "the number of ranks is '${1:-}'; start launch_scripts/single_node.sh RANKS --ds_config FILE [options of pretrain.py]."
ranks=$1
shift

devices=(--num_gpus "$ranks")
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then # which deepspeed ignores next to --num_gpus
  [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]] ||
    refuse "CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES'; deepspeed takes numbers only, such as 2,3."
  IFS=, read -ra visible <<< "$CUDA_VISIBLE_DEVICES"
  [[ ${#visible[@]} -ge $ranks ]] ||
    refuse "CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES', for $ranks ranks; name a device for each, or start fewer ranks."
  devices=(--include "localhost:$(IFS=,; echo "${visible[*]:0:ranks}")")
fi

# Two jobs on one host must not share DeepSpeed's default port.
port=${MASTER_PORT:-$(python -c 'from megamoe.launch.network import free_port; print(free_port())')}

MEGAMOE_EXIT_NOTE=$(mktemp)
export MEGAMOE_EXIT_NOTE
trap 'rm -f "$MEGAMOE_EXIT_NOTE"' EXIT
code=0
# Not `deepspeed`: pip writes its path into the first line of that script, where a path with a space does not work.
run_launcher "^(/.*)?python[^ ]* -u -m deepspeed.launcher.launch .*--master_port=$port" "" \
  python -m deepspeed.launcher.runner "${devices[@]}" --master_port "$port" --log_level critical "$root/${PROGRAM:-megamoe/pretrain.py}" "$@" || code=$?
leave "$code"
