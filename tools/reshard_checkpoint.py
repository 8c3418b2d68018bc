"""Reshard a checkpoint for any number of ranks in advance: `python tools/reshard_checkpoint.py runs/a runs/b`."""

from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("reshard_checkpoint")
