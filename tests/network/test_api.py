"""The accelerated module as a drop-in: what it shares, what it notices, what it refuses."""

import copy
import pickle
import threading

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import nn

import eefast
from eefast import ops, zoo
from eefast.heads import ExitHead

SMALL = (1, 6, 7)


@pytest.fixture
def net():
    made = lived_in(zoo.eenet("eenet20", 2, "linear", "bnpool", input_shape=(3, 16, 16)), 1)
    spread_thresholds(made, images(33, (3, 16, 16)), 0.4)
    return made


@pytest.fixture(params=["compact", "resident"])
def engine(request):
    if request.param == "resident" and ops.CPP_MISSING:
        pytest.skip(f"the C++ kernels are {ops.CPP_MISSING}")
    return request.param


@pytest.fixture
def x():
    return images(33, (3, 16, 16))


def test_it_shares_parameters_and_state_dict_keys(net, x, engine):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fast = eefast.accelerate(net, engine=engine)
    fast(x)
    assert list(fast.state_dict()) == list(net.state_dict()) == list(before)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert {id(p) for p in fast.parameters()} == {id(p) for p in net.parameters()}
    assert fast.num_classes == net.num_classes
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing


def by_load_state_dict(net):
    net.load_state_dict(lived_in(copy.deepcopy(net), 7).state_dict())


def by_assignment(net):
    net.load_state_dict(lived_in(copy.deepcopy(net), 7).state_dict(), assign=True)


def by_optimiser(net):
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.05)
    sum(p.square().sum() for p in net.parameters()).backward()
    optimiser.step()


def by_fused_optimiser(net):
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, fused=True)
    sum(p.square().sum() for p in net.parameters()).backward()
    optimiser.step()


def by_batch_norm(net):
    net.train()
    with torch.no_grad():
        net(images(8, (3, 16, 16), 9))
    net.eval()


def by_new_parameter(net):
    net.heads[0].classifier.weight = nn.Parameter(torch.randn_like(net.heads[0].classifier.weight))


def by_new_head(net):
    net.heads[0] = lived_in(ExitHead("conv1", net.stage_costs[0].feature_shape, 10, net.input_shape), 7)


def by_new_heads(net):
    net.heads = nn.ModuleList(lived_in(copy.deepcopy(head), 7 + i) for i, head in enumerate(net.heads))


def by_new_stages(net):
    net.stages = nn.ModuleList(lived_in(copy.deepcopy(stage), 7 + i) for i, stage in enumerate(net.stages))


def by_new_memory(net):
    weight = net.stages[0][0][0].weight
    weight.data = weight.data * 1.5


def in_inference_mode(net):
    with torch.inference_mode():
        net.stages[0][0][0].weight.mul_(1.5)


CHANGES = [
    by_load_state_dict, by_assignment, by_optimiser, by_fused_optimiser,
    by_batch_norm, by_new_parameter, by_new_head, by_new_heads, by_new_stages, by_new_memory, in_inference_mode,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.sampled(13)
def test_changed_weights_are_noticed(net, x, change, engine):
    fast = eefast.accelerate(net, engine=engine)
    old = fast(x)
    change(net)
    expected = one_by_one(net, x)
    assert not torch.equal(expected.logits, old.logits)
    got = fast(x)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4 * float(expected.logits.abs().max()))


class Adapted(nn.Module):
    """A stage with a list of adapters, which is empty at first."""

    def __init__(self, stage):
        super().__init__()
        self.stage, self.adapters = stage, nn.ModuleList()

    def forward(self, x):
        x = self.stage(x)
        for adapter in self.adapters:
            x = x + adapter(x)
        return x


@torch.no_grad()
def test_adapters_that_are_added_later_are_noticed(net, x, engine):
    net.stages[0] = Adapted(net.stages[0]).eval()
    fast = eefast.accelerate(net, engine=engine)
    old = fast(x)
    channels = net.heads[0].feature_shape[0]
    net.stages[0].adapters.append(lived_in(nn.Conv2d(channels, channels, 1), 7))
    expected = one_by_one(net, x)
    assert not torch.equal(expected.logits, old.logits)
    assert_same_answers(fast(x), expected, net)


HOOKS = ["register_forward_hook", "register_forward_pre_hook"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["auto", "resident", "compact", "reference"])
def test_hooks_of_the_network_itself_are_not_passed_over(net, x, hook, name):
    if name == "resident" and ops.CPP_MISSING:
        pytest.skip(f"the C++ kernels are {ops.CPP_MISSING}")
    fast = eefast.accelerate(net, engine=name)
    before = fast(x)
    handle = getattr(net, hook)(lambda *_: None)
    for call in (lambda: fast(x), lambda: eefast.accelerate(net, engine=name)):
        with pytest.raises(ValueError, match=r"the network itself has forward hooks .*; register hooks on what eefast"):
            call()
    handle.remove()
    assert torch.equal(fast(x).logits, before.logits)
    seen = []
    getattr(fast, hook)(lambda *_: seen.append(0))
    fast(x)
    assert seen == [0]


