import pytest
import torch
from exported import random_decoder
from model_parts import model_of

from megamoe.model.generation import filter_logits, generate, sample, stream
from megamoe.utils.errors import UserError

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5, 8, 9, 7, 9, 3]]


def small_model(**changes):
    return random_decoder(model_of("latent_tokens", **{"max_position_embeddings": 24, **changes}), std=0.4).double()


@torch.no_grad()
def greedy_by_full_passes(model, prompt, steps):
    """The largest logit of a pass over everything so far, again and again, without a cache."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def kept(logits):
    return [{token for token, logit in enumerate(row) if logit > -torch.inf} for row in logits.tolist()]


def nucleus(row, top_p):
    """Tokens from the likeliest on, until their probability reaches `top_p`."""
    probabilities = torch.tensor(row, dtype=torch.float64).softmax(0).tolist()
    tokens, reached = set(), 0.0
    for token in sorted(range(len(row)), key=lambda token: -row[token]):
        tokens.add(token)
        reached += probabilities[token]
        if reached >= top_p:
            break
    return tokens


def test_top_k_keeps_the_k_largest_and_top_p_the_smallest_set_that_reaches_p_as_they_are():
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 20)
    rows = logits.tolist()
    cases = [(k, None, [set(sorted(range(20), key=lambda t, row=row: -row[t])[:k]) for row in rows])
             for k in (1, 3, 19, 20, 50)]  # fmt: skip
    # The largest always stays.
    cases += [(None, p, [nucleus(row, p) for row in rows]) for p in (0.0, 1e-12, 0.01, 0.3, 0.5, 0.9, 0.99)]
    cases += [(None, p, [set(range(20))] * 6) for p in (None, 1.0)]
    for top_k, top_p, expected in cases:
        filtered = filter_logits(logits, top_k, top_p)
        assert kept(filtered) == expected, (top_k, top_p)
        assert torch.equal(filtered[filtered > -torch.inf], logits[filtered > -torch.inf])


def test_samples_come_as_often_as_temperature_top_k_and_top_p_of_what_top_k_left_say():
    # At temperature 1/2 the probabilities are squared: 16 : 9 : 4 : 1. Of the first three, the first two have 25/29 =
    # 0.86 and suffice; of all four they would have 25/30 = 0.83.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(20_000, 4)
    drawn = sample(logits, 0.5, 3, 0.85, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.64, 0.36, 0.0, 0.0]), rtol=0, atol=0.02)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 4.0}], ids=["plain", "dynamic"])
def test_temperature_0_is_the_argmax_of_full_passes_for_prompts_of_different_lengths_together_or_alone(scaling):
    # With a scaling the text goes beyond max_position_embeddings, and frequencies are those of the end.
    model = small_model(rope_scaling=scaling, max_position_embeddings=6 if scaling else 24)
    model = model.train()  # which leaves dropout and jitter out all the same
    model.layers[0].moe.experts.dropout.p = model.routers()[0].jitter_noise = 0.5
    together = generate(model, PROMPTS, 12, temperature=0)
    assert together == [generate(model, [prompt], 12, temperature=0)[0] for prompt in PROMPTS]
    assert together == generate(model, PROMPTS, 12, top_k=1)
    if not scaling:
        assert together == [greedy_by_full_passes(model, prompt, 12) for prompt in PROMPTS]


def test_the_text_depends_on_the_given_seed_alone():
    model, texts = small_model(), []
    for state, seed in ((1, 1), (2, 1), (2, 2)):
        torch.manual_seed(state)
        texts.append(generate(model, PROMPTS, 12, temperature=2.0, seed=seed))
    one, same, other = texts
    assert one == same
    assert all(row != other_row for row, other_row in zip(one, other, strict=True))


def test_a_row_stops_at_end_of_text_and_the_others_go_on():
    model = small_model()
    free = generate(model, PROMPTS, 12, temperature=0)
    end = free[0][4]
    expected = [row[: row.index(end)] if end in row else row for row in free]
    assert len({len(row) for row in expected}) > 1  # the rows do end at different places
    assert generate(model, PROMPTS, 12, temperature=0, end_of_text=end) == expected


def test_nothing_is_computed_after_every_row_has_stopped_on_all_ranks():
    model = small_model()
    end = generate(model, PROMPTS[:1], 1, temperature=0)[0][0]
    passes, asked = [], []
    model.register_forward_hook(lambda *_: passes.append(1))

    def after_five(done):
        asked.append(done)
        return len(asked) > 5

    for all_done, count in ((bool, 1), (after_five, 5)):
        passes.clear()
        assert generate(model, PROMPTS[:1], 12, temperature=0, end_of_text=end, all_done=all_done) == [[]]
        assert len(passes) == count
    assert asked == [False, True, True, True, True, True]


def test_tokens_come_one_by_one_each_after_one_pass():
    model, passes = small_model(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    rows = []
    for count, tokens in enumerate(stream(model, PROMPTS, 5, temperature=0), start=1):
        rows.append(tokens.tolist())
        assert len(passes) == count
    assert [list(row) for row in zip(*rows, strict=True)] == generate(model, PROMPTS, 5, temperature=0)


def test_a_text_may_be_as_long_as_the_model_and_no_longer():
    model = small_model()
    assert len(generate(model, [[1, 2, 3], [4]], 21)[0]) == 21
    with pytest.raises(UserError, match=r"25 tokens.*24"):
        generate(model, [[4], [1, 2, 3]], 22)


@pytest.mark.parametrize(
    ("prompts", "number", "options", "words"),
    [
        ([[1], []], 3, {}, "no tokens"),
        ([], 2, {}, "no prompt"),
        (PROMPTS, 0, {}, "max_new_tokens is 0.*1"),
        (PROMPTS, 2, {"temperature": -1.0}, "temperature is -1.0"),
        (PROMPTS, 2, {"temperature": float("nan")}, "temperature is nan"),
        (PROMPTS, 2, {"top_k": 0}, "top_k is 0"),
        (PROMPTS, 2, {"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_impossible_prompts_numbers_and_values_are_refused(prompts, number, options, words):
    with pytest.raises(UserError, match=words):
        generate(small_model(), prompts, number, **options)
