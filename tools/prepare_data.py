"""Turn text into tokens: `python tools/prepare_data.py TEXT --out data/mine --vocab_size 16384`."""

from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("prepare_data")
