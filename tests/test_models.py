"""Backbones against torchvision's own, heads against the facts of NASiam (2302.00059)."""

import copy
import json
import random
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from checkpoint import load_arch, load_heads
from losses import METHODS, momentum_copy
from models import (
    BACKBONES,
    OPS,
    PRESETS,
    SPACES,
    Choices,
    Pointwise,
    SearchBackbone,
    SearchHead,
    build_backbone,
    build_head,
    count_heads,
    derive,
    describe,
    distinct_ops,
    head_dims,
    macs,
    random_choice,
    random_head,
    recalibrate,
)

PREDICTOR = head_dims(4, 2048, 512, 2048)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("arch", BACKBONES)
def test_torchvisions_model_loads_the_state_dict_and_gives_the_same_features(arch, tmp_path):
    ours, feature_dim = build_backbone(arch)
    for m in ours.modules():  # make every parameter and buffer count
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.0)
            m.running_mean.uniform_(-0.1, 0.1)
    theirs = torchvision.models.get_model(arch)
    torch.save(ours.state_dict(), tmp_path / "backbone.pth")
    result = theirs.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=False)
    assert not result.unexpected_keys and all(k.startswith(("fc.", "classifier.")) for k in result.missing_keys)
    theirs.fc = theirs.classifier = nn.Identity()
    x = torch.randn(2, 3, 96, 96)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        h = ours(x)
        torch.testing.assert_close(h, theirs(x), atol=1e-5, rtol=1e-5)
    assert h.shape == (2, feature_dim) and h.abs().max() > 1e-3


def test_a_vit_is_torchvisions_with_positions_for_any_size():
    ours, feature_dim = build_backbone("vit_tiny")
    assert count(ours) == 5_524_416 and feature_dim == 192
    theirs = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768)
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not result.unexpected_keys and all(k.startswith("heads.") for k in result.missing_keys)
    theirs.heads = nn.Identity()
    x = torch.randn(2, 3, 224, 224)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        blocks = ours.last_blocks(x, 4)
        assert blocks.shape == (2, 4 * 192)
        torch.testing.assert_close(blocks[:, -192:], ours(x))
        grid = ours.encoder.pos_embedding[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
        smaller = nn.functional.interpolate(grid, (6, 6), mode="bicubic").flatten(2).transpose(1, 2)
        ours.conv_proj.weight.zero_()
        torch.testing.assert_close(ours.tokens(torch.zeros(1, 3, 96, 96))[:, 1:], smaller)
    small, f = build_backbone("vit_tiny", "small", 0.5)
    assert small(torch.randn(2, 3, 32, 32)).shape == small(torch.randn(2, 3, 12, 20)).shape == (2, f) == (2, 96)
    with pytest.raises(ValueError, match="multiples of its patch, 4"):
        small(torch.randn(2, 3, 30, 30))


@pytest.mark.parametrize("arch, width, tolerance", [("resnet18", 1 / 16, 1e-4), ("mobilenet_v2", 1 / 4, 0.1)])
def test_gradients_do_not_depend_on_the_memory_format(arch, width, tolerance):
    """But for rounding, which takes some activations across ReLU's and ReLU6's corners: hence the seed."""
    torch.manual_seed(0)
    network, x = build_backbone(arch, "small", width)[0], torch.randn(16, 3, 64, 64)
    weight = torch.randn(16, network.feature_dim)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=memory_format).zero_grad()
        (network(x.contiguous(memory_format=memory_format)) * weight).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    a, b = gradients
    assert (a - b).norm() <= tolerance * a.norm()


def test_a_pointwise_convolution_is_torchs_of_the_same_stride():
    ours, x = Pointwise(5, 7, 2).double(), torch.randn(2, 5, 9, 8, dtype=torch.double)
    assert torch.equal(ours(x), torch.nn.functional.conv2d(x, ours.weight, stride=2))


def test_drop_path_skips_branches_of_some_images_in_the_student_alone():
    torch.manual_seed(0)
    vit, _ = build_backbone("vit_tiny", "small", 1 / 3, drop_path=0.9)
    x = torch.randn(1, 3, 32, 32).repeat(64, 1, 1, 1)
    assert len(vit(x).detach().unique(dim=0).round(decimals=4)) > 8
    twin = momentum_copy(vit).train()
    torch.testing.assert_close(twin(x)[0], twin(x)[1])
    torch.testing.assert_close(twin(x), vit.eval()(x))
    assert vit.state_dict().keys() == build_backbone("vit_tiny", "small", 1 / 3)[0].state_dict().keys()
    with pytest.raises(ValueError, match=r"--drop-path 0\.1 means nothing to resnet18"):
        build_backbone("resnet18", drop_path=0.1)


