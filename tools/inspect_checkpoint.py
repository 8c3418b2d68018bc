"""Look into a checkpoint: `python tools/inspect_checkpoint.py runs/tiny`."""

from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("inspect_checkpoint")
