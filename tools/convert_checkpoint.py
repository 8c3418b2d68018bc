"""Convert a model: `python tools/convert_checkpoint.py runs/tiny tiny.pt` (or .safetensors, .gguf, or a folder)."""

from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("convert_checkpoint")