@pytest.mark.parametrize("arch", BACKBONES)
def test_width_and_stem(arch):
    narrow, f = build_backbone(arch, "small", 0.25)
    _, full = build_backbone(arch)
    assert f == (1280 if arch == "mobilenet_v2" else full // 4)  # torchvision never narrows MobileNetV2's last layer
    spots = []
    last = narrow.features if arch == "mobilenet_v2" else narrow.layer4
    last.register_forward_hook(lambda _, __, y: spots.append(tuple(y.shape[2:])))
    assert narrow(torch.randn(2, 3, 32, 32)).shape == (2, f) and spots == [(4, 4)]


def test_parameter_counts_of_the_papers():
    assert count(build_backbone("resnet18", "small")[0]) == 11_168_832
    assert [count(build_backbone(a)[0]) for a in ("resnet18", "resnet34", "mobilenet_v2")] == [
        11_176_512,
        21_284_672,
        2_223_872,
    ]
    alphas = 7 * 6, 7 * 4
    assert count(SearchHead([512] * 7)) == 6_328_320 + alphas[0]
    assert count(SearchHead(PREDICTOR)) == 16_821_248 + alphas[1]
    # the authors' MoCo copy has a bias in each of its 16 Linears, which the BN behind them makes useless
    assert count(SearchHead([512] * 5)) + 16 * 512 == 4_227_072 + alphas[1]
    assert count(SearchHead(head_dims(6, 2048, 512, 128))) == 12_029_184 + alphas[0]
    found = PRESETS["simsiam_cifar10_resnet18"]
    assert count(build_head(found["projector"], [512] * 7)) == 1_052_672
    assert count(build_head(found["predictor"], PREDICTOR)) == 2_102_272
    assert count(build_head(PRESETS["simclr_cifar10_resnet50"]["projector"], head_dims(6, 2048, 512, 128))) == 1_905_920


def test_a_method_has_the_papers_head_spaces():
    for method, layers in {"simsiam": (6, 4), "moco": (4,), "simclr": (6,)}.items():
        heads = [SearchHead(head_dims(*space)) for space in METHODS[method].heads(512).values()]
        assert tuple(h.alpha.shape for h in heads) == tuple((n, 7) for n in layers)
        assert all((h.alpha == 0).all() for h in heads)
    assert head_dims(*METHODS["simsiam"].heads(512)["predictor"]) == PREDICTOR


def test_pools_run_along_the_features():
    pool = OPS["avgpool_3x3"](3, 3)[0]
    torch.testing.assert_close(
        pool(torch.tensor([[0.0, 1, 2], [3, 4, 5]])), torch.tensor([[1 / 3, 1, 1], [7 / 3, 4, 3]])
    )
    pool = OPS["maxpool_3x3"](3, 3)[0]
    torch.testing.assert_close(pool(torch.tensor([[-1.0, -2, -5]])), torch.tensor([[-1.0, -1, -2]]))
    x = torch.randn(4, 8)
    assert OPS["identity"](8, 8)(x) is x and count(OPS["identity"](8, 8)) == 0


@pytest.mark.parametrize("dims", [[8, 8, 8], [16, 8, 8, 16]])
def test_a_mixture_is_the_mean_at_zero_alpha_and_the_operation_at_one_hot_alpha(dims):
    torch.manual_seed(0)
    head = SearchHead(dims).double()
    torch.manual_seed(0)
    layers = [[op(i, o).double() for op in OPS.values()] for i, o in pairwise(dims)]  # the same weights
    x = torch.randn(32, dims[0], dtype=torch.double)

    def equal(y, want, parameters):
        """Values, and gradients of each operation's parameters, which the mixture holds several at a time."""
        torch.testing.assert_close(y, want)
        y.square().sum().backward()
        gradients = torch.autograd.grad(want.square().sum(), parameters)
        mine = [p.grad for n, p in head.named_parameters() if n != "alpha" and p.grad is not None]
        for ours, theirs in zip(*(torch.cat([g.flatten() for g in gs]).sort().values for gs in (mine, gradients))):
            torch.testing.assert_close(ours, theirs)

    want = x
    for ops in layers:
        want = torch.stack([op(want) for op in ops]).mean(0)
    equal(head(x), want, [p for ops in layers for op in ops for p in op.parameters()])
    for seed in range(5):
        spec = random_head(len(dims) - 1, random.Random(seed))
        with torch.no_grad():
            head.alpha.fill_(-1000.0)
            for layer, name in enumerate(spec):
                head.alpha[layer, list(OPS).index(name)] = 1000.0
        assert head.discretise() == spec and max(head.entropy()) < 1e-6
        derived = build_head(spec, dims).double()
        for mine, ops, name in zip(derived, layers, spec):
            mine.load_state_dict(ops[list(OPS).index(name)].state_dict())
        torch.testing.assert_close(head(x), derived(x))


def test_entropy_is_one_before_anything_is_decided():
    assert SearchHead([4, 4]).entropy() == pytest.approx([1.0])


def test_presets_build_and_do_not_depend_on_the_order_of_the_table(monkeypatch):
    x = torch.randn(8, 16)
    assert len(PRESETS) == 7
    for heads in PRESETS.values():
        for ops in heads.values():
            dims = head_dims(len(ops), 16, 8, 16)
            torch.manual_seed(0)
            before = build_head(ops, dims)
            with monkeypatch.context() as m:
                m.setattr(models, "OPS", dict(reversed(OPS.items())))
                torch.manual_seed(0)
                after = build_head(ops, dims)
            torch.testing.assert_close(before(x), after(x))
    assert PRESETS["simsiam_cifar10_resnet18"]["projector"][3:5] == ["identity", "identity"]


@pytest.mark.parametrize("i, o, distinct", [(8, 8, 7), (16, 8, 6), (8, 16, 3)])
def test_operations_that_are_said_to_coincide_do(i, o, distinct):
    """Same random numbers, same module: in pairs, exactly those outside distinct_ops equal one inside it."""
    x = torch.randn(64, i)

    def signature(name):
        torch.manual_seed(0)
        return OPS[name](i, o)(x)

    kept = distinct_ops(i, o)
    outputs = {name: signature(name) for name in OPS}
    assert len(kept) == distinct
    for a in OPS:
        twins = [b for b in kept if torch.equal(outputs[a], outputs[b])]
        assert len(twins) == 1 and (a not in kept or twins == [a])


def test_the_space_is_counted():
    projector, predictor = count_heads([512] * 7), count_heads(PREDICTOR)
    assert [a * b for a, b in zip(projector, predictor)][:2] == [7**10, 103_766_418]
    # as functions: brute force over a small space, identities taken out of a run with in == out
    dims = [16, 8, 8, 8]
    heads = {(a, *(op for op in (b, c) if op != "identity")) for a in distinct_ops(16, 8) for b in OPS for c in OPS}
    assert count_heads(dims)[2] == len(heads)


def test_random_heads_follow_the_seed_and_the_space():
    draw = [random_head(6, random.Random(s)) for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2] and len(draw[0]) == 6
    many = [random_head(4, random.Random(s)) for s in range(300)]
    assert all({h[layer] for h in many} == set(OPS) for layer in range(4))


def test_a_wrong_spec_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="unknown operation 'linear_gelu'"):
        build_head(["linear_gelu"], [4, 4])
    with pytest.raises(ValueError, match="needs 3 dims"):
        build_head(["identity", "identity"], [4, 4])
    with pytest.raises(ValueError, match="unknown --arch"):
        build_backbone("resnet19")
    good = PRESETS["simclr_cifar10_resnet50"]
    arch = tmp_path / "arch.json"
    arch.write_text(json.dumps({"heads": good}))
    assert load_heads(str(arch), ["projector"]) == good and load_heads("default", ["projector"]) is None
    with pytest.raises(FileNotFoundError, match="neither a readable file nor one of"):
        load_heads(str(tmp_path / "none.json"), ["projector"])
    with pytest.raises(ValueError, match="for another method: it has projector; this one needs projector, predictor"):
        load_heads(str(arch), ["projector", "predictor"])
    bad = copy.deepcopy(good)
    bad["projector"][2] = "linear_gelu"
    for text, message in [
        ("{", "is not JSON"),
        ("[]", "a list, where a JSON object should be"),
        ('{"heads": 3}', "'heads' is int, not dict"),
        ('{"head": {}}', "unknown key 'head'; known: space, strategy"),
        ('{"method": "moco"}', 'has no "heads" in it'),
        ('{"heads": {"projector": "identity"}}', "must be a list"),
        (json.dumps({"heads": bad}), "unknown operation 'linear_gelu'"),
        ('{"heads": {"projector": [["identity"]]}}', "unknown operation"),
    ]:
        arch.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_heads(str(arch), ["projector"])


