"""Sample from a trained model: `python tools/generate.py runs/tiny --prompt "In a quiet library,"`."""

from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("generate")
