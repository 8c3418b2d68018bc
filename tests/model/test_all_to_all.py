"""What ranks send each other: each token once to each rank, while the shared experts are computed. That it is right is
in test_expert_parallel.py."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from operators import Operators, traced
from ranks import run_ranks

from megamoe.config.model import load_preset
from megamoe.data.document_bounds import Documents
from megamoe.model.all_to_all import AllToAll, lay_out_sends
from megamoe.model.decoder import Decoder
from megamoe.model.topology import ExpertTopology

CHOICES, EXPERTS = 3, 8
CONFIG = load_preset("tiny").model_copy(
    update={"num_hidden_layers": 1, "num_local_experts": EXPERTS, "num_experts_per_tok": CHOICES}
)


def decoder(ep_size, **changes):
    model = Decoder(CONFIG.model_copy(update=changes), 0, ExpertTopology(EXPERTS, ep_size, ep_size, dist.get_rank()))
    for layer in model.moe_layers():
        layer.set_deepspeed_parallelism()
    return model


def sent_in_a_step(ep_size):
    """Of this rank: (bytes that each all-to-all sends, pairs of a token and a rank that has experts of it)."""
    model, sent = decoder(ep_size), []
    chosen = mock.Mock(wraps=lay_out_sends)
    plain = dist.all_to_all_single

    def counted(received, given, *args, **options):
        sent.append(given.nbytes)
        return plain(received, given, *args, **options)

    torch.manual_seed(dist.get_rank())
    ids = torch.randint(CONFIG.vocab_size, (2, 16))
    with mock.patch.object(dist, "all_to_all_single", counted), mock.patch("megamoe.model.moe.lay_out_sends", chosen):
        model(ids, ids).backward()
    owners = (chosen.call_args.args[0] // (EXPERTS // ep_size)).tolist()
    return sent, sum(len(set(one)) for one in owners)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_token_is_sent_once_to_each_rank_and_a_slot_has_8_bytes(ranks):
    slots = 2 * 16 * CHOICES
    of_ranks = run_ranks(ranks, sent_in_a_step, ranks)
    for sent, pairs in of_ranks:
        assert pairs < slots
        rows, of_slots = 4 * pairs * CONFIG.hidden_size, 8 * slots
        counts, weights, there, *_ = sent
        assert (counts, weights, there) == (8 * (EXPERTS + ranks), of_slots, rows)
    # What comes back, and the gradients of what came back, are the others' rows and this rank's again.
    forward, back, of_back, of_rows, of_weights = (sum(sent[call] for sent, _ in of_ranks) for call in range(2, 7))
    assert forward == back == of_back == of_rows
    assert of_weights == ranks * of_slots


class Log(Operators):
    """The order of GEMMs of the shared experts, of what begins and waits for rows, and of the experts' GEMMs."""

    def __init__(self, shared_size):
        super().__init__()
        self.shared_size, self.events = shared_size, []

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def _add(self, name, args, kwargs, out):
        if name == "mm" and self.shared_size in (*args[0].shape, *args[1].shape):
            self.events.append("shared")
        elif name == "_grouped_mm":
            self.events.append("experts")

    def of(self, method, name):
        def logged(way, *args):
            self.events.append(name)
            return method(way, *args)

        return logged


def orders_of_events(compiled, has_padding):
    """Of passes without and with recomputed activations."""
    torch._dynamo.reset()
    model = decoder(2, n_shared_experts=1, gated_mlp=True)
    if compiled:
        with traced():
            model.compile_blocks()
    ids = torch.randint(CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    documents = Documents.of([np.array([5])] * 2, [12, 16], 16) if has_padding else None
    model(ids, ids, documents=documents).backward()  # compiles
    return [order_of_events(model, ids, documents, recompute) for recompute in (0, 1)]


def order_of_events(model, ids, documents, recompute):
    model.recompute_blocks, log = recompute, Log(model.config.shared_size)
    start, wait = log.of(AllToAll.start, "begin"), log.of(AllToAll.wait, "wait")
    with mock.patch.multiple(AllToAll, start=start, wait=wait), log:
        loss = model(ids, ids, documents=documents)
        log.events.append("backward")
        loss.backward()
    return log.events


FORWARD = ["begin", "begin", "wait", "shared", "shared", "shared", "wait", "experts", "experts", "begin", "wait"]
BACKWARD = ["begin", "wait", *["experts"] * 4, "begin", *["shared"] * 6, "begin", "wait", "wait"]


# A rank may have padding where another has none: their collectives come in one order.
@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_shared_experts_are_computed_while_rows_travel_both_ways(compiled, has_padding):
    for plain, recomputed in run_ranks(2, orders_of_events, compiled, has_padding):
        assert plain == [*FORWARD, "backward", *BACKWARD]
        # Not as far as results are sent back again.
        assert recomputed == [*FORWARD, "backward", *BACKWARD[:2], *FORWARD[:-2], *BACKWARD[2:]]
