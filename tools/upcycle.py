"""Make a Mixture-of-Experts model of a dense one: `python tools/upcycle.py DENSE_DIR OUT_DIR --experts 8 --top_k 2`."""

from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("upcycle")
