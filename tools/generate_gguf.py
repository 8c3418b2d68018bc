"""Continue prompts with llama.cpp: `python tools/generate_gguf.py model.gguf --prompt "In a quiet library,"`."""

from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("generate_gguf")
