"""Profiles, thresholds and last exits of a call, in every engine, against each image alone in a network of its own."""

import math
import threading

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds

import eefast
from eefast import EarlyExitNet, ExitResult, Profile, Profiles, criteria, zoo
from eefast.thresholds.calibration import Calibration

SHAPE = (3, 8, 8)
ENGINES = ["reference", "compact", "resident"]


def made(criterion: str = "learned", exits: int = 3, seed: int = 0) -> EarlyExitNet:
    net = lived_in(zoo.eenet("eenet20", exits, input_shape=SHAPE, criterion=criterion), seed)
    spread_thresholds(net, images(64, SHAPE), 0.4)
    return net.eval()


def table_of(net: EarlyExitNet) -> Profiles:
    own, never = tuple(net.thresholds.tolist()), net.criterion.never
    other = tuple(t + (0.05 if i % 2 else -0.05) for i, t in enumerate(own))
    n = net.num_exits
    return Profiles(
        full=[never] * n, normal=own, other=other, first=Profile(own, 0), second=Profile((never, *own[1:]), 1),
        eco=Profile(other, 2), all=Profile([never] * n, n),
    )  # fmt: skip


def alone(net: EarlyExitNet, x: torch.Tensor, rows: list[Profile]) -> ExitResult:
    """Each image in a network with its row of thresholds that ends at its last exit."""
    nets = [
        EarlyExitNet(
            list(net.stages[: last + 1]), list(net.heads[: last + 1]), input_shape=net.input_shape,
            criterion=net.criterion.name, costs=net.stage_costs[: last + 1],
        ).eval()
        for last in range(net.num_exits + 1)
    ]  # fmt: skip
    answers = []
    for image, row in zip(x.split(1), rows, strict=True):
        short = nets[-1 if row.last_exit is None else row.last_exit]
        short.thresholds = torch.tensor(row.thresholds[: short.num_exits])
        answers.append(one_by_one(short, image))
    logits, exits, values, _ = (torch.cat(part) for part in zip(*answers, strict=True))
    return ExitResult(logits, exits, values, net.cost[exits])


def assert_equal(got: ExitResult, expected: ExitResult) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.fixture(scope="module", params=criteria.CRITERIA)
def case(request):
    """A network with profiles, images, an id for each, and what it answers to each of them alone."""
    net = made(request.param)
    net.profiles = table_of(net)
    x = images(67, SHAPE)
    ids = torch.arange(67) * 5 % 7
    rows = [list(net.profiles.values())[i] for i in ids.tolist()]
    return net, x, ids, alone(net, x, rows)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.sampled(10)
def test_each_image_is_answered_by_its_profile(case, engine, dtype):
    net, x, ids, expected = case
    fast = eefast.accelerate(net, engine=engine)
    assert_same_answers(fast(x, profile=ids.to(dtype)), expected, net)
    assert len(set(expected.exit_index.tolist())) == net.num_exits + 1
    assert_same_answers(net(x, profile=ids.to(dtype)), expected, net)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.sampled(5)
def test_each_image_is_answered_by_its_profile_in_a_stream(case, engine):
    """Batches of all kinds: by ids, by a name, by the network's thresholds; of one image, of none."""
    net, x, ids, expected = case
    fast = eefast.accelerate(net, engine=engine)
    sizes, batches, wanted = (31, 0, 1, 13, 22), [], []
    for part, of_part, rows in zip(x.split(sizes), ids.split(sizes), torch.arange(67).split(sizes), strict=True):
        batches += [(part, of_part), part, (part, "eco"), (part, "other"), (part, {"profile": of_part})]
        of_each = ExitResult(*(p[rows] for p in expected))
        named = [net(part, profile=name) for name in ("eco", "other")]
        wanted += [of_each, net(part), *named, of_each]
    batches += [(x, ids)] * 14  # the slots of a merging stream are used again
    wanted += [expected] * 14
    for got, answer in zip(fast.stream(iter(batches)), wanted, strict=True):
        assert_same_answers(got, answer, net)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["full", "normal", "other", "first", "second", "eco", "all"])
