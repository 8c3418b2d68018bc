import sys

from megamoe.__main__ import main
from megamoe.launch.exits import leave

if __name__ == "__main__":
    try:
        main("evaluate")
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        leave(int(end.code or 0))  # with an exit code that launch_scripts/single_node.sh reads
