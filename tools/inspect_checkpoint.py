"""Look into a checkpoint: `python tools/inspect_checkpoint.py runs/tiny`."""

from megamoe.commands.inspect_checkpoint import main
from megamoe.config import cli

if __name__ == "__main__":
    cli.run(main)