# ---- architectures and their search ---------------------------------------------------------------------------------

NARROW = {"resnet": 1 / 64, "bottleneck": 1 / 64, "mobilenet": 1 / 8}  # few enough terms for BLAS to sum them in one go


def searchable(name, width=None, dtype=torch.double):
    """A largest network in which every parameter and buffer counts."""
    torch.manual_seed(0)
    backbone = SearchBackbone(SPACES[name], width or NARROW[name], "small").to(dtype)
    for m in backbone.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.0), nn.init.uniform_(m.bias, -0.2, 0.2)
            m.running_mean.uniform_(-0.1, 0.1), m.running_var.uniform_(0.5, 2.0)
    return backbone


def counted(network, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size, dtype=next(network.parameters()).dtype))
    return counter.get_total_flops() // 2


def test_macs_and_parameters_of_the_papers():
    at_224 = {"resnet18": 1.814e9, "resnet34": 3.663e9, "resnet50": 4.087e9, "mobilenet_v2": 299.5e6}
    assert {a: macs(BACKBONES[a]) for a in BACKBONES} == pytest.approx(at_224, rel=5e-4)
    assert macs(BACKBONES["resnet18"], stem="small", size=32) == pytest.approx(555.4e6, rel=1e-4)
    wide, f = build_backbone("mobilenet_v2", width=3.0)
    assert f == 3840 and count(wide) == pytest.approx(19.42e6, rel=1e-3)
    even = BACKBONES["resnet50"] | {"depth": [4, 4, 4, 4]}
    assert macs(even) == pytest.approx(macs(BACKBONES["resnet50"]), rel=1e-3) == pytest.approx(4.087e9, rel=1e-3)
    assert abs(count(build_backbone(even)[0]) - count(build_backbone("resnet50")[0])) > 1e6


