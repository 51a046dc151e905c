"""Backbones against torchvision's own, heads against the facts of NASiam (2302.00059)."""

import copy
import json
import random

import pytest
import torch
import torchvision
from torch import nn

import models
from losses import METHODS
from models import (
    BACKBONES,
    OPS,
    PRESETS,
    SearchHead,
    build_backbone,
    build_head,
    count_heads,
    distinct_ops,
    head_dims,
    load_heads,
    random_head,
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
    head, x = SearchHead(dims).double(), torch.randn(32, dims[0], dtype=torch.double)
    first = torch.stack([op(x) for op in head.layers[0]]).mean(0)
    short = SearchHead(dims[:2]).double()
    short.layers = head.layers[:1]
    torch.testing.assert_close(short(x), first)
    for seed in range(5):
        spec = random_head(len(dims) - 1, random.Random(seed))
        with torch.no_grad():
            head.alpha.fill_(-1000.0)
            for layer, name in enumerate(spec):
                head.alpha[layer, list(OPS).index(name)] = 1000.0
        assert head.discretise() == spec and max(head.entropy()) < 1e-6
        derived = build_head(spec, dims).double()
        for mine, layer, name in zip(derived, head.layers, spec):
            mine.load_state_dict(layer[list(OPS).index(name)].state_dict())
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
        ("{", "is not an arch.json"),
        ("[]", "is not an arch.json"),
        ('{"heads": 3}', "it has int"),
        ('{"heads": {"projector": "identity"}}', "must be a list"),
        (json.dumps({"heads": bad}), "unknown operation 'linear_gelu'"),
        ('{"heads": {"projector": [["identity"]]}}', "unknown operation"),
    ]:
        arch.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_heads(str(arch), ["projector"])
