import itertools

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb as glm_rotary
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

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


def table_of(positions, scaling, *lengths, interleaved=False, **options):
    frequencies, factor = frequencies_for(scaling, *lengths)
    return rotary_table(positions, frequencies, factor, torch.float32, interleaved, **options)


def test_scaled_frequencies_are_those_of_transformers():
    for scaling, length in itertools.product(SCALINGS, (5, MAX_POSITIONS, MAX_POSITIONS + 1, 500)):
        theirs = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
        expected, expected_factor = theirs(llama_config(scaling), "cpu", seq_len=length)
        frequencies, factor = frequencies_for(scaling, length)
        torch.testing.assert_close(frequencies[0], expected, rtol=2e-6, atol=0, msg=named((scaling, length)))
        assert factor == pytest.approx(expected_factor), scaling


def test_dynamic_frequencies_are_unscaled_up_to_the_maximum_and_lower_beyond_it():
    plain, _ = frequencies_for(None, 1)
    scaled, _ = frequencies_for({"rope_type": "dynamic", "factor": 3.0}, 1, MAX_POSITIONS, MAX_POSITIONS + 1, 500)
    torch.testing.assert_close(scaled[:2], plain.expand(2, -1), rtol=1e-6, atol=0)
    assert (scaled[2, 1:] < plain[0, 1:]).all()
    assert (scaled[3, 1:] < scaled[2, 1:]).all()


def test_rotation_of_halves_is_llamas():
    torch.manual_seed(0)
    length = MAX_POSITIONS + 40
    positions = torch.arange(length).unsqueeze(0)
    query, key = torch.randn(2, length, 4, HEAD_DIM), torch.randn(2, length, 2, HEAD_DIM)
    for scaling in (None, *SCALINGS):
        cos, sin = LlamaRotaryEmbedding(llama_config(scaling))(query, positions)
        expected = llama_rotary(query, key, cos, sin, unsqueeze_dim=2)
        rotary = table_of(positions, scaling, length)
        for x, exact in zip((query, key), expected, strict=True):
            torch.testing.assert_close(apply_rotary(x, rotary, False), exact, rtol=1e-4, atol=1e-4, msg=named(scaling))


def test_rotation_of_neighbours_is_gptjs():
    torch.manual_seed(0)
    x = torch.randn(2, 30, 3, HEAD_DIM)
    positions = torch.arange(30).unsqueeze(0)
    angles = positions[0].float().unsqueeze(1) * frequencies_for(None, 30)[0]
    expected = gptj_rotary(x, angles.sin().unsqueeze(0), angles.cos().unsqueeze(0))
    torch.testing.assert_close(apply_rotary(x, table_of(positions, None, 30, interleaved=True), True), expected)
    assert not torch.allclose(apply_rotary(x, table_of(positions, None, 30), False), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_of_a_rotation_is_right(interleaved):
    torch.manual_seed(0)
    frequencies, factor = rope_frequencies(4, 10.0, None, MAX_POSITIONS, torch.tensor([3]))
    table = rotary_table(torch.arange(3).unsqueeze(0), frequencies, factor, torch.float64, interleaved, 1)
    for width, at_end in ((4, False), (7, False), (7, True)):
        x = torch.randn(2, 4, 2, width, dtype=torch.float64, requires_grad=True)
        # Not in its fast mode, which let a wrong gradient of the interleaved layout pass.
        assert torch.autograd.gradcheck(lambda x, end=at_end: apply_rotary(x, table, interleaved, end), (x,))


def test_a_rotation_of_the_first_dimensions_is_glms():
    torch.manual_seed(0)
    positions = torch.arange(9).unsqueeze(0)
    query, key = torch.randn(2, 9, 4, 2 * HEAD_DIM), torch.randn(2, 9, 2, 2 * HEAD_DIM)
    cos, sin = LlamaRotaryEmbedding(llama_config(None))(query, positions)
    expected = glm_rotary(query, key, cos, sin, unsqueeze_dim=2)
    rotary = table_of(positions, None, 9)
    for x, exact in zip((query, key), expected, strict=True):
        torch.testing.assert_close(apply_rotary(x, rotary, False), exact)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_part_of_each_head_is_rotated_as_if_alone_and_the_rest_stays(interleaved):
    torch.manual_seed(0)
    part, rest = torch.randn(2, 9, 3, HEAD_DIM), torch.randn(2, 9, 3, 6)
    rotary = table_of(torch.arange(9).unsqueeze(0), None, 9, interleaved=interleaved)
    rotated = apply_rotary(part, rotary, interleaved)
    for at_end in (False, True):
        whole, expected = (torch.cat((rest, one) if at_end else (one, rest), -1) for one in (part, rotated))
        given = whole.clone()
        assert torch.equal(apply_rotary(whole, rotary, interleaved, at_end), expected), at_end
        assert torch.equal(whole, given), at_end


def test_the_scale_of_the_scores_is_deepseeks():
    for scaling in (None, *SCALINGS):
        expected = yarn_apply_mscale(scaling or {}, 24**-0.5)
        assert softmax_scale(24, scaling) == pytest.approx(expected, rel=1e-12), scaling


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_stands_before_the_positions_is_not_rotated(interleaved):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, HEAD_DIM)
    positions = torch.arange(6).unsqueeze(0)
    rotated = apply_rotary(x, table_of(positions, None, 6, interleaved=interleaved, num_unrotated=3), interleaved)
    assert torch.equal(rotated[:, :3], x[:, :3])
    alone = apply_rotary(x[:, 3:], table_of(positions, None, 6, interleaved=interleaved), interleaved)
    assert torch.equal(rotated[:, 3:], alone)


def test_each_row_is_rotated_by_its_own_positions_and_length():
    torch.manual_seed(0)
    scaling = {"rope_type": "dynamic", "factor": 3.0}
    x = torch.randn(2, 4, 1, HEAD_DIM)
    positions = torch.tensor([[0, 1, 2, 3], [196, 197, 198, 199]])
    both = apply_rotary(x, table_of(positions, scaling, 4, 200), False)
    for row, length in enumerate((4, 200)):
        rotary = table_of(positions[row : row + 1], scaling, length)
        alone = apply_rotary(x[row : row + 1], rotary, False)
        torch.testing.assert_close(both[row : row + 1], alone, msg=named(length))


def test_angles_are_taken_in_fp32_and_only_the_table_has_the_models_dtype():
    positions = torch.tensor([[0, 1, 1001]])
    frequencies, factor = frequencies_for(None, 1002)
    fine = rotary_table(positions, frequencies, factor, torch.float32, False)
    coarse = rotary_table(positions, frequencies, factor, torch.bfloat16, False)
    for exact, rounded in zip(fine, coarse, strict=True):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded, exact.to(torch.bfloat16), rtol=0, atol=0)
