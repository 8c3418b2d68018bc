"""Fetch 38 plays as plain text: `python tools/fetch_corpus.py --out data/plays`."""

from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("fetch_corpus")
