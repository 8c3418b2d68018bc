"""Attention of one layer on CPU, forward and backward, within documents and across them.

In turns, process time on one thread: `python tools/dev/benchmark_documents.py --tokens 300`
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from torch import Tensor

from megamoe.config.model import preset_names
from megamoe.data.document_bounds import Documents
from megamoe.formats.config_json import find_preset
from megamoe.model.document_attention import DocumentMask, attend
from megamoe.model.from_config import build_attention
from megamoe.model.rope import rope_frequencies, rotary_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", help=f"of {', '.join(preset_names())}, or a file")
    parser.add_argument(
        "--tokens", type=int, default=300, help="mean of a document; they are half to one and a half of it"
    )
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, dtype = find_preset(args.preset), getattr(torch, args.dtype)
    layer = build_attention(config, config.rope_scaling).to(dtype)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, 0, 0.02)
    layer.attend = attend  # type: ignore[assignment]
    draw = np.random.default_rng(0)

    def new_documents() -> Documents:
        """Of other lengths each time, as a run has them: a CPU makes kernels for lengths that it has not seen."""
        starts = np.cumsum(draw.uniform(0.5, 1.5, args.seq_len) * args.tokens).astype(np.int64)
        documents = Documents.of([starts[starts < args.seq_len]], [args.seq_len], args.seq_len)
        assert documents
        return documents

    documents = new_documents()
    frequencies, factor = rope_frequencies(
        config.rotary_dim, config.rope_theta, None, args.seq_len, torch.tensor([args.seq_len])
    )
    rotary = rotary_table(
        documents.positions, frequencies, factor, dtype, config.rope_interleaved, config.num_latent_tokens
    )
    x = torch.randn(1, args.seq_len, config.hidden_size, dtype=dtype, requires_grad=True)
    shape = (1, config.num_attention_heads, args.seq_len, config.head_dim)
    given = [torch.randn(shape, dtype=dtype, requires_grad=True)]
    sizes = (config.head_dim, config.num_latent_tokens), (config.value_dim, config.num_latent_tokens)
    given += [
        torch.randn(1, config.num_key_value_heads, latents + args.seq_len, width, dtype=dtype, requires_grad=True)
        for width, latents in sizes
    ]

    def kernel(mask: DocumentMask | None) -> Tensor:
        query, key, value = given
        if mask is None:  # as the layer, which gives the latents queries too
            query = torch.nn.functional.pad(query, (0, 0, config.num_latent_tokens, 0))
        return attend(query, key, value, mask)

    for name, run in (("kernel alone", kernel), ("layer", lambda mask: layer(x, rotary, mask))):
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.rounds):
            mask = DocumentMask.of(new_documents(), False, config.num_latent_tokens, None)
            for apart in times:
                start = time.process_time()
                run(mask if apart else None).sum().backward()
                times[apart].append(time.process_time() - start)
        ratios = [one / other for one, other in zip(times[True], times[False], strict=True)]
        across, apart_ms = (1e3 * statistics.median(times[apart]) for apart in (False, True))
        print(
            f"{name}: {len(documents.starts) - 1} documents {apart_ms:.1f} ms, one row {across:.1f} ms, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
