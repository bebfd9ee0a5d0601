"""Nothing that eefast does changes a module that it was given, whatever is in it and whatever goes wrong."""

import threading
from contextlib import nullcontext

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one
from snapshots import unchanged
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import eefast
from eefast.cost import macs
from eefast.heads import ExitHead
from eefast.modules.copies import working_copy
from eefast.surgery.attachment import attach
from eefast.thresholds import outputs
from eefast.train.tags import refreshed

SHAPE = (3, 13, 11)


class Backbone(nn.Module):
    """Images → first → second → third → 5 logits."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.third = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.3))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.third(self.second(self.first(x))).mean((2, 3)))


def as_it_is(b):
    pass


def block_twice(b):
    b.third = nn.Sequential(b.third[0], b.second, b.second, b.third[2])


def norm_twice(b):
    b.third = nn.Sequential(b.third[0], b.third[1], nn.Conv2d(8, 8, 1), b.third[1])


def two_names(b):
    b.layers = nn.ModuleList([b.first, b.second, b.third])


def tied_weights(b):
    b.second[0].weight = b.third[0].weight


def frozen_parts(b):
    b.requires_grad_(False)
    b.fc.requires_grad_(True)
    b.train()
    b.first.eval()


def with_gradients(b):
    b.train()
    b(images(4, SHAPE)).sum().backward()


def weight_norm(b):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(b.second[0])
    with_gradients(b)


def spectral_norm(b):
    nn.utils.spectral_norm(b.second[0])
    with_gradients(b)


def pruned(b):
    from torch.nn.utils import prune

    prune.l1_unstructured(b.second[0], "weight", 0.3)
    with_gradients(b)


def parametrized(b):
    parametrizations.weight_norm(b.second[0])
    parametrizations.spectral_norm(b.third[0])
    with_gradients(b)


def user_parametrization(b):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(b.second[0], "weight", Twice())


def hooked(b):
    seen = []
    b.second.register_forward_hook(lambda module, x, y: seen.append(b.fc.weight.sum()) or y * 1.5)
    b.third.register_forward_pre_hook(lambda module, x: (x[0] + b.fc.bias.sum(),))
    b.seen = seen


def without_statistics(b):
    b.second[1] = nn.BatchNorm2d(8, track_running_stats=False)
    b.third[1] = nn.BatchNorm2d(8, affine=False)


def with_a_lock(b):
    b.second.lock = threading.Lock()
    b.second.of = (threading.Lock(), b.second)
    b.second.generator = (i for i in range(3))


class Counting(nn.Module):
    """Writes to buffers, attributes and even weights in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.weight, self.sizes = nn.Parameter(torch.ones(1)), []

    def forward(self, x):
        with torch.no_grad():
            self.calls += 1
            self.weight.mul_(1.0)
            self.weight.org = self.weight.data
        self.last, _ = x.shape[1], self.sizes.append(x.shape)
        return x * self.weight


def counting(b):
    b.second.append(Counting())


class Drawing(nn.Module):
    def forward(self, x):
        torch.rand(3)
        return x


def drawing(b):
    b.second.append(Drawing())


def partly_float64(b):
    b.register_buffer("table", torch.arange(3).double())
    b.scale = torch.full((2,), 0.5).bfloat16()


def meta(b):
    b.to("meta")


SIMPLE = [
    as_it_is, block_twice, norm_twice, two_names, tied_weights, frozen_parts, with_gradients, weight_norm,
    spectral_norm, pruned, parametrized, user_parametrization, hooked, without_statistics, with_a_lock, counting,
    drawing, partly_float64,
]  # fmt: skip


def backbone(change):
    torch.manual_seed(3)
    made = lived_in(Backbone(), 4)
    change(made)
    return made


def stages_and_heads(b):
    stages = [b.first, b.second, b.third]
    return stages, [ExitHead("bnpool" if i < 2 else "pool", (8, 13, 11), 5, SHAPE) for i in range(3)]


@pytest.mark.parametrize("change", SIMPLE)
def test_attach_changes_nothing(change):
    b = backbone(change)
    state = torch.get_rng_state()
    with unchanged(b, random_numbers=False):
        net = attach(b, ["first"], input_shape=SHAPE)
    new = torch.get_rng_state()
    torch.set_rng_state(state)
    for i, stage in enumerate(net.stages):
        ExitHead("pool", (8, 13, 11) if i == 0 else (8, 7, 6), 5, SHAPE)
        assert stage is not None
    assert torch.equal(torch.get_rng_state(), new), "only the new heads' weights are drawn"
    assert {id(p) for p in b.parameters()} <= {id(p) for p in net.parameters()}
    assert net.training == b.training


