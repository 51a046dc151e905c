"""Backbones against torchvision's, spaces against enumeration, heads against the facts of NASiam (2302.00059).

HYPOTHESIS_PROFILE=thorough looks at many more examples, other ones each time.
"""

import copy
import json
import math
import random
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from losses import momentum_copy
from models import BACKBONES, OPS, PRESETS, SPACES, build_backbone, macs

PREDICTOR = models.head_dims(4, 2048, 512, 2048)
seeds = st.integers(0, 2**31 - 1)


def count(module):
    return sum(p.numel() for p in module.parameters())


def counted_macs(network, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size, dtype=next(network.parameters()).dtype))
    return counter.get_total_flops() // 2


def randomise_norms(network):
    """Every parameter and buffer counts: at the start the last BN of a branch is zero."""
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.0)
            nn.init.uniform_(m.bias, -0.2, 0.2)
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 2.0)
    return network


# ---- backbones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*BACKBONES, "vit_tiny"])
def test_torchvisions_model_loads_the_state_dict_and_gives_the_same_features(arch):
    ours, feature_dim = build_backbone(arch)
    vit = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768) if arch == "vit_tiny" else None
    theirs = vit or torchvision.models.get_model(arch)
    theirs.fc = theirs.classifier = theirs.heads = nn.Identity()
    theirs.load_state_dict(randomise_norms(ours).state_dict())
    x = torch.randn(2, 3, *[224 if vit else 64] * 2)
    with torch.no_grad():
        h = ours.eval()(x)
        torch.testing.assert_close(h, theirs.eval()(x), atol=1e-5, rtol=1e-5)
    assert h.shape == (2, feature_dim) and h.abs().max() > 1e-3


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("arch", BACKBONES)
def test_the_stages_maps_have_the_strides_and_channels_of_the_papers(arch, stem):
    network, feature_dim = build_backbone(arch, stem, 0.25)
    if arch == "mobilenet_v2":
        channels = [8, 8, 8, 16, 24, 40, 1280]  # torchvision never narrows the last layer
        strides = [2, 4, 8, 16, 16, 32, 32] if stem == "imagenet" else [1, 1, 2, 4, 4, 8, 8]
    else:
        channels = [c * (4 if arch == "resnet50" else 1) for c in (16, 32, 64, 128)]
        strides = [4, 8, 16, 32] if stem == "imagenet" else [1, 2, 4, 8]
    shapes = [tuple(m.shape[1:]) for m in network.stages(torch.randn(2, 3, 64, 96))]
    assert shapes == [(c, 64 // stride, 96 // stride) for c, stride in zip(channels, strides)]
    assert feature_dim == channels[-1]


def test_a_vit_takes_any_size_of_whole_patches():
    vit, x = build_backbone("vit_tiny", "small")[0].eval(), torch.randn(2, 3, 12, 20)
    blocks, (patches,) = vit.last_blocks(x, 4), vit.stages(x)
    assert blocks.shape == (2, 4 * 192) and patches.shape == (2, 192, 3, 5)
    torch.testing.assert_close(blocks[:, -192:], vit(x))
    torch.testing.assert_close(patches[:, :, 1, 2], vit.encoder.ln(vit.encoder.layers(vit.tokens(x)))[:, 1 + 5 + 2])
    grid = vit.encoder.pos_embedding[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
    smaller = nn.functional.interpolate(grid, (3, 5), mode="bicubic").flatten(2).transpose(1, 2)
    nn.init.zeros_(vit.conv_proj.weight)
    torch.testing.assert_close(vit.tokens(x)[:1, 1:], smaller)
    with pytest.raises(ValueError, match="views of 30 x 32 px: a ViT needs multiples of its patch, 4"):
        vit(torch.randn(2, 3, 30, 32))


def test_gradients_do_not_depend_on_the_memory_format():
    """But for rounding, which takes some activations across ReLU's corner: hence the seed."""
    torch.manual_seed(0)
    network, x = build_backbone("resnet18", "small", 1 / 16)[0], torch.randn(16, 3, 64, 64)
    weight = torch.randn(16, network.feature_dim)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=memory_format).zero_grad()
        (network(x.contiguous(memory_format=memory_format)) * weight).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[0].norm()


def test_drop_path_skips_branches_of_some_images_in_the_student_alone():
    torch.manual_seed(0)
    vit, _ = build_backbone("vit_tiny", "small", 1 / 3, drop_path=0.9)
    x = torch.randn(1, 3, 32, 32).repeat(64, 1, 1, 1)
    assert len(vit(x).detach().unique(dim=0).round(decimals=4)) > 8
    teacher = momentum_copy(vit).train()
    torch.testing.assert_close(teacher(x), vit.eval()(x)[:1].expand(64, -1))
    assert vit.state_dict().keys() == build_backbone("vit_tiny", "small", 1 / 3)[0].state_dict().keys()
    with pytest.raises(ValueError, match=r"drop path of 0\.1 means nothing to resnet18"):
        build_backbone("resnet18", drop_path=0.1)


def test_sizes_of_the_papers():
    at_224 = {"resnet18": 1.814e9, "resnet34": 3.663e9, "resnet50": 4.087e9, "mobilenet_v2": 299.5e6}
    assert {a: macs(BACKBONES[a]) for a in BACKBONES} == pytest.approx(at_224, rel=5e-4)
    assert macs(BACKBONES["resnet18"], stem="small", size=32) == pytest.approx(555.4e6, rel=1e-4)
    sizes = {"resnet18": 11_176_512, "resnet34": 21_284_672, "mobilenet_v2": 2_223_872, "vit_tiny": 5_524_416}
    assert {a: count(build_backbone(a)[0]) for a in sizes} == sizes
    assert count(build_backbone("resnet18", "small")[0]) == 11_168_832
    with torch.device("meta"):  # SSA: MobileNetV2 of three times the width, the ends of the grid {2,3,4}^4
        grid = [{**BACKBONES["resnet50"], "depth": [d] * 4} for d in (2, 4)]
        sizes = [count(build_backbone(a, width=w)[0]) for a, w in (("mobilenet_v2", 3.0), (grid[0], 1), (grid[1], 1))]
        assert sizes == pytest.approx([19.42e6, 13.95e6, 25.81e6], rel=1e-3)
        # NASiam; its MoCo copy has a bias in each of 16 Linears, which the BN behind them makes useless
        assert count(models.SearchHead([512] * 7)) == 6_328_320 + 7 * 6
        assert count(models.SearchHead(PREDICTOR)) == 16_821_248 + 7 * 4
        assert count(models.SearchHead([512] * 5)) + 16 * 512 == 4_227_072 + 7 * 4
        assert count(models.SearchHead(models.head_dims(6, 2048, 512, 128))) == 12_029_184 + 7 * 6
        assert count(models.build_head(PRESETS["simsiam_cifar10_resnet18"]["projector"], [512] * 7)) == 1_052_672
        assert count(models.build_head(PRESETS["simsiam_cifar10_resnet18"]["predictor"], PREDICTOR)) == 2_102_272


@st.composite
def archs(draw):
    inner = st.floats(1 / 64, 3, allow_nan=False) | st.integers(1, 3)
    values = {"depth": st.integers(1, 2), "inner": inner, "kernel": st.sampled_from([1, 3, 5, 7])}
    block = draw(st.sampled_from(list(models.BLOCKS)))
    stages = 7 if block == "inverted" else 4
    return {"block": block, **{k: draw(st.lists(v, min_size=stages, max_size=stages)) for k, v in values.items()}}


@given(archs(), st.sampled_from(["small", "imagenet"]), st.sampled_from([1 / 32, 1 / 16, 0.1]), st.integers(16, 40))
def test_any_legal_architecture_trains_and_has_the_macs_that_torch_counts(arch, stem, width, size):
    assert models.check_arch(json.loads(json.dumps(arch))) == arch
    network, feature_dim = build_backbone(arch, stem, width)
    x = torch.randn(2, 3, size, size)
    h = network(x)
    assert h.shape == (2, feature_dim) and h.isfinite().all()
    h.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    maps = network.eval().stages(x)
    assert torch.equal(maps[-1].mean((2, 3)), network(x)) and len(maps) == len(arch["depth"])
    assert len(models.plan(arch, width, stem).blocks) == sum(arch["depth"])
    parts = models.stage_macs(arch, width, stem, size)
    assert counted_macs(network, size) == macs(arch, width, stem, size) == sum(parts)


@given(archs(), st.sampled_from([None, True, "3", [], {}, -1, 0, 65, 1e9, math.nan, math.inf]), st.data())
def test_any_other_architecture_is_refused_in_one_line(arch, wrong, data):
    key = data.draw(st.sampled_from(["another", *arch]))
    if data.draw(st.booleans()) and isinstance(arch.get(key), list):
        arch[key][data.draw(st.integers(0, len(arch[key]) - 1))] = wrong
    elif data.draw(st.booleans()) and isinstance(arch.get(key), list):
        arch[key] = arch[key][1:] * data.draw(st.integers(0, 2))
    else:
        arch[key] = wrong
    with pytest.raises(ValueError, match=r"^here: ") as refusal:
        models.check_arch(arch, "here")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


def test_networks_of_no_name_or_too_large_and_heads_of_other_layers_are_refused():
    with pytest.raises(ValueError, match="unknown architecture 'resnet19': choose from resnet18"):
        build_backbone("resnet19")
    largest = {"depth": [64] * 4, "inner": [64] * 4, "kernel": [31] * 4}
    with pytest.raises(ValueError, match="parameters, more than 2,000,000,000"):
        build_backbone(BACKBONES["resnet18"] | largest)
    with pytest.raises(ValueError, match="needs 3 dims"):
        models.build_head(["identity", "identity"], [4, 4])


# ---- searchable backbones -------------------------------------------------------------------------------------------

NARROW = {"resnet": 1 / 64, "bottleneck": 1 / 64, "mobilenet": 1 / 8}  # few enough terms for BLAS to sum them in one go


def searchable(space, width):
    """With gates of the smallest subnet; those with gradients are masks, others slices."""
    backbone = randomise_norms(models.SearchBackbone(space, width, "small")).double()
    backbone.choices.set([0] * len(space.stages))
    return backbone, torch.randn(4, 3, 16, 16, dtype=torch.double)


def mask(backbone, masked):
    for gate in backbone.choices.gates.values():
        gate.requires_grad_(masked)


@pytest.mark.parametrize("name, size", [("resnet", 32**4), ("bottleneck", 32**4), ("mobilenet", 36**5)])
def test_a_space_has_its_size_and_holds_the_handcrafted_network(name, size):
    space = SPACES[name]
    assert len(space.options) ** len(space.stages) == size
    choice = space.choice(space.handcrafted)
    assert choice is None if name == "bottleneck" else space.arch(choice) == BACKBONES[space.handcrafted]
    assert space.choice("resnet34") is None  # as ResNet50, it has a stage of 6


@settings(max_examples=settings.default.max_examples // 2)  # the slowest
@given(st.sampled_from(list(SPACES)), st.booleans(), seeds, st.data())
def test_masked_sliced_and_alone_a_subnet_is_the_same_network(name, training, seed, data):
    """But for the order of sums, which zeros among the terms change on some CPUs."""
    torch.manual_seed(seed)
    space, width = SPACES[name], NARROW[name]
    options = st.integers(0, len(space.options) - 1)
    choice = data.draw(st.lists(options, min_size=len(space.stages), max_size=len(space.stages)))
    arch = json.loads(json.dumps(space.arch(choice)))
    assert space.choice(arch) == choice
    backbone, x = searchable(space, width)
    subnet = backbone.train(training).subnet(choice).train(training)
    before = copy.deepcopy(backbone.state_dict())
    y = subnet(x)
    assert y.abs().max() > 1e-3
    for masked in (True, False):
        backbone.load_state_dict(before)
        backbone.choices.set(choice)
        mask(backbone, masked)
        torch.testing.assert_close(backbone(x), y, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(backbone.slices(choice), dict(subnet.state_dict()), rtol=1e-11, atol=1e-11)
    base, table = space.costs(width, "small", 16)
    cost = base + sum(table[s, o].item() for s, o in enumerate(choice))
    assert macs(arch, width, "small", 16) == cost


@pytest.mark.parametrize("name", SPACES)
def test_masked_or_sliced_what_is_left_out_gets_no_gradient_and_the_rest_the_same(name):
    torch.manual_seed(0)
    backbone, x = searchable(SPACES[name], 1 / 8)
    weights = list(backbone.supernet.parameters())
    target = torch.randn(4, backbone.feature_dim, dtype=torch.double)
    left_out = copy.deepcopy(backbone)  # ones outside the smallest subnet
    for p in left_out.supernet.parameters():
        p.data.fill_(1)
    for part in left_out.slices(backbone.choices.choice()).values():
        part.data.zero_()
    gradients = []
    for masked in (True, False):
        mask(backbone, masked)
        gradients.append(torch.autograd.grad((backbone(x) * target).sum(), weights, materialize_grads=True))
    for a, b, out in zip(*gradients, left_out.supernet.parameters()):
        assert (a * out == 0).all() and (b * out == 0).all()
        torch.testing.assert_close(a, b)
    assert sum(out.sum() for out in left_out.supernet.parameters()) > 0.5 * count(backbone.supernet)


def test_expected_cost_are_the_enumerations():
    choices = {"depth": (1, 3), "inner": (2.0, 4.0), "kernel": (5, 7)}
    space = replace(SPACES["mobilenet"], stages=(1, 2), choices=choices)
    choices = models.Choices(space).double()
    alphas = [nn.init.normal_(alpha) for alpha in choices.alphas().values()]
    shares = [alpha.detach().softmax(1) for alpha in alphas]
    values = product((0, 1), repeat=3)  # of each option, in the order of Space.options
    p = torch.stack([math.prod(share[:, v] for share, v in zip(shares, value)) for value in values], 1)  # (S, O)
    costs = {c: macs(space.arch(c), 0.25, "imagenet", 70) for c in product(range(len(space.options)), repeat=2)}
    mean = sum(float(p[0, a] * p[1, b]) * cost for (a, b), cost in costs.items())
    base, table = space.costs(0.25, "imagenet", 70)
    assert choices.expected_cost(base, table).item() == pytest.approx(mean, rel=1e-12)
    assert torch.autograd.gradcheck(lambda *_: choices.expected_cost(base, table) / base, alphas)


def test_derivation_is_the_best_in_the_band_by_enumeration():
    space = replace(SPACES["resnet"], stages=(1, 2, 3), choices={"depth": (1, 2), "inner": (0.25, 0.5, 0.75, 1.0)})
    base, table = space.costs(1.0, "small", 32)
    everything = list(product(range(len(space.options)), repeat=3))
    target = base + 0.6 * float(table.sum(1).max())
    good = [c for c in everything if 0.95 * target <= macs(space.arch(c), 1.0, "small", 32) <= target]
    assert 0 < len(good) < len(everything) / 2
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        scores = torch.randn(table.shape, generator=g)
        best = max(good, key=lambda c: sum(float(scores[s, o]) for s, o in enumerate(c)))
        assert models.derive(scores, base, table, target) == list(best)
    assert {tuple(models.random_choice(base, table, target, g)) for _ in range(40 * len(good))} == set(good)
    with pytest.raises(ValueError, match=r"no network of the space has .* MMACs: they go from"):
        models.random_choice(base, table, 1.0, g)


def test_gates_are_one_hot_follow_the_generator_and_pass_gradients_that_sum_to_zero():
    choices = models.Choices(SPACES["mobilenet"])
    draws = []
    for seed in (0, 0, 1):
        choices.sample(2.0, np.random.default_rng(seed))
        draws.append(choices.choice())
        for gate in choices.gates.values():
            assert torch.equal(gate.sum(1), torch.ones(5)) and set(gate.unique().tolist()) == {0, 1}
    assert draws[0] == draws[1] != draws[2]
    loss = sum((gate * torch.randn(gate.shape)).sum() for gate in choices.gates.values())
    for gradient in torch.autograd.grad(loss, list(choices.alphas().values())):
        assert gradient.abs().min() > 0 and gradient.sum(1).abs().max() < 1e-6
    for c in ([0, 7, 35, 12, 20], choices.largest):
        choices.set(c)
        choices.known_choice = None  # read from the gates
        assert choices.choice() == c
    nn.init.normal_(choices.depth_alpha)
    rng, share = np.random.default_rng(0), torch.zeros(5, 4)
    for _ in range(2000):
        choices.sample(0.5, rng)
        share += choices.gates["depth"].detach() / 2000
    torch.testing.assert_close(share, choices.depth_alpha.detach().softmax(1), atol=0.04, rtol=0)


def test_recalibrated_statistics_are_those_of_the_batches():
    backbone = randomise_norms(build_backbone("resnet18", "small", 1 / 16)[0]).double()
    batches = [torch.randn(8, 3, 16, 16, dtype=torch.double) for _ in range(3)]
    models.recalibrate(backbone, batches)
    y = [backbone.conv1(x).detach() for x in batches]
    torch.testing.assert_close(backbone.bn1.running_mean, sum(v.mean((0, 2, 3)) for v in y) / 3)
    torch.testing.assert_close(backbone.bn1.running_var, sum(v.var((0, 2, 3)) for v in y) / 3)
    assert backbone.bn1.momentum == 0.1 and backbone.training


# ---- heads ----------------------------------------------------------------------------------------------------------

dims_of = st.lists(st.sampled_from([1, 3, 8, 17]), min_size=2, max_size=6)


@given(dims_of, seeds)
def test_any_head_trains_and_is_what_one_hot_alphas_make_of_the_mixture(dims, seed):
    torch.manual_seed(seed)
    ops = models.random_head(len(dims) - 1, random.Random(seed))
    search, head, x = (
        models.SearchHead(dims).double(),
        models.build_head(ops, dims).double(),
        torch.randn(8, dims[0]).double(),
    )
    assert search.entropy() == pytest.approx([1] * len(ops))
    y = x
    for layer in search.layers:
        y = torch.stack([op(y) for op in layer]).mean(0)
    torch.testing.assert_close(search(x), y)
    search(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in search.parameters())
    chosen = [list(OPS).index(op) for op in ops]
    with torch.no_grad():
        search.alpha.fill_(-1000.0)[range(len(ops)), chosen] = 1000.0
    for own, layer, k in zip(head, search.layers, chosen):
        own.load_state_dict(layer[k].state_dict())
    torch.testing.assert_close(search(x), head(x))
    assert search.discretise() == ops and max(search.entropy()) < 1e-6 and head(x).shape == (8, dims[-1])


def test_pools_run_along_the_features_and_identity_is_nothing():
    x, want = torch.tensor([[0.0, 1, 2], [3, 4, 5]]), torch.tensor([[1 / 3, 1, 1], [7 / 3, 4, 3]])
    torch.testing.assert_close(OPS["avgpool_3x3"](3, 3)[0](x), want)
    assert OPS["maxpool_3x3"](3, 3)[0](torch.tensor([[-1.0, -2, -5]])).tolist() == [[-1, -1, -2]]
    assert OPS["identity"](3, 3)(x) is x and count(OPS["identity"](3, 3)) == 0


@pytest.mark.parametrize("in_dim, out_dim, distinct", [(8, 8, 7), (16, 8, 6), (8, 16, 3)])
def test_operations_that_are_said_to_coincide_do(in_dim, out_dim, distinct):
    """Same random numbers, same module: in pairs, exactly those outside distinct_ops equal one inside it."""
    x, outputs = torch.randn(64, in_dim), {}
    for name in OPS:
        torch.manual_seed(0)
        outputs[name] = OPS[name](in_dim, out_dim)(x)
    kept = models.distinct_ops(in_dim, out_dim)
    assert len(kept) == distinct
    for a in OPS:
        equal = [b for b in kept if torch.equal(outputs[a], outputs[b])]
        assert len(equal) == 1 and (a not in kept or equal == [a])


@pytest.mark.parametrize("dims", [[16, 8, 8, 8], [8, 8, 16, 16], [8, 16, 8]])
def test_heads_are_counted_by_name_by_choice_and_as_functions(dims):
    layers = list(pairwise(dims))
    specs = list(product(OPS, repeat=len(layers)))
    choices = {tuple(map(models.true_name, spec, *zip(*layers))) for spec in specs}
    functions = {tuple(pair for pair in zip(choice, layers) if pair[0] != "identity") for choice in choices}
    assert models.count_heads(dims) == (len(specs), len(choices), len(functions))


def test_simsiams_heads_are_counted_and_drawn_evenly_by_the_seed():
    counts = zip(models.count_heads([512] * 7), models.count_heads(PREDICTOR))
    assert [a * b for a, b in counts] == [7**10, 103_766_418, 43_333_938]
    draw = [models.random_head(4, random.Random(seed)) for seed in (1, 1, *range(2, 300))]
    assert {op for heads in PRESETS.values() for ops in heads.values() for op in ops} <= set(OPS)
    assert draw[0] == draw[1] and all({head[layer] for head in draw} == set(OPS) for layer in range(4))