def test_the_papers_grid_of_depths():
    grid = [BACKBONES["resnet50"] | {"depth": list(d)} for d in product((2, 3, 4), repeat=4)]
    with torch.device("meta"):
        sizes = [count(build_backbone(grid[n])[0]) for n in (0, -1)]
    assert len(grid) == 81 and sizes == pytest.approx([13.95e6, 25.81e6], rel=1e-3)


@pytest.mark.parametrize("name", SPACES)
def test_a_space_has_its_size_and_holds_the_handcrafted_network(name):
    space = SPACES[name]
    assert len(space.options) ** len(space.stages) == (36**5 if name == "mobilenet" else 32**4)
    choice = space.choice(space.handcrafted)
    assert (choice is None) == (name == "bottleneck")  # ResNet50 has a stage of 6
    if choice:
        assert space.arch(choice) == BACKBONES[space.handcrafted]
    base, table = space.costs(1.0, "small", 32)
    if name == "resnet":
        assert [base / 1e6, (base + table.max(1).values.sum()) / 1e6] == pytest.approx([69, 3206], abs=0.5)
    assert space.choice("resnet34") is None


def close(a, b):
    """Equal but for the order of sums, which zeros among the terms change on some CPUs."""
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_cut_out_is_the_masked_network_but_for_the_order_of_sums(name, training):
    backbone, rng = searchable(name).train(training), np.random.default_rng(1)
    x = torch.randn(4, 3, 16, 16, dtype=torch.double)
    before = copy.deepcopy(backbone.largest.state_dict())
    for _ in range(4):
        outputs, buffers = [], []
        for masked in (True, False):  # gates with gradients are masks
            for alpha in backbone.choices.alphas():
                alpha.requires_grad_(masked)
            backbone.choices.sample(1.0, copy.deepcopy(rng))
            choice = backbone.choices.choice()
            backbone.largest.load_state_dict(before)
            outputs.append(backbone(x))
            buffers.append({k: v.clone() for k, v in backbone.slices(choice).items() if "running" in k})
        rng.random(1)
        backbone.largest.load_state_dict(before)
        cut = backbone.cut(choice).train(training)
        close(cut(x), outputs[0])
        close(*outputs)
        assert outputs[0].abs().max() > 1e-3
        own = cut.state_dict()
        for k, v in [item for b in buffers for item in b.items()]:
            close(own[k], v)
        assert counted(cut, 16) == macs(SPACES[name].arch(choice), NARROW[name], "small", 16)