@pytest.mark.parametrize("change", [*SIMPLE, meta])
def test_building_a_network_changes_nothing(change):
    b = backbone(change)
    stages, heads = stages_and_heads(b)
    with unchanged(b, *heads):
        net = eefast.EarlyExitNet(stages, heads, input_shape=SHAPE)
        net.with_criterion("entropy")
        net.plain()
        assert macs(b, SHAPE)[1] == (5,)
    assert net.cost.device.type == "cpu"
    assert net.cost[-1] == 1


def test_building_a_network_whose_rows_are_one_changes_nothing():
    b = backbone(as_it_is)
    head = ExitHead("pool", (8, 13, 11), 5, SHAPE)
    head.confidence = head.classifier = nn.Linear(8, 1)
    with unchanged(head, b):
        eefast.EarlyExitNet([b.first], [head], input_shape=SHAPE)


def batches():
    return [(images(4, SHAPE), torch.tensor([0, 1, 2, 3]))] * 2


ENTRIES = {
    "accelerate": lambda net: eefast.accelerate(net)(images(4, SHAPE)),
    "compact": lambda net: eefast.accelerate(net, engine="compact").warmup(),
    "stream": lambda net: list(eefast.accelerate(net, engine="reference").stream([images(4, SHAPE)] * 3)),
    "with_criterion": lambda net: net.with_criterion("margin")(images(4, SHAPE)),
    "plain": lambda net: net.plain()(images(4, SHAPE)),
    "evaluate": lambda net: outputs.collect_answers(net, batches()),
    "fingerprint": outputs.fingerprint,
    "print": repr,
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "change", [as_it_is, two_names, tied_weights, norm_twice, parametrized, hooked, without_statistics]
)
def test_running_a_network_changes_nothing(change, entry):
    b = backbone(change)
    stages, heads = stages_and_heads(b)
    net = eefast.EarlyExitNet(stages, heads, input_shape=SHAPE).eval()
    b.first[0].weight.requires_grad_(False)
    # Only the reference engine runs these, and says so.
    refused = entry == "compact" and change in (hooked, without_statistics)
    with (
        unchanged(net, b),
        torch.no_grad(),
        pytest.raises(ValueError, match="cannot run") if refused else nullcontext(),
    ):
        ENTRIES[entry](net)


@pytest.mark.parametrize("entry", [outputs.collect, lambda net, data: refreshed(net, data, net.cost)])
@pytest.mark.parametrize("goes_wrong", [False, True])
def test_every_module_gets_its_flag_back(entry, goes_wrong):
    b = backbone(frozen_parts)
    net = eefast.EarlyExitNet(*stages_and_heads(b), input_shape=SHAPE)
    data = [*batches(), *([(torch.zeros(1), torch.zeros(1))] * goes_wrong)]
    with unchanged(net):
        if goes_wrong:
            with pytest.raises(ValueError, match="x has shape"):
                entry(net, data)
        else:
            entry(net, data)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_count_or_cut_changes_nothing(error):
    class Failing(nn.Module):
        def forward(self, x):
            raise error("stop")

    b = backbone(two_names)
    b.third.append(Failing())
    stages, heads = stages_and_heads(b)
    with unchanged(b, *heads):
        with pytest.raises((error, ValueError)):
            attach(b, ["first"], input_shape=SHAPE)
        with pytest.raises(error):
            eefast.EarlyExitNet(stages, heads, input_shape=SHAPE)


def test_other_threads_run_the_module_while_it_is_counted_and_cut():
    b = backbone(two_names)
    x, wrong, done = images(2, SHAPE), [], threading.Event()
    with torch.no_grad():
        expected = b(x)

    def run():
        with torch.no_grad():
            while not done.is_set():
                try:
                    wrong.extend([] if torch.equal(b(x), expected) else ["other answer"])
                except Exception as error:
                    wrong.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            eefast.EarlyExitNet(*stages_and_heads(b), input_shape=SHAPE)
            attach(b, ["first"], input_shape=SHAPE)
    finally:
        done.set()
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("change", SIMPLE)
def test_a_working_copy_answers_alike_and_shares_nothing(change):
    b = backbone(change).eval()
    x = images(3, SHAPE)
    with torch.no_grad():
        expected = b(x)
        with unchanged(b):
            copied = working_copy(b)
        with unchanged(b, random_numbers=False):
            assert torch.equal(copied(x), expected)
        assert {id(t) for t in copied.parameters()}.isdisjoint({id(t) for t in b.parameters()})
        with unchanged(b, random_numbers=False):
            copied.train()(x)
        assert working_copy(b, "meta")(x.to("meta")).shape == (3, 5)
    names = [name for name, _ in b.named_modules(remove_duplicate=False)]
    assert [name for name, _ in copied.named_modules(remove_duplicate=False)] == names
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in b.named_parameters()]


