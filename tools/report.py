"""Show what a run has done: `python tools/report.py runs/tiny` prints its losses and draws RUN/loss_lr.png."""

from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("report")