@pytest.mark.sampled(8)
def test_a_named_profile_is_that_of_all_images(engine, name):
    net = made()
    net.profiles = table_of(net)
    x, row = images(31, SHAPE), net.profiles[name]
    fast = eefast.accelerate(net, engine=engine)
    got = fast(x, profile=name)
    assert_same_answers(got, alone(net, x, [row] * 31), net)
    if row.last_exit is not None:
        assert_equal(got, fast(x, thresholds=row.thresholds, exit_limit=row.last_exit))
        return
    assert_equal(got, fast(x, thresholds=row.thresholds))
    # The same bits as with thresholds of the network.
    net.thresholds.copy_(torch.tensor(row.thresholds))
    assert_equal(got, fast(x))
    assert_equal(fast(x, thresholds=torch.tensor([row.thresholds] * 31)), got)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_id_of_one_image_is_its_profile(engine, dtype):
    net = made()
    net.profiles = table_of(net)
    fast, x = eefast.accelerate(net, engine=engine), images(9, SHAPE)[5:6]
    net.thresholds.fill_(net.criterion.always)  # not those of the call
    for i, (name, row) in enumerate(net.profiles.items()):
        got = fast(x, profile=torch.tensor([i], dtype=dtype))
        assert_same_answers(got, alone(net, x, [row]), net)
        assert_equal(got, fast(x, profile=name))
        assert_equal(got, next(fast.stream([(x, torch.tensor([i], dtype=dtype))])))
    for wrong, found in ((-1, ValueError), (7, ValueError), (0.0, TypeError), (True, TypeError)):
        with pytest.raises(found, match="profile"):
            fast(x, profile=torch.tensor([wrong]))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exit_limit_is_a_last_exit(engine):
    net = made("margin")
    net.profiles = table_of(net)
    x, limits = images(31, SHAPE), torch.arange(31) % 4
    fast, own = eefast.accelerate(net, engine=engine), tuple(net.thresholds.tolist())
    expected = alone(net, x, [Profile(own, k) for k in limits.tolist()])
    for limit in (limits, limits.int(), limits.tolist()):
        assert_same_answers(fast(x, exit_limit=limit), expected, net)
    assert (expected.exit_index <= limits).all()
    assert_same_answers(fast(x, exit_limit=1), alone(net, x, [Profile(own, 1)] * 31), net)
    assert_equal(fast(x, exit_limit=3), fast(x))
    # The nearer of both ends.
    both = alone(net, x, [Profile(net.profiles["eco"].thresholds, min(k, 2)) for k in limits.tolist()])
    assert_same_answers(fast(x, profile="eco", exit_limit=limits), both, net)
    rows = torch.tensor([own, net.profiles["other"].thresholds]).repeat(16, 1)[:31]
    mixed = alone(net, x, [Profile(tuple(r), k) for r, k in zip(rows.tolist(), limits.tolist(), strict=True)])
    assert_same_answers(fast(x, thresholds=rows, exit_limit=limits), mixed, net)


@pytest.mark.parametrize("engine", ENGINES)
def test_images_of_nan_exit_where_they_must(engine):
    net = made()
    x = images(7, SHAPE)
    x[2] = math.nan
    fast = eefast.accelerate(net, engine=engine)
    got, clean = fast(x, exit_limit=[3, 3, 1, 3, 0, 2, 3]), fast(x)
    assert int(got.exit_index[2]) == 1
    assert int(clean.exit_index[2]) == 3
    assert got.logits[2].isnan().all()
    assert got.exit_index.tolist() == torch.minimum(clean.exit_index, torch.tensor([3, 3, 1, 3, 0, 2, 3])).tolist()


