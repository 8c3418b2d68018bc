import itertools

import pytest
import torch
from formulas import turned
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from megamoe.model.rope import apply_rotary, rope_frequencies, rotary_table, softmax_scale

HEAD_DIM, THETA, MAX_POSITIONS = 64, 10_000.0, 128
SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 20, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
]  # fmt: skip


def named(case):
    """A message of torch's comparison that names the case."""
    return lambda said: f"{case}: {said}"


def llama_config(scaling):
    return LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA, **(scaling or {})},
    )


def frequencies_for(scaling, *lengths):
    return rope_frequencies(HEAD_DIM, THETA, scaling, MAX_POSITIONS, torch.tensor(lengths))


def test_scaled_frequencies_are_those_of_transformers():
    for scaling, length in itertools.product(SCALINGS, (5, MAX_POSITIONS, MAX_POSITIONS + 1, 500)):
        theirs = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
        expected, expected_factor = theirs(llama_config(scaling), "cpu", seq_len=length)
        frequencies, factor = frequencies_for(scaling, length)
        torch.testing.assert_close(frequencies[0], expected, rtol=2e-6, atol=0, msg=named((scaling, length)))
        assert factor == pytest.approx(expected_factor), scaling


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers_and_other_dimensions_and_unrotated_positions_stay(interleaved):
    torch.manual_seed(0)
    for rest, at_end in ((0, False), (6, False), (6, True)):
        x = torch.randn(2, 9, 3, HEAD_DIM + rest)
        given, rotated = x.clone(), slice(rest, None) if at_end else slice(HEAD_DIM)
        positions, (frequencies, _) = torch.arange(6).unsqueeze(0), frequencies_for(None, 6)
        rotary = rotary_table(positions, frequencies, 0.8, torch.float32, interleaved, num_unrotated=3)
        found, expected = apply_rotary(x, rotary, interleaved, at_end), x.double()
        for row, position, head in itertools.product(range(2), range(6), range(3)):
            vector = expected[row, 3 + position, head, rotated]
            vector.copy_(0.8 * turned(vector.clone(), position, interleaved, THETA))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
        assert torch.equal(x, given)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_of_a_rotation_is_right(interleaved):
    torch.manual_seed(0)
    frequencies, factor = rope_frequencies(4, 10.0, None, MAX_POSITIONS, torch.tensor([3]))
    table = rotary_table(torch.arange(3).unsqueeze(0), frequencies, factor, torch.float64, interleaved, 1)
    for width, at_end in ((4, False), (7, False), (7, True)):
        x = torch.randn(2, 4, 2, width, dtype=torch.float64, requires_grad=True)
        # Not in its fast mode, which let a wrong gradient of the interleaved layout pass.
        assert torch.autograd.gradcheck(lambda x, end=at_end: apply_rotary(x, table, interleaved, end), (x,))


def test_the_scale_of_the_scores_is_deepseeks():
    for scaling in (None, *SCALINGS):
        expected = yarn_apply_mscale(scaling or {}, 24**-0.5)
        assert softmax_scale(24, scaling) == pytest.approx(expected, rel=1e-12), scaling


def test_angles_are_taken_in_fp32_and_only_the_table_has_the_models_dtype():
    positions = torch.tensor([[0, 1, 1001]])
    frequencies, factor = frequencies_for(None, 1002)
    fine = rotary_table(positions, frequencies, factor, torch.float32, False)
    coarse = rotary_table(positions, frequencies, factor, torch.bfloat16, False)
    for exact, rounded in zip(fine, coarse, strict=True):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded, exact.to(torch.bfloat16), rtol=0, atol=0)
