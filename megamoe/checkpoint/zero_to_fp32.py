"""Make a plain fp32 state_dict of the checkpoint that holds this script, experts included.

    python zero_to_fp32.py OUT.pt                     the checkpoint in this folder
    python zero_to_fp32.py OTHER_CHECKPOINT OUT.pt

megamoe writes it into every checkpoint; DeepSpeed's script of that name stops at the first expert. It needs megamoe
installed. tools/convert_checkpoint.py does more: other dtypes, safetensors, Hugging Face.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from megamoe.checkpoint.opening import find_checkpoint, open_source
    from megamoe.config import cli
    from megamoe.formats.export import DTYPES, write_state_dict
    from megamoe.formats.plain_files import STATE_DICT_ENDINGS
    from megamoe.utils.errors import UserError
except ModuleNotFoundError as error:
    print(f"error: {error}; install megamoe (pip install --editable . in its clone) and try again.", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = cli.Parser(description="Make a plain fp32 state_dict of a checkpoint.")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path(__file__).parent, help="checkpoint to convert")
    parser.add_argument("out", type=Path, help="file to write")
    args = parser.parse()
    if args.out.suffix not in STATE_DICT_ENDINGS:
        raise UserError(f"{args.out} has no ending of a state_dict, which is one file; call it {args.out}.pt.")
    checkpoint = find_checkpoint(args.checkpoint)
    write_state_dict(open_source(checkpoint, open_files=1), args.out, DTYPES["fp32"])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