@pytest.mark.parametrize(
    "name, stem, size", [("resnet", "imagenet", 65), ("mobilenet", "imagenet", 70), ("bottleneck", "small", 17)]
)
def test_macs_are_what_torch_counts_and_their_expectation_is_the_enumerations(name, stem, size):
    full = SPACES[name]
    space = full._replace(stages=full.stages[:2], depth=(1, 3), inner=full.inner[:2], kernel=full.kernel[-2:])
    base, table = space.costs(0.25, stem, size)
    choices = Choices(space).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for alpha in choices.alphas():
            alpha.copy_(torch.randn(alpha.shape, generator=g))
    everything = list(product(range(len(space.options)), repeat=2))
    costs = {c: macs(space.arch(c), 0.25, stem, size) for c in everything}
    for c in everything[::9]:
        assert counted(build_backbone(space.arch(c), stem, 0.25)[0], size) == costs[c]
    p = choices.log_probabilities().exp().detach()
    brute = sum(float(p[0, a] * p[1, b]) * costs[a, b] for a, b in everything)
    assert choices.expected_macs(base, table).item() == pytest.approx(brute, rel=1e-12)
    assert torch.autograd.gradcheck(lambda *_: choices.expected_macs(base, table) / base, choices.alphas())
    with torch.no_grad():
        for alpha in choices.alphas():
            alpha.fill_(-1e4)[:, 1] = 1e4
    assert choices.expected_macs(base, table).item() == costs[everything[-1]]


def test_derivation_is_the_best_in_the_band_by_enumeration():
    space = SPACES["resnet"]._replace(stages=(1, 2, 3), depth=(1, 2), kernel=(3,))
    base, table = space.costs(1.0, "small", 32)
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        scores, target = torch.randn(table.shape, generator=g), base + 0.6 * float(table.sum(1).max())
        everything = list(product(range(table.shape[1]), repeat=3))
        good = [c for c in everything if 0.95 * target <= macs(space.arch(c), 1.0, "small", 32) <= target]
        best = max(good, key=lambda c: sum(float(scores[s, o]) for s, o in enumerate(c)))
        assert derive(scores, base, table, target) == list(best) and len(good) < len(everything) / 2
        assert tuple(random_choice(base, table, target, g)) in good
    drawn = {tuple(random_choice(base, table, target, g)) for _ in range(40 * len(good))}
    assert drawn == set(good)
    with pytest.raises(ValueError, match=r"no network of the space has .* MMACs: they go from"):
        derive(scores, base, table, 1.0)


def test_gates_are_one_hot_follow_the_generator_and_pass_gradients_that_sum_to_zero():
    choices = Choices(SPACES["mobilenet"])
    draws = []
    for seed in (0, 0, 1):
        choices.sample(2.0, np.random.default_rng(seed))
        draws.append(choices.choice())
        assert all(torch.equal(g.sum(1), torch.ones(5)) and set(g.unique().tolist()) == {0, 1} for g in choices.gates)
    assert draws[0] == draws[1] != draws[2]
    loss = sum((g * torch.randn(g.shape)).sum() for g in choices.gates)
    for gradient in torch.autograd.grad(loss, choices.alphas()):
        assert gradient.abs().min() > 0 and gradient.sum(1).abs().max() < 1e-6
    for c in ([0, 7, 35, 12, 20], choices.largest):
        choices.set(c)
        assert choices.choice() == list(c)
        choices.known = None  # read from the gates
        assert choices.choice() == list(c)
    gates = choices.gates
    choices.set_largest()
    assert all(torch.equal(a, b) for a, b in zip(gates, choices.gates)) and choices.choice() == choices.largest
    with torch.no_grad():
        choices.depth_alpha[:, 2] = 3.0
    rng = np.random.default_rng(0)
    share = torch.zeros(5, 4)
    for _ in range(2000):
        choices.sample(0.5, rng)
        share += choices.gates[0].detach() / 2000
    torch.testing.assert_close(share, choices.depth_alpha.detach().softmax(1), atol=0.04, rtol=0)


