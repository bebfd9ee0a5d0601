"""eefast.online.UCB: regret on streams with known means, determinism by seed, state, refused confidences."""

import json
from math import log, sqrt

import pytest
import torch

from eefast import Profiles
from eefast.online import UCB
from eefast.result import ExitResult

PROFILES = Profiles(eco=[0.5], full=[0.9])
THREE = Profiles(eco=[0.5], normal=[0.7], full=[0.9])


def answered(confidence, cost):
    """Answers with these confidences, all of this cost."""
    confidence = torch.as_tensor(confidence, dtype=torch.float32)
    n = len(confidence)
    return ExitResult(torch.zeros(n, 2), torch.zeros(n, dtype=torch.int64), confidence, torch.full((n,), cost))


def played(bandit, means, costs, rounds, seed, size=1):
    """The profiles that a bandit chooses on a stationary stream: confidences are 0 or 1 with these means."""
    random, chosen = torch.Generator().manual_seed(seed), []
    for _ in range(rounds):
        name = bandit.choose()
        confidence = (torch.rand(size, generator=random) < means[name]).float()
        bandit.update(answered(confidence, costs[name]))
        chosen.append(name)
    return chosen


@pytest.mark.parametrize(("price", "best"), [(0.0, "full"), (1.0, "eco")])
def test_regret_of_two_arms_with_known_means(price, best):
    """Mean regret over 5 streams of 2,000 images within UCB1's bound, and far below that of choosing at random.

    Auer et al. 2002, Theorem 1, which holds for bonus √2 and rewards within a range of 1:
    8 ln T / gap + (1 + π²/3) gap.
    """
    means, costs = {"eco": 0.5, "full": 0.8}, {"eco": 0.2, "full": 0.8}
    rewards = {name: means[name] - price * costs[name] for name in means}
    gap = abs(rewards["eco"] - rewards["full"])
    regrets = []
    for seed in range(5):
        chosen = played(UCB(PROFILES, price, bonus=sqrt(2), seed=seed), means, costs, 2000, seed)
        regrets.append(gap * sum(name != best for name in chosen))
    assert sum(regrets) / 5 <= 8 * log(2000) / gap + (1 + 3.29) * gap
    assert sum(regrets) / 5 < 0.4 * gap * 1000


def test_choices_follow_the_formula():
    """Each choice recomputed from the list of all rewards so far."""
    bandit, random = UCB(THREE, 0.3, bonus=0.5, seed=1), torch.Generator().manual_seed(0)
    rewards: dict[str, list[float]] = {name: [] for name in THREE}
    for step in range(60):
        name = bandit.choose()
        if step >= 3:
            total = sum(map(len, rewards.values()))
            values = {p: sum(r) / len(r) + 0.5 * sqrt(log(total) / len(r)) for p, r in rewards.items()}
            assert name == max(values, key=lambda p: values[p])
        confidence = torch.rand(1 + step % 7, generator=random)
        bandit.update(answered(confidence, 0.25))
        rewards[name] += [float(c) - 0.3 * 0.25 for c in confidence]
    assert all(rewards.values())


def test_each_profile_is_tried_once_in_an_order_of_the_seed():
    firsts = {seed: tuple(played(UCB(THREE, 0, seed=seed), dict.fromkeys(THREE, 1), dict.fromkeys(THREE, 0.5), 3, 0))
              for seed in range(20)}  # fmt: skip
    assert {tuple(sorted(names)) for names in firsts.values()} == {tuple(sorted(THREE))}
    assert len(set(firsts.values())) > 1


def test_the_same_seed_chooses_alike_whatever_the_order_of_the_table():
    means, costs = {"eco": 0.5, "normal": 0.6, "full": 0.65}, {"eco": 0.1, "normal": 0.2, "full": 1.0}
    turned = Profiles({name: THREE[name] for name in reversed(list(THREE))})
    runs = [played(UCB(table, 0.1, seed=5), means, costs, 200, 7, size=3) for table in (THREE, THREE, turned)]
    assert runs[0] == runs[1] == runs[2]


def test_the_choice_stays_until_an_update():
    bandit = UCB(THREE, 0)
    assert bandit.choose() == bandit.choose()


