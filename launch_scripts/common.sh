# Sourced by the launch scripts.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# DeepSpeed looks for numactl, and would end at a folder of PATH that this user may not enter, as root's in a container.
entered=
IFS=: read -ra folders <<< "$PATH"
for folder in "${folders[@]}"; do [[ ! -x $folder/. ]] || entered+=:$folder; done
PATH=${entered#:}

# This script's process, for ranks on this host: they save and exit when it has died.
MEGAMOE_SCRIPT=$$,$(< /proc/sys/kernel/random/boot_id),$(readlink /proc/self/ns/pid)
export MEGAMOE_SCRIPT
# Without it, each rank that loses rank 0 prints a stack trace of torch's store.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

# refuse SENTENCE: print the error and exit with the code of errors that the user can fix.
refuse() {
  echo "error: $1" >&2
  exit 2
}

# leave CODE: exit with the code of a run, and say what nobody says where all ranks were killed at once.
leave() {
  case $1 in
  0 | 2 | 75 | 130) ;;
  *) echo "error: the ranks exited with code $1; if no line above says why, they were killed (out of memory?); resume with --resume." >&2 ;;
  esac
  exit "$1"
}

# run_launcher PATTERN HOST COMMAND...: run a launcher, return the run's exit code, and leave none of its processes
# running. The ranks write their exit code to the file $MEGAMOE_EXIT_NOTE.
#
# SIGINT, SIGTERM, SIGHUP and SIGUSR1 are sent to the ranks on HOST ("" is this host) whose launcher's command line
# matches PATTERN: all ranks save and exit, and then the launcher exits. A second signal is sent to the launcher and the
# processes that it has started here; they are ended, too, when the launcher is killed.
run_launcher() {
  local pattern=$1 host=$2 code=0
  stopping='' asking=''
  shift 2
  : > "$MEGAMOE_EXIT_NOTE"
  set -m # a process group of its own
  "$@" < /dev/null &
  launcher=$!
  set +m
  trap 'stop_launcher "$pattern" "$host"' INT TERM HUP USR1
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done # a signal interrupts wait
  wait "$launcher" || code=$?
  case $1:$code/$(cat "$MEGAMOE_EXIT_NOTE") in
  *:0/0) ;;
  torchrun:0/75) code=75 ;; # its ranks exit with 0 when they were asked to stop
  *:0/*) code=1 ;; # what DeepSpeed returns when its launch.py is killed, though the ranks may have saved and left by now
  *:1/[1-9]*) code=$(cat "$MEGAMOE_EXIT_NOTE") ;; # what torchrun returns for any code of a rank
  esac
  trap - INT TERM HUP USR1
  [[ -z $asking ]] || kill "$asking" 2> /dev/null || true
  kill -TERM -- "-$launcher" 2> /dev/null || true
  return "$code"
}

stop_launcher() {
  stopping=1
  trap 'kill -INT -- "-$launcher"' INT TERM HUP USR1
  ask_ranks "$1" "$2" || kill -INT -- "-$launcher" # no ranks yet
  # The signal ends ranks that were still loading Python, and torchrun may have started others.
  while sleep 5 && kill -0 "$launcher" 2> /dev/null; do ask_ranks "$1" "$2" || true; done &
  asking=$!
}

ask_ranks() { # no `return`: in a trap it gives the status from before the trap
  if [[ -n $2 ]]; then
    ssh -n -o BatchMode=yes "$2" "launchers=\$(pgrep -d, -f '$1') && pkill -USR1 -P \$launchers"
  else
    ask_ranks_here "$1"
  fi
}

ask_ranks_here() {
  local process words ranks=()
  for process in /proc/[0-9]*; do # not by pgrep, which slim containers lack
    { mapfile -d '' -t words < "$process/cmdline" && [[ ${words[*]} =~ $1 ]] || continue; } 2> /dev/null
    ranks+=($(cat "$process"/task/*/children 2> /dev/null)) || true
  done
  [[ ${#ranks[@]} -gt 0 ]] && kill -USR1 "${ranks[@]}"
}
