"""Evaluate a model on texts, `python tools/evaluate.py runs/tiny data/plays`, or on tasks, `... --tasks arc_easy`."""

from megamoe.commands.evaluate import run

if __name__ == "__main__":
    run()