@pytest.mark.parametrize("before", [0, 1, 2, 50])
def test_the_state_goes_through_json_and_on_alike(before):
    means, costs = {"eco": 0.5, "normal": 0.6, "full": 0.65}, {"eco": 0.1, "normal": 0.2, "full": 1.0}
    one, other = UCB(THREE, 0.1, seed=3), UCB(THREE, 0.1, seed=4)
    played(one, means, costs, before, 0)
    one.choose()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    other.update(answered([0.5], 0.5))  # of the profile that `one` chose
    one.update(answered([0.5], 0.5))
    assert played(one, means, costs, 50, 1) == played(other, means, costs, 50, 1)
    assert one.state_dict() == other.state_dict()


def test_another_profile_than_the_chosen_one_can_have_answered():
    bandit = UCB(PROFILES, 0)
    bandit.update(answered([0.9, 0.9], 0.5), "eco")
    assert bandit.choose() == "full"
    assert bandit.state_dict()["images"] == {"eco": 2, "full": 0}


def test_the_state_handed_out_may_be_changed():
    bandit = UCB(PROFILES, 0)
    bandit.state_dict()["images"]["eco"] = 5
    assert bandit.state_dict()["images"]["eco"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Profiles(), 0.1), "profiles is empty"),
        (
            (PROFILES.of("entropy"), 0.1),
            "criterion 'entropy', which is no confidence in 0 … 1; take one of learned, max_",
        ),
        ((PROFILES, -0.1), "price=-0.1 must be finite and at least 0"),
        ((PROFILES, float("nan")), "price=nan must be finite"),
        ((PROFILES, 0.1, float("inf")), "bonus=inf must be finite"),
        ((PROFILES, 0.1, -1.0), "bonus=-1.0 must be finite and at least 0"),
    ],
    ids=["empty", "entropy", "price below 0", "price NaN", "bonus infinite", "bonus below 0"],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        UCB(*arguments)


@pytest.mark.parametrize("value", [1.5, -0.25, float("nan"), float("inf")])
def test_confidences_out_of_range_are_refused_and_change_nothing(value):
    bandit = UCB(PROFILES, 0.1)
    bandit.choose()
    with pytest.raises(ValueError, match=r"1 of 3 confidences are not in 0 … 1, such as"):
        bandit.update(answered([0.0, value, 1.0], 0.5))
    assert sum(bandit.state_dict()["images"].values()) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_costs_that_are_not_finite_change_nothing(value):
    bandit = UCB(PROFILES, 0.1)
    before = bandit.choose(), bandit.state_dict()
    with pytest.raises(ValueError, match=r"result\.cost holds a number that is not finite"):
        bandit.update(answered([0.0, 1.0], value))
    assert (bandit.choose(), bandit.state_dict()) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"chosen": "gold"},
        {"images": {"eco": -1, "full": 0}},
        {"images": {"eco": 1.5, "full": 0}},
        {"images": {"eco": "x", "full": 0}},
        {"reward": {"eco": float("nan"), "full": 0.0}},
        {"reward": {"eco": None, "full": 0.0}},
    ],
    ids=str,
)
def test_a_state_of_other_values_is_refused_and_changes_nothing(changes):
    bandit = UCB(PROFILES, 0.1)
    before = bandit.state_dict()
    with pytest.raises(ValueError, match=r"the state has chosen=.*; give the state_dict\(\) of a bandit"):
        bandit.load_state_dict({**before, **changes})
    assert bandit.state_dict() == before


@pytest.mark.parametrize(
    "changes", [{"order": ["eco", "full", "eco"]}, {"order": 3}, {"images": ["eco", "full"]}, {"reward": 1}], ids=str
)
def test_a_state_of_another_shape_is_refused(changes):
    bandit = UCB(PROFILES, 0.1)
    with pytest.raises(ValueError, match="the state is of the profiles"):
        bandit.load_state_dict({**bandit.state_dict(), **changes})


def test_an_update_without_a_profile_is_refused():
    with pytest.raises(ValueError, match="no profile has been chosen; call choose first"):
        UCB(PROFILES, 0.1).update(answered([0.5], 0.5))
    with pytest.raises(ValueError, match="profile='gold' is unknown; choose one of"):
        UCB(PROFILES, 0.1).update(answered([0.5], 0.5), "gold")


@pytest.mark.parametrize("part", ["order", "images", "reward"])
def test_a_state_of_other_profiles_is_refused(part):
    state = UCB(PROFILES, 0.1).state_dict()
    with pytest.raises(ValueError, match="the state is of the profiles"):
        UCB(PROFILES, 0.1).load_state_dict({**state, part: UCB(THREE, 0.1).state_dict()[part]})
    with pytest.raises(ValueError, match="the state is of the profiles"):
        UCB(PROFILES, 0.1).load_state_dict({k: v for k, v in state.items() if k != part})
