"""Parts of the model as formulas in float64, one vector at a time, with nothing of megamoe's; weights have their names
in the part."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

THETA = 100.0


def positions_of(real: Tensor) -> Tensor:
    """(B, S): how many real tokens stand before each."""
    return (real.cumsum(1) - 1).clamp_min(0)


def turned(vector: Tensor, position: int, interleaved: bool = False, theta: float = THETA) -> Tensor:
    """Each pair as a complex number, times e^(i position θ^(-2k/r))."""
    angles = position * theta ** -(torch.arange(0, len(vector), 2, dtype=torch.float64) / len(vector))
    first, second = (vector[0::2], vector[1::2]) if interleaved else vector.chunk(2)
    pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.stack((pairs.real, pairs.imag), 1).flatten() if interleaved else torch.cat((pairs.real, pairs.imag))


def normed(vector: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return vector / (vector.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def average(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    weights = torch.stack([(query * key).sum() * scale for key in keys]).exp()
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / weights.sum()


def attention(
    weights: dict[str, Tensor], x: Tensor, real: Tensor, head_dim: int, *, rotary_dim: int = 0, window: int = 0,
    interleaved: bool = False, qk_norm: str | None = None, eps: float = 1e-5, theta: float = THETA,
) -> Tensor:  # fmt: skip
    """Grouped-query attention over latents and real tokens, (B, S, D); rows of padding are 0."""
    positions, rotary_dim = positions_of(real), rotary_dim or head_dim

    def projected(name: str, vector: Tensor) -> Tensor:
        return weights[f"{name}_proj.weight"] @ vector + weights.get(f"{name}_proj.bias", 0)

    def heads(name: str, vector: Tensor, position: int | None = None) -> list[Tensor]:
        """Normed, and rotated where there is a position."""
        vector = projected(name, vector)
        if qk_norm == "full" and name in "qk":
            vector = normed(vector, weights[f"{name}_norm.weight"], eps)
        found = vector.split(head_dim)
        if qk_norm == "head" and name in "qk":
            found = [normed(head, weights[f"{name}_norm.weight"], eps) for head in found]
        if position is None:
            return list(found)
        return [
            torch.cat((turned(head[:rotary_dim], position, interleaved, theta), head[rotary_dim:])) for head in found
        ]

    out, latents = torch.zeros_like(x), list(weights.get("latents", ()))
    for row, token in real.nonzero().tolist():
        seen = [other for other in range(token + 1) if real[row, other] and (not window or token - other < window)]
        keys = [heads("k", one) for one in latents] + [heads("k", x[row, o], positions[row, o]) for o in seen]
        values = [heads("v", one) for one in [*latents, *x[row, seen]]]
        queries = heads("q", x[row, token], positions[row, token])
        shared = len(queries) // len(keys[0])
        found = [
            average(query, [key[n // shared] for key in keys], [value[n // shared] for value in values], head_dim**-0.5)
            for n, query in enumerate(queries)
        ]
        out[row, token] = projected("o", torch.cat(found))
    return out


def latent_attention(
    weights: dict[str, Tensor], x: Tensor, real: Tensor, nope: int, rope: int, width: int, *,
    interleaved: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Multi-head latent attention, (B, S, D), with values of that width; rows of padding are 0."""
    positions, rank = positions_of(real), len(weights["kv_a_layernorm.weight"])

    def projected(name: str, vector: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ vector + weights.get(f"{name}.bias", 0)

    def queries(vector: Tensor, position: int) -> list[Tensor]:
        if "q_a_proj.weight" in weights:
            compressed = normed(projected("q_a_proj", vector), weights["q_a_layernorm.weight"], 1e-6)
            vector = projected("q_b_proj", compressed)
        else:
            vector = projected("q_proj", vector)
        return [torch.cat((one[:nope], turned(one[nope:], position, interleaved))) for one in vector.split(nope + rope)]

    def keys_and_values(vector: Tensor, position: int) -> list[tuple[Tensor, Tensor]]:
        compressed = projected("kv_a_proj_with_mqa", vector)
        shared = turned(compressed[rank:], position, interleaved)
        vector = projected("kv_b_proj", normed(compressed[:rank], weights["kv_a_layernorm.weight"], 1e-6))
        return [(torch.cat((one[:nope], shared)), one[nope:]) for one in vector.split(nope + width)]

    out = torch.zeros_like(x)
    for row, token in real.nonzero().tolist():
        seen = [keys_and_values(x[row, o], positions[row, o]) for o in range(token + 1) if real[row, o]]
        found = [
            average(query, *map(list, zip(*(one[n] for one in seen), strict=True)), scale or (nope + rope) ** -0.5)
            for n, query in enumerate(queries(x[row, token], positions[row, token]))
        ]
        out[row, token] = projected("o_proj", torch.cat(found))
    return out


def routing(
    logits: Tensor, bias: list[float], top_k: int, *, score: str = "softmax", normalizes: bool = True,
    scaling: float = 1.0, groups: int = 1, top_groups: int = 1,
) -> tuple[list[int], Tensor]:  # fmt: skip
    """Expert ids and weights of one token; groups by the sum of their two best biased scores."""
    powers = (logits - logits.max()).exp()
    scores = list(1 / (1 + torch.exp(-logits)) if score == "sigmoid" else powers / powers.sum())
    biased = [one.item() + shift for one, shift in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    worth = [sum(sorted(biased[group * size : (group + 1) * size])[-2:]) for group in range(groups)]
    open_groups = sorted(range(groups), key=lambda group: -worth[group])[:top_groups]
    allowed = [expert for expert in range(len(scores)) if expert // size in open_groups]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[:top_k]
    total = sum(scores[expert] for expert in chosen) if normalizes else 1
    return chosen, torch.stack([scores[expert] / total * scaling for expert in chosen])


def expert_layer(
    x: Tensor, router: Tensor, first: Tensor, down: Tensor, bias: list[float], top_k: int
) -> tuple[Tensor, list[int]]:
    """Each token's weighted sum over its experts (T, D), and the slots of each expert. `first` is (E, F, D), or
    (E, 2F, D) of gated experts, the gate's rows first; `down` is (E, D, F)."""
    width, slots, outputs = down.shape[2], [0] * len(first), []
    for token in x:
        chosen, shares = routing(router @ token, bias, top_k)
        output = torch.zeros_like(token)
        for expert, share in zip(chosen, shares, strict=True):
            gated = first.shape[1] == 2 * width
            inside = silu(first[expert, :width] @ token) * (first[expert, width:] @ token if gated else 1)
            output = output + share * (down[expert] @ inside)
            slots[expert] += 1
        outputs.append(output)
    return torch.stack(outputs) if outputs else x * 0, slots