def test_a_forward_of_the_users_own_is_not_passed_over(net):
    class Louder(eefast.EarlyExitNet):
        def forward(self, x, *args, **kwargs):
            return super().forward(2 * x, *args, **kwargs)

    net.__class__ = Louder
    with pytest.raises(ValueError, match="hooks or a forward of its own"):
        eefast.accelerate(net)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("planned", ["before", "meanwhile"])
@torch.no_grad()
def test_another_default_dtype_changes_nothing(net, x, engine, dtype, planned):
    expected = one_by_one(net, x)
    fast = eefast.accelerate(net, engine=engine)
    torch.set_default_dtype(dtype)
    try:
        if planned == "meanwhile":
            fast = eefast.accelerate(net, engine=engine)
        assert_same_answers(fast(x), expected, net)
        assert_same_answers(list(fast.stream([x, x]))[1], expected, net)
        stopped = fast.until(0)(x)
        assert_same_answers(stopped.finished(fast.resume(stopped.survivors)), expected, net)
        assert fast(x, exit_limit=0).exit_index.eq(0).all()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("run_in", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("made_in", [torch.inference_mode, torch.enable_grad])
@pytest.mark.sampled(6)
def test_networks_made_planned_run_and_changed_in_every_mode(made_in, run_in, engine):
    x = images(7, (3, 16, 16))
    with made_in():
        made = lived_in(zoo.eenet("eenet20", 2, "linear", "bnpool", input_shape=(3, 16, 16)), 1)
        spread_thresholds(made, x, 0.4)
    with run_in():
        fast = eefast.accelerate(made, engine=engine)
        assert_same_answers(fast(x), one_by_one(made, x), made)
        assert_same_answers(list(fast.stream([x, x]))[1], one_by_one(made, x), made)
    assert ("made in inference mode" in fast.plan.reason) == (made_in is torch.inference_mode)
    first = fast.plan
    fast(x)
    assert fast.plan is first
    with torch.inference_mode():
        made.stages[0][0][0].weight[1].mul_(1.5)
    assert_same_answers(fast(x), one_by_one(made, x), made)
    assert fast.plan is not first


def test_unchanged_weights_are_planned_once(net, x, engine):
    fast = eefast.accelerate(net, engine=engine)
    first = fast.plan
    net.thresholds[0] = 0.3
    fast(x)
    net.thresholds = torch.tensor([0.2, 0.9])
    fast(x)
    assert fast.plan is first


def test_thresholds_may_change_at_any_time(net, x, engine):
    fast = eefast.accelerate(net, engine=engine)
    for share in (0.1, 0.6):
        spread_thresholds(net, x, share)
        assert_same_answers(fast(x), one_by_one(net, x), net)
    fast.thresholds = torch.tensor([1.0, 1.0])
    assert net.thresholds.tolist() == [1.0, 1.0]
    assert fast(x).exit_index.tolist() == [2] * 33


def test_a_new_criterion_is_planned(net, x, engine):
    fast = eefast.accelerate(net, engine=engine)
    net.criterion = eefast.criteria.get("margin")
    spread_thresholds(net, x, 0.4)
    assert_same_answers(fast(x), one_by_one(net, x), net)
    assert fast.plan.criterion == "margin"


def test_training_mode_is_refused_and_shared(net, x, engine):
    fast = eefast.accelerate(net, engine=engine)
    fast.train()
    assert net.training
    assert net.stages.training
    with pytest.raises(RuntimeError, match=r"eval mode only; call \.eval\(\)"):
        fast(x)
    fast.eval()
    assert not net.training
    fast(x)


def test_moving_to_another_dtype_plans_again(net, x):
    fast = eefast.accelerate(net)
    fast.to(torch.float64)
    assert net.thresholds.dtype == torch.float32
    assert_same_answers(fast(x.double()), one_by_one(net, x.double()), net)
    assert fast.plan.dtype == torch.float64
    with pytest.raises(TypeError, match=r"x is torch\.float32, the network torch\.float64"):
        fast(x)


@pytest.mark.parametrize("taken", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.sampled(3)
def test_a_lower_dtype_errs_no_more_than_eager(net, x, dtype, taken):
    exact = copy.deepcopy(net).double().all_exits(x.double())[taken].logits
    eager = copy.deepcopy(net).to(dtype).all_exits(x.to(dtype))[taken].logits
    net.thresholds.fill_(1.0)
    net.thresholds[taken : taken + 1] = -1.0
    fast = eefast.accelerate(net, dtype=dtype)
    assert fast.plan.dtype == dtype
    for given in (x, x.to(dtype)):
        got = fast(given)
        assert got.exit_index.tolist() == [taken] * 33
        assert got.logits.dtype == torch.float32
        assert (got.logits - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_channels_last_slices_and_autocast(net, x, engine):
    fast = eefast.accelerate(net, engine=engine)
    expected = fast(x)
    assert_same_answers(fast(x.contiguous(memory_format=torch.channels_last)), expected, net)
    wide = torch.randn(33, 3, 20, 40)
    wide[:, :, 2:18, 5:37:2] = x
    assert_same_answers(fast(wide[:, :, 2:18, 5:37:2]), expected, net)
    with torch.autocast("cpu", torch.bfloat16):
        error = (fast(x).logits - expected.logits).abs().max()
    # The resident engine's one op stays in float32.
    assert error == 0 if engine == "resident" else 0 < error < 0.1 * expected.logits.abs().max()


def test_repetition_is_bitwise_equal_and_inputs_are_untouched(net, x, engine):
    fast = eefast.accelerate(net, engine=engine)
    before = x.clone()
    first = fast(x)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(fast(x), first, strict=True))
    assert torch.equal(x, before)


def test_results_carry_no_gradient_and_are_ordinary_tensors(net, x, engine):
    fast, limits = eefast.accelerate(net, engine=engine), net.thresholds.clone().requires_grad_()
    for given in (x, x.clone().requires_grad_()):
        stopped, batches = fast.until(0)(given), [given, (given, {"thresholds": limits})]
        results = [fast(given), fast(given, thresholds=limits), *fast.stream(batches)]
        for got in (*results, stopped.result, fast.resume(stopped.survivors)):
            assert not any(part.requires_grad or part.is_inference() for part in got)
        assert not stopped.survivors.features.requires_grad
    got = results[0]
    with torch.inference_mode():
        assert torch.equal(eefast.accelerate(net, engine=engine)(x).exit_index, got.exit_index)


def test_threads_share_one_module(net, x, engine):
    fast = eefast.accelerate(net, engine=engine)
    expected, wrong = fast(x), []

    def ask():
        for _ in range(10):
            got = fast(x)
            if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                wrong.append(got)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_answer_alike(net, x, engine, copied):
    fast = eefast.accelerate(net, engine=engine)
    expected, other = fast(x), copied(fast)
    assert_same_answers(other(x), expected, net)
    other.thresholds.fill_(1.0)
    assert other(x).exit_index.tolist() == [2] * 33
    assert torch.equal(fast(x).exit_index, expected.exit_index)


def test_code_around_it_compiles(net, x, engine):
    fast = eefast.accelerate(net, engine=engine)

    @torch.compile(backend="eager")
    def classify(x):
        return fast(x * 1.0).labels + 1

    assert torch.equal(classify(x), fast(x).labels + 1)


def test_wrong_arguments_are_refused(net):
    with pytest.raises(TypeError, match=r"net is a Linear; give an eefast\.EarlyExitNet"):
        eefast.accelerate(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="max_batch_size=0 must be at least 1"):
        eefast.accelerate(net, max_batch_size=0)
    with pytest.raises(ValueError, match="output='labels' is unknown; choose one of result, logits"):
        eefast.accelerate(net, output="labels")


class TestLogits:
    """With output="logits" the module is called as any classifier is."""

    @pytest.fixture
    def fast(self, net, engine):
        return eefast.accelerate(net, engine=engine, output="logits")

    def test_a_call_gives_the_logits_of_the_exits(self, net, x, fast):
        expected = one_by_one(net, x)
        logits = fast(x)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits.argmax(1), expected.labels)
        assert torch.equal(fast(x, exit_limit=0).argmax(1), net(x, exit_limit=0).labels)
        assert "output='logits'" in repr(fast)

    def test_a_stream_and_a_copy_give_logits_too(self, net, x, fast):
        expected = torch.cat([fast(x[:5]), fast(x[5:])])
        streamed = list(fast.stream([x[:5], x[5:]]))
        assert [len(logits) for logits in streamed] == [5, len(x) - 5]
        torch.testing.assert_close(torch.cat(streamed), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(pickle.loads(pickle.dumps(fast))(x).argmax(1), fast(x).argmax(1))

    def test_a_run_in_two_parts_is_finished_as_ever(self, net, x, fast):
        partial = fast.until(0)(x)
        assert_same_answers(partial.finished(fast.resume(partial.survivors)), one_by_one(net, x), net)

    def test_a_result_says_how_to_get_logits(self, net, x):
        with pytest.raises(AttributeError, match=r"no 'argmax'; it is no tensor: take .logits, or .*output=\"logits\""):
            net(x).argmax(1)
        with pytest.raises(AttributeError, match=r"no 'label'$"):
            _ = net(x).label


def test_accelerating_twice_is_accelerating_once(net, x):
    fast = eefast.accelerate(eefast.accelerate(net))
    assert fast.net is net


def test_warmup_plans_again_and_runs(net, x, monkeypatch):
    changed = copy.deepcopy(net)
    fast = eefast.accelerate(changed, engine="compact")
    before = fast.plan
    with torch.no_grad():
        next(changed.parameters()).mul_(0.5)
    after = fast.warmup()
    assert after is not before
    monkeypatch.setattr("eefast.api.build", lambda *_: pytest.fail("planned again"))
    assert torch.equal(fast(x).exit_index, changed(x).exit_index)
    changed.train()
    with pytest.raises(RuntimeError, match="eval mode"):
        fast.warmup()


def test_a_frozen_network_is_not_looked_at_again(net, x, engine):
    fast = eefast.accelerate(net, engine=engine, frozen=True)
    before = fast(x)
    for p in net.parameters():
        p.data.mul_(0.5)
    net.load_state_dict(lived_in(copy.deepcopy(net), 9).state_dict() | {"thresholds": net.thresholds})
    assert torch.equal(fast(x).logits, before.logits)
    net.thresholds.fill_(2.0)
    assert fast(x).exit_index.tolist() == [2] * len(x)


def test_build_is_what_accelerate_calls_and_printing_is_not(net, monkeypatch):
    fast = eefast.accelerate(net, engine="compact")
    before = fast.plan
    with torch.no_grad():
        next(net.parameters()).mul_(1.0)
    with monkeypatch.context() as patched:
        patched.setattr("eefast.api.build", lambda *_: pytest.fail("planned"))
        assert "engine='compact'" in repr(fast)
        assert fast.plan is before
    assert fast.warmup() is not before


def negate_the_last_head(net):
    with torch.no_grad():
        net.heads[-1].classifier.weight.mul_(-1.0)


class TestPlanningAgain:
    @pytest.fixture
    def net(self):
        made = lived_in(zoo.eenet("eenet8", 2, num_classes=3, input_shape=SMALL, filters=2), 1)
        spread_thresholds(made, images(64, SMALL), 0.4)
        return made

    def test_many_threads_make_one_plan(self, net, monkeypatch):
        fast, x, make, plans, answers = eefast.accelerate(net), images(33, SMALL), eefast.api.build, [], []

        def counted(*args):
            plans.append(make(*args))
            return plans[-1]

        monkeypatch.setattr("eefast.api.build", counted)
        negate_the_last_head(net)
        expected = one_by_one(net, x)
        threads = [threading.Thread(target=lambda: answers.append(fast.forward(x))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(plans) == 1
        assert len(answers) == 4
        for answer in answers:
            assert_same_answers(answer, expected, net)

    @pytest.mark.parametrize("engine", ["compact", "auto"])
    def test_what_changes_meanwhile_is_noticed(self, net, engine, monkeypatch):
        """Another thread writes new weights after the old ones have been read."""
        fast, x, make, plans = eefast.accelerate(net, engine=engine), images(33, SMALL), eefast.api.build, []

        def slow(*args):
            plans.append(make(*args))
            if len(plans) == 1:
                negate_the_last_head(net)
            return plans[-1]

        monkeypatch.setattr("eefast.api.build", slow)
        with torch.no_grad():
            next(net.parameters()).mul_(1.1)
        got = fast(x)
        assert_same_answers(got, one_by_one(net, x), net)
        assert len(plans) == 2
        fast(x)
        assert len(plans) == 2

    def test_a_network_that_always_changes_is_planned_all_the_same(self, net, monkeypatch):
        fast, make, plans = eefast.accelerate(net, engine="compact"), eefast.api.build, []
        x = images(5, SMALL)

        def changing(*args):
            negate_the_last_head(net)
            plans.append(make(*args))
            negate_the_last_head(net)
            return plans[-1]

        monkeypatch.setattr("eefast.api.build", changing)
        negate_the_last_head(net)
        for _ in range(2):
            assert len(fast(x).labels) == 5
            assert fast.plan is plans[-1].plan
        assert len(plans) == 2

    def test_plans_of_other_modules_go_on_within_one(self, net, monkeypatch):
        """For instance where a finaliser, or a stage, calls an accelerated module."""
        fast, other, make = eefast.accelerate(net), eefast.accelerate(net, engine="compact"), eefast.api.build
        monkeypatch.setattr(
            "eefast.api.build", lambda *args: (other.warmup() if args[1].engine == "auto" else None, make(*args))[1]
        )
        negate_the_last_head(net)
        x = images(5, SMALL)
        assert_same_answers(fast(x), one_by_one(net, x), net)