def test_quantised_networks_have_profiles():
    net = eefast.quantize(made("max_probability"), images(64, SHAPE))
    net.profiles = table_of(net)
    x, ids = images(31, SHAPE), torch.arange(31) % 7
    fast = eefast.accelerate(net, engine="resident")
    rows = [list(net.profiles.values())[i] for i in ids.tolist()]
    assert_same_answers(fast(x, profile=ids), net(x, profile=ids), net)
    assert_same_answers(fast(x, profile=ids), alone(net, x, rows), net)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_images_and_no_early_exits(engine):
    whole = made()
    net = EarlyExitNet([torch.nn.Sequential(*whole.stages)], [whole.heads[-1]], input_shape=SHAPE).eval()
    net.profiles = Profiles(only=[])
    fast, x = eefast.accelerate(net, engine=engine), images(3, SHAPE)
    assert_equal(fast(x, profile="only"), fast(x))
    assert_equal(fast(x, profile=[0, 0, 0], exit_limit=0), fast(x))
    net = made()
    net.profiles = table_of(net)
    got = eefast.accelerate(net, engine=engine)(x[:0], profile=torch.empty(0, dtype=torch.int64), exit_limit=[])
    assert got.logits.shape == (0, 10)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_mixes_under_threads(engine):
    """While others answer by other profiles, and tables, thresholds and ids change, every answer is of one of them."""
    net = made()
    table = table_of(net)
    tables = [table, Profiles({name: Profile(table["full"].thresholds, p.last_exit) for name, p in table.items()})]
    x, ids = images(16, SHAPE), torch.arange(16) % 7
    fast = eefast.accelerate(net, engine=engine)
    expected = []
    for table in tables:
        net.profiles = table
        expected.append(fast(x, profile=ids))
    wrong, done = [], threading.Event()

    def ask():
        for _ in range(25):
            got = fast(x, profile=ids.clone())
            if not any(
                torch.equal(got.exit_index, e.exit_index) and torch.equal(got.logits, e.logits) for e in expected
            ):
                wrong.append(got)

    def change():
        while not done.is_set():
            for table in tables:
                net.profiles = table

    changing, asking = threading.Thread(target=change), [threading.Thread(target=ask) for _ in range(2)]
    for thread in (changing, *asking):
        thread.start()
    for thread in asking:
        thread.join()
    done.set()
    changing.join()
    assert not wrong
    assert not torch.equal(expected[0].exit_index, expected[1].exit_index)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"profile": "echo"}, ValueError, "profile='echo' is unknown; the network has full, normal, other, first"),
        ({"profile": torch.zeros(4)}, TypeError, r"profile is torch\.float32; give int32 or int64"),
        ({"profile": torch.zeros(4, dtype=torch.bool)}, TypeError, r"profile is torch\.bool; give int32 or int64"),
        ({"profile": torch.tensor([0, 1, 2])}, ValueError, r"profile has shape \(3,\) for 4 images"),
        ({"profile": torch.tensor([0, 1, 2, 7])}, ValueError, r"profile reaches from 0 to 7; it must be in 0 … 6"),
        ({"profile": torch.tensor([0, 1, 2, -1])}, ValueError, r"profile reaches from -1 to 2; it must be in 0 … 6"),
        ({"profile": "eco", "thresholds": [0.5] * 3}, ValueError, "profile and thresholds are both given"),
        ({"thresholds": [0.5] * 2}, ValueError, r"thresholds has shape \(2,\); expected \(3,\) or .* \(4, 3\)"),
        ({"thresholds": [0.5, math.nan, 0.5]}, ValueError, "thresholds holds a NaN; .* give exit_limit"),
        ({"exit_limit": 4}, ValueError, r"exit_limit reaches from 4 to 4; it must be in 0 … 3"),
        ({"exit_limit": [0, 1, 2]}, ValueError, r"exit_limit has shape \(3,\) for 4 images"),
        ({"exit_limit": [0.5] * 4}, TypeError, r"exit_limit is torch\.float32"),
        (
            {"profile": ["eco"] * 4},
            TypeError,
            r"profile=\['eco', .* is no tensor .*; give int32 or int64, one per image",
        ),
        ({"exit_limit": [None] * 4}, TypeError, r"exit_limit=\[None, .* is no tensor .*; give int32 or int64"),
        ({"exit_limit": 2**70}, TypeError, r"exit_limit=\d+ is no tensor .*; give int32 or int64"),
        ({"thresholds": [None] * 3}, TypeError, r"thresholds=\[None, .* is no tensor .*; give numbers, one per early"),
    ],
)
@pytest.mark.parametrize("fast", [False, True], ids=["network", "accelerated"])
@pytest.mark.sampled(12)
def test_what_cannot_be_is_refused(arguments, error, message, fast):
    net = made()
    net.profiles = table_of(net)
    module = eefast.accelerate(net, engine="compact") if fast else net
    with pytest.raises(error, match=message):
        module(images(4, SHAPE), **arguments)


