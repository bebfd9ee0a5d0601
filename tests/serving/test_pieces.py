"""Where a run of the resident engine is cut, and that its pieces together are the run."""

import pytest
import torch
from networks import lived_in

import eefast
from eefast.serving.pieces import Piece, cuts, measure, pieces_of, stops


@pytest.mark.parametrize(
    ("costs", "may_stop", "pieces"),
    [
        ([0.06, 0.06, *[0.04] * 6, 0.66], range(8), [(0, 0), (1, 7), (8, 8)]),
        ([1.0, 1.0, 1.0], [0, 1], [(0, 0), (1, 1), (2, 2)]),
        ([0.1, 0.1, 0.1, 0.1, 0.4], [0, 1, 2, 3], [(0, 0), (1, 2), (3, 3), (4, 4)]),
        ([0.1, 0.1, 0.1, 0.8], [1], [(0, 1), (2, 3)]),
        ([0.1, 0.1, 0.1, 0.8], [0, 2], [(0, 0), (1, 2), (3, 3)]),
        ([0.8, 0.3, 0.1, 0.1], [0, 1, 2], [(0, 0), (1, 2), (3, 3)]),
        ([0.1, 0.9], [], [(0, 1)]),
        ([1.0], [], [(0, 0)]),
    ],
)
def test_pieces_hold_all_stages_and_the_first_one_the_first(costs, may_stop, pieces):
    assert pieces_of(costs, list(may_stop)) == pieces


def test_engines_that_cannot_stop_have_one_piece(small):
    net, _ = small
    assert cuts(eefast.accelerate(net, engine="compact").engine) == [(0, 2)]
    carries = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12)).with_criterion("patience"), 3)
    assert cuts(eefast.accelerate(carries, engine="resident").engine) == [(0, 2)]
    engine = eefast.accelerate(net, engine="resident").engine
    assert cuts(engine)[0] == (0, 0)
    assert stops(engine) == [0, 1]


def test_pieces_one_after_the_other_answer_as_the_whole_run(small):
    net, x = small
    engine = eefast.accelerate(net, engine="resident").engine
    limits = torch.full((2,), 2.0)
    whole, features = engine.run(x[:5], limits), x[:5]
    for i in range(3):
        piece = Piece(engine, i, i)
        assert piece.final == (i == 2)
        logits, confidence, exits, features = piece.run(features, limits[i : i + 1])
        assert sorted(exits.tolist()) == ([0] * 5 if piece.final else [1, 2, 3, 4, 5])
        features = features if features is None else features[exits - 1]
    assert features is None
    assert torch.equal(logits, whole.logits)
    assert torch.equal(confidence, whole.confidence)


def test_durations_are_those_of_every_exit_of_a_piece(small, monkeypatch):
    engine, clock, run = eefast.accelerate(small[0], engine="resident").engine, [0.0], Piece.run

    def slow(piece, x, limits):
        found = run(piece, x, limits)
        clock[0] += 1.0 + min(int(found[2][0]), piece.last - piece.first)
        return found

    monkeypatch.setattr(Piece, "run", slow)
    pieces = [Piece(engine, 0, 0), Piece(engine, 1, 2)]
    measure(pieces, lambda: clock[0])
    assert [piece.durations.seconds for piece in pieces] == [[1.0], [1.0, 2.0]]
