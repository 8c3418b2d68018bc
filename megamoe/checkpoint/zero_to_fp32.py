"""Make a plain fp32 state_dict of the checkpoint that holds this script, experts included.

    python zero_to_fp32.py OUT.pt                     the checkpoint in this folder
    python zero_to_fp32.py OTHER_CHECKPOINT OUT.pt

megamoe writes it into every checkpoint; DeepSpeed's script of that name stops at the first expert. It needs megamoe
installed. megamoe convert does more: other dtypes, safetensors, Hugging Face.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from megamoe import UserError, save_state_dict
except ModuleNotFoundError as error:
    print(f"error: {error}; install megamoe (pip install --editable . in its clone) and try again.", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a plain fp32 state_dict of a checkpoint.")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path(__file__).parent, help="checkpoint to convert")
    parser.add_argument("out", type=Path, help="file to write")
    args = parser.parse_args()
    save_state_dict(args.checkpoint, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        sys.exit(2)
