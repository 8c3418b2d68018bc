#!/usr/bin/env bash
# Train on several hosts by torchrun. Start the same line on each of them, in any order:
#   HOSTS=2 RANKS=8 ENDPOINT=host1:29400 launch_scripts/multi_node_torchrun.sh --ds_config FILE [options of pretrain.py]
#
# HOSTS is the number of hosts, or MIN:MAX. RANKS is the number of ranks on each host. ENDPOINT is where the hosts join:
# one of them, with a free port. JOIN_TIMEOUT=N waits N seconds for the hosts (default 300). MAX_RESTARTS=N restarts after
# a rank or a host was lost, up to N times (default 0); with --auto_resume it restarts from the last checkpoint.
set -euo pipefail
source "$(dirname "$0")/common.sh"
[[ -n ${HOSTS:-} && -n ${RANKS:-} && -n ${ENDPOINT:-} ]] ||
  refuse "HOSTS is '${HOSTS:-}', RANKS '${RANKS:-}', ENDPOINT '${ENDPOINT:-}'; set all three: number of hosts, ranks on each, HOST:PORT."
[[ ${MAX_RESTARTS:-0} =~ ^[0-9]+$ ]] || refuse "MAX_RESTARTS is '$MAX_RESTARTS'; give a whole number."

# The hosts join at ENDPOINT, compare their reports, and get a port for torchrun.
checked=$(python "$root/tools/preflight.py" endpoint "$ENDPOINT" --hosts "$HOSTS" --ranks "$RANKS" \
  --seconds "${JOIN_TIMEOUT:-300}" -- "$@" | tail -n 1)
read -r endpoint address is_host <<< "$checked"

# Each start gets its own store: in a store shared by all starts, the agents would count their restarts differently.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
MEGAMOE_EXIT_NOTE=$(mktemp)
export MEGAMOE_EXIT_NOTE
trap 'rm -f "$MEGAMOE_EXIT_NOTE"' EXIT
code=0
run_launcher "^(/.*)?python[^ ]* .*--rdzv-endpoint=$endpoint" "" \
  torchrun --nnodes "$HOSTS" --nproc-per-node "$RANKS" --max-restarts "${MAX_RESTARTS:-0}" --local-addr "$address" \
  --rdzv-backend c10d --rdzv-id=megamoe --rdzv-endpoint="$endpoint" --rdzv-conf "is_host=$is_host" \
  "$root/megamoe/pretrain.py" "$@" || code=$?
leave "$code"
