# Sourced by the launch scripts.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# refuse SENTENCE: what is to be mended.
refuse() {
  echo "error: $1" >&2
  exit 2
}

# run_launcher MARK HOST COMMAND...: run a launcher and give its exit code; leave nothing of it behind.
#
# SIGINT, SIGTERM, SIGHUP and SIGUSR1 go to the ranks on HOST ("" is this one), whose launcher's command line holds MARK:
# all ranks save and leave, and the launcher ends by itself. A second one goes to the launcher and what it has started
# here, which ends, too, when the launcher is killed.
run_launcher() {
  local mark=$1 host=$2 code=0
  stopping='' asking=''
  shift 2
  set -m # a process group of its own
  "$@" < /dev/null &
  launcher=$!
  set +m
  trap 'stop_launcher "$mark" "$host"' INT TERM HUP USR1
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done # a signal cuts it short
  wait "$launcher" || code=$?
  trap - INT TERM HUP USR1
  [[ -z $asking ]] || kill "$asking" 2> /dev/null || true
  kill -TERM -- "-$launcher" 2> /dev/null || true
  return "$code"
}

stop_launcher() {
  stopping=1
  trap 'kill -INT -- "-$launcher"' INT TERM HUP USR1
  ask_ranks "$1" "$2" || kill -INT -- "-$launcher" # there are none yet
  # Ranks that were still loading have died of it, and torchrun may have started others.
  while sleep 5 && kill -0 "$launcher" 2> /dev/null; do ask_ranks "$1" "$2" || true; done &
  asking=$!
}

ask_ranks() {
  local ask="launchers=\$(pgrep -d, -f '$1') && pkill -USR1 -P \$launchers"
  if [[ -n $2 ]]; then ssh -n -o BatchMode=yes "$2" "$ask"; else bash -c "$ask"; fi
}