def test_tables_that_do_not_fit_are_refused():
    net = made("margin")
    with pytest.raises(ValueError, match=r"profile 'eco' has 2 thresholds, the network 3 early exits"):
        net.profiles = {"eco": [0.5, 0.5]}
    with pytest.raises(ValueError, match=r"profiles have \[2, 3\] thresholds"):
        Profiles(a=[0.5] * 2, b=[0.5] * 3)
    with pytest.raises(ValueError, match=r"'eco' has the thresholds .* none of them may be NaN"):
        Profiles(eco=[math.nan, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"'eco' has last_exit=4; exits are 0 … 3"):
        Profiles(eco=Profile((0.5,) * 3, 4))
    with pytest.raises(ValueError, match=r"'eco' has last_exit=1\.5; exits are 0 … 3"):
        Profiles(eco=Profile((0.5,) * 3, 1.5))
    found = [Calibration(name, (0.5,) * 3, 0.9, 0.3) for name in ("margin", "entropy")]
    with pytest.raises(ValueError, match="of two criteria, 'a' of margin, 'b' of entropy"):
        Profiles(a=found[0], b=found[1])
    with pytest.raises(ValueError, match="the profiles are of criterion 'entropy', the network has 'margin'"):
        net.profiles = {"b": found[1]}
    net.profiles = {"a": [0.5] * 3}
    other = net.with_criterion("entropy")
    assert not other.profiles
    net.criterion = other.criterion
    with pytest.raises(ValueError, match="the profiles are of criterion 'margin', the network has 'entropy'"):
        net(images(1, SHAPE), profile="a")
    net.criterion = criteria.get("margin")
    net.profiles = {"a": found[0]}
    assert net.profiles["a"] == Profile((0.5,) * 3, criterion="margin")
    net.profiles = None
    with pytest.raises(ValueError, match="profile='a', but the network has no profiles"):
        net(images(1, SHAPE), profile="a")
    with pytest.raises(ValueError, match="are for eval mode"):
        net.train()(images(2, SHAPE), exit_limit=1)


def test_profiles_keep_their_criterion():
    net = made("margin")
    net.profiles = {"own": [0.5] * 3}
    entropy = Calibration("entropy", (0.5,) * 3, 0.9, 0.3)
    other = net.with_criterion("entropy")
    again = Profiles(net.profiles)
    assert again.criterion == Profiles({**net.profiles, "new": [0.4] * 3}).criterion == "margin"
    for table in (again, {**net.profiles}, {"cut": net.profiles["own"]._replace(last_exit=1)}):
        with pytest.raises(ValueError, match="the profiles are of criterion 'margin', the network has 'entropy'"):
            other.profiles = table
    with pytest.raises(ValueError, match="of two criteria, 'own' of margin, 'new' of entropy"):
        Profiles({**net.profiles, "new": entropy})
    assert {p.criterion for p in Profiles(new=entropy, plain=[0.4] * 3).values()} == {"entropy"}


def test_what_is_no_table_is_refused():
    for name in (1, None, ("eco",)):
        with pytest.raises(TypeError, match=r"a profile's name is .*; give a text, such as"):
            Profiles({name: [0.5]})
    for thresholds in (0.9, [[0.5]]):
        with pytest.raises(ValueError, match=r"'eco' has the thresholds .*; give a list, one per early exit"):
            Profiles(eco=thresholds)
    for thresholds in (None, "0.9", ["a"], [[0.5], [0.5, 0.6]]):
        with pytest.raises(ValueError, match=r"'eco' has the thresholds .*; give one number per early exit"):
            Profiles(eco=thresholds)


def test_an_accelerated_network_shares_the_table():
    net = made()
    fast = eefast.accelerate(net, engine="compact")
    fast.profiles = table_of(net)
    assert net.profiles is fast.profiles
    assert list(net.profiles)[:2] == ["full", "normal"]