@pytest.mark.parametrize("name", SPACES)
def test_every_alpha_gets_a_gradient_and_what_is_left_out_gets_none(name):
    backbone, x = searchable(name, 1 / 8), torch.randn(4, 3, 16, 16, dtype=torch.double)
    names, weights = zip(*backbone.largest.named_parameters())
    target = torch.randn(4, backbone.feature_dim, dtype=torch.double)
    backbone.choices.set([0] * len(SPACES[name].stages))
    used = {v.untyped_storage().data_ptr(): v for v in backbone.slices(backbone.choices.choice()).values()}
    left_out = []
    for w in weights:
        left_out.append(torch.ones_like(w, dtype=torch.bool))
        if (part := used.get(w.untyped_storage().data_ptr())) is not None:
            left_out[-1].as_strided(part.shape, part.stride(), part.storage_offset()).fill_(False)
    gradients = []
    for masked in (True, False):
        for gate in backbone.choices.gates:
            gate.requires_grad_(masked)
        gradients.append(torch.autograd.grad((backbone(x) * target).sum(), weights, materialize_grads=True))
    for key, out, a, b in zip(names, left_out, *gradients):
        assert (a[out] == 0).all() and (b[out] == 0).all(), key
        torch.testing.assert_close(a, b)
    assert sum(int(out.sum()) for out in left_out) > 0.5 * count(backbone.largest)

    backbone.choices.sample(1.0, np.random.default_rng(0))
    for gradient in torch.autograd.grad((backbone(x) * target).sum(), backbone.choices.alphas()):
        assert (gradient.abs().sum(1) > 0).all()


def test_a_momentum_twin_takes_the_students_gates_and_keeps_its_own_weights():
    student = searchable("resnet")
    twin = momentum_copy(student)
    student.choices.set([3, 9, 0, 31])
    assert twin.choices is student.choices and twin.largest.conv1.weight is not student.largest.conv1.weight
    assert not any(p.requires_grad for p in twin.largest.parameters())
    assert all(a.requires_grad for a in student.choices.alphas())


def test_recalibrated_statistics_are_those_of_the_batches():
    backbone = build_backbone("resnet18", "small", 1 / 16)[0].double()
    with torch.no_grad():
        for m in backbone.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.fill_(7.0)
    batches = [torch.randn(8, 3, 16, 16, dtype=torch.double) for _ in range(3)]
    recalibrate(backbone, batches)
    y = [backbone.conv1(x).detach() for x in batches]
    torch.testing.assert_close(backbone.bn1.running_mean, sum(v.mean((0, 2, 3)) for v in y) / 3)
    torch.testing.assert_close(backbone.bn1.running_var, sum(v.var((0, 2, 3)) for v in y) / 3)
    assert backbone.bn1.momentum == 0.1 and backbone.training


def test_a_wrong_architecture_is_refused_by_what_is_wrong(tmp_path):
    good, path = BACKBONES["resnet18"], tmp_path / "arch.json"
    for arch, message in [
        ({}, 'has "block", "depth", "inner" and "kernel"'),
        (good | {"width": 1}, "and nothing else"),
        (good | {"block": "dense"}, "unknown block 'dense'"),
        (good | {"block": []}, r"unknown block \[\]"),
        (good | {"depth": [2, 2, 2]}, '"depth" must be a list of 4 numbers, 1 to 64'),
        (good | {"depth": [2, 2, 0, 2]}, '"depth"'),
        (good | {"depth": [2, 2, True, 2]}, '"depth"'),
        (good | {"inner": [1, 1, "1", 1]}, '"inner"'),
        (good | {"inner": [1, 1, float("nan"), 1]}, '"inner"'),
        (good | {"kernel": [3, 3, 4, 3]}, '"kernel" must be a list of 4 odd numbers'),
        (good | {"kernel": 3}, '"kernel"'),
    ]:
        path.write_text(json.dumps({"backbone": {"arch": arch}}))
        with pytest.raises(ValueError, match=message):
            load_arch(str(path))
        with pytest.raises(ValueError, match=message):
            build_backbone(arch)
    path.write_text(json.dumps({"backbone": {"arch": good}}))
    assert load_arch(str(path)) == good and load_arch("resnet18") == "resnet18"
    assert describe(good) == "basic 2x1k3 2x1k3 2x1k3 2x1k3"
    for text, message in [
        ("[]", "a list, where a JSON object should be"),
        ('{"backbone": {"arch": []}}', "'arch' is list, not str or dict"),
        ('{"backbone": {"width": 1}}', 'no backbone with an "arch" in it'),
        ('{"backbone": {"arch": "resnet18", "stages": 4}}', "unknown key 'stages'"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_arch(str(path))
    huge = good | {"depth": [64] * 4, "inner": [64] * 4, "kernel": [31] * 4}
    with pytest.raises(ValueError, match=r"parameters, more than 2,000,000,000"):
        build_backbone(huge)
    with pytest.raises(FileNotFoundError, match="neither a readable file nor one of resnet18"):
        load_arch("resnet19")
