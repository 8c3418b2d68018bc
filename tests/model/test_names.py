import itertools
import math
import re

import torch
from model_parts import PARTS, model_of

from megamoe.model.decoder import Decoder
from megamoe.model.names import (
    engine_name,
    engine_parameters,
    engine_shape,
    is_buffer,
    is_projection,
    plain_name,
    plain_parts,
    stretches,
)
from megamoe.model.topology import ExpertTopology

SPLITS = [(model_of(part), ep_size) for part in PARTS for ep_size in (1, 2, 4)]


def engine(config, ep_size=1, rank=0):
    """The model of a rank, without values."""
    with torch.device("meta"):
        return Decoder(config, None, ExpertTopology(config.num_local_experts, ep_size, ep_size, rank))


def shapes_and_parts(model):
    return {
        name: (tuple(one.shape), plain_parts(name, tuple(one.shape), model.topology.first_expert))
        for name, one in model.named_parameters()
    }


def test_the_parts_cover_each_parameter_once_and_lead_back_to_the_parameters_of_the_engine():
    for config, ep_size in SPLITS:
        for rank in range(ep_size):
            expected = shapes_and_parts(engine(config, ep_size, rank))
            for shape, parts in expected.values():
                assert [part.count for part in parts] == [math.prod(part.shape) for part in parts]
                ends = list(itertools.accumulate((part.count for part in parts), initial=0))
                assert ends == [*(part.start for part in parts), math.prod(shape)]
            plain = {part.name: part.shape for _, parts in expected.values() for part in parts}
            found = engine_parameters(plain)
            assert {name: (engine_shape(name, parts), parts) for name, parts in found.items()} == expected
            assert list(found) == list(expected)
            assert engine_parameters(dict(reversed(plain.items()))) == found  # whatever their order


def test_the_values_of_any_stretch_are_found_in_their_parts():
    parts = plain_parts("layers.0.moe.deepspeed_moe.experts.gate_up", (3, 4, 2))
    at = [(part, value) for part in parts for value in range(part.count)]
    for start in range(len(at)):
        for count in range(1, len(at) - start + 1):
            found = list(stretches(parts, start, count))
            assert all(length for *_, length in found)
            values = [(part, first + value) for part, first, length in found for value in range(length)]
            assert values == at[start : start + count]


def test_a_plain_buffer_leads_back_to_the_engines_and_only_the_routers_statistics_are_buffers():
    found = [name for name in engine(model_of("latent_tokens")).state_dict() if is_buffer(name)]
    assert {name.rpartition(".")[2] for name in found} == {"selection_bias", "running_load"}
    assert len({re.sub(r"\d+", "N", name) for name in found}) == 2
    for name in found:
        assert is_buffer(plain_name(name))
        assert engine_name(plain_name(name)) == name


NOT_MUONS = ("embed_tokens", "lm_head", "router", "shared_gate", "latents", "model.mtp.proj")


def test_a_projection_is_a_matrix_of_attention_or_of_an_mlp_by_either_name():
    for part in PARTS:
        for name, (_, parts) in shapes_and_parts(engine(model_of(part))).items():
            for one in parts:
                is_other = any(word in one.name for word in NOT_MUONS)
                assert is_projection(one.name) == is_projection(name) == (len(one.shape) == 2 and not is_other), name