def test_a_working_copy_keeps_what_is_one_thing():
    b = backbone(two_names)
    b.again, b.list, b.tied = b.first, [b.second, b.fc.weight], b.fc.weight
    copied = working_copy(b)
    assert copied.again is copied.first is copied.layers[0]
    assert copied.list[0] is copied.second
    assert copied.list[1] is copied.tied is copied.fc.weight


def test_a_compiled_backbone_is_tried_uncompiled_and_stays():
    inner = backbone(as_it_is)
    compiled = torch.compile(inner, backend="eager")
    with unchanged(inner, random_numbers=False):
        net = attach(compiled, ["_orig_mod.first"], input_shape=SHAPE)
    x = images(3, SHAPE)
    with torch.no_grad():
        assert torch.equal(net.plain()(x), inner(x))
    with pytest.raises(ValueError, match=r"no module 'first'; take '_orig_mod\.first'"):
        attach(compiled, ["first"], input_shape=SHAPE)


def test_what_only_runs_with_values_is_counted_all_the_same():
    class Looking(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.amax().item() > -1e9 else x

    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    assert macs(Looking(*layers), SHAPE) == macs(nn.Sequential(*layers), SHAPE)


def test_counting_leaves_other_threads_modules_alone():
    """Torch's own counter hooks into every module of the process."""
    seen = []

    class Watching(nn.Conv2d):
        def forward(self, x):
            hooks = torch.nn.modules.module
            seen.append(len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks))
            return super().forward(x)

    macs(Watching(3, 8, 3), SHAPE)
    assert seen == [0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_buffer(dtype):
    b = backbone(as_it_is)
    expected = eefast.EarlyExitNet(*stages_and_heads(b), input_shape=SHAPE, normalization=((0.5,) * 3, (0.2,) * 3))
    pixels = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8)
    stages, heads = stages_and_heads(b)
    torch.set_default_dtype(dtype)
    try:
        net = eefast.EarlyExitNet(stages, heads, input_shape=SHAPE, normalization=expected.normalization)
        prepared = net.prepare(pixels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(net.get_buffer(n), expected.get_buffer(n)) for n in ("thresholds", "cost", "path_cost"))
    assert torch.equal(prepared, expected.prepare(pixels))


def test_thresholds_that_were_handed_in_stay():
    given = torch.tensor([0.1, 0.2])
    net = eefast.EarlyExitNet(*stages_and_heads(backbone(as_it_is)), input_shape=SHAPE, thresholds=given)
    net.thresholds.fill_(0.9)
    assert given.tolist() == [pytest.approx(0.1), pytest.approx(0.2)]


@pytest.mark.parametrize("engine", ["reference", "compact", "resident"])
def test_inference_mode_inside_and_outside(engine):
    x = images(5, SHAPE)
    with torch.inference_mode():
        b = backbone(as_it_is)
        net = eefast.EarlyExitNet(*stages_and_heads(b), input_shape=SHAPE).eval()
        inside = eefast.accelerate(net, engine=engine) if engine != "resident" else None
    net.thresholds.fill_(0.5)  # an ordinary tensor
    expected = one_by_one(net, x)
    for fast in filter(None, (inside, eefast.accelerate(net, engine=engine))):
        assert_same_answers(fast(x), expected, net)
        with torch.inference_mode():
            assert_same_answers(fast(x), expected, net)
            assert len(list(fast.stream([x] * 3))) == 3
        assert_same_answers(list(fast.stream([x] * 3))[2], expected, net)
    with torch.inference_mode():
        attached = attach(b, ["first"], input_shape=SHAPE)
    assert not attached.heads[0].classifier.weight.is_inference()
    with torch.no_grad():
        assert torch.equal(attached.plain()(x), b(x))


def test_a_plan_that_is_made_under_autocast_is_the_same():
    net = eefast.EarlyExitNet(*stages_and_heads(backbone(as_it_is)), input_shape=SHAPE).eval()
    x = images(5, SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        fast = eefast.accelerate(net, engine="compact")
    assert_same_answers(fast(x), one_by_one(net, x), net)
