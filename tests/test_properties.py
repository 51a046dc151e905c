"""Whatever is legal works, and whatever is not is refused in one line: specs of networks and heads, views, measures.

HYPOTHESIS_PROFILE=thorough pytest tests/test_properties.py looks at many more examples, other ones each time.
"""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from checkpoint import load_arch, load_heads
from linear_eval import balanced_rows, few_shot, fit_probes, knn_accuracy, probe_accuracy, rows_by_class
from models import (
    BLOCKS,
    OPS,
    SPACES,
    SearchBackbone,
    SearchHead,
    build_backbone,
    build_head,
    check_arch,
    describe,
    head_dims,
    macs,
    plan,
)
from views import RECIPES, MultiCrop, adjust, named

seeds = st.integers(0, 2**31 - 1)

# ---- networks -------------------------------------------------------------------------------------------------------


@st.composite
def archs(draw):
    block = draw(st.sampled_from(list(BLOCKS)))
    stages = 7 if block == "inverted" else 4

    def each(values):
        return draw(st.lists(values, min_size=stages, max_size=stages))

    inner = st.floats(1 / 64, 3, allow_nan=False) | st.integers(1, 3)
    depth, kernel = st.integers(1, 2), st.sampled_from([1, 3, 5, 7])
    return {"block": block, "depth": each(depth), "inner": each(inner), "kernel": each(kernel)}


STEMS = st.sampled_from(["small", "imagenet"])


@given(archs(), STEMS, st.sampled_from([1 / 32, 1 / 16, 0.1]), st.integers(16, 40), seeds)
def test_any_legal_architecture_builds_and_trains(tmp_path_factory, arch, stem, width, size, seed):
    path = tmp_path_factory.getbasetemp() / "arch.json"
    path.write_text(json.dumps({"backbone": {"arch": arch}}))
    assert load_arch(str(path)) == arch == check_arch(json.loads(json.dumps(arch)))
    torch.manual_seed(seed)
    network, features = build_backbone(arch, stem, width)
    h = network(torch.randn(2, 3, size, size))
    assert h.shape == (2, features) and h.isfinite().all() and describe(arch).startswith(arch["block"])
    h.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert len(plan(arch, width, stem).blocks) == sum(arch["depth"])
    again, _ = build_backbone(arch, stem, width)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(torch.ones(1, 3, size, size)), network.eval()(torch.ones(1, 3, size, size)))


wrong = st.sampled_from([None, True, "3", [], {}, -1, 0, 65, 1e9, math.nan, math.inf])


@given(archs(), st.data())
def test_any_other_architecture_is_refused_in_one_line(arch, data):
    key = data.draw(st.sampled_from(list(arch)))
    what = data.draw(st.sampled_from(["value", "item", "missing", "longer", "unknown"]))
    if what == "value":
        arch[key] = data.draw(wrong)
    elif what == "item":
        assume(key != "block")
        arch[key][data.draw(st.integers(0, len(arch[key]) - 1))] = data.draw(wrong)
    elif what == "missing":
        del arch[key]
    elif what == "longer":
        assume(key != "block")
        arch[key] = arch[key] * 2
    else:
        arch["another"] = 1
    with pytest.raises(ValueError, match=r"^here: ") as refusal:
        check_arch(arch, "here")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


@given(st.sampled_from(list(SPACES)), seeds, st.data())
def test_any_choice_is_a_slice_of_the_largest_network(name, seed, data):
    space = SPACES[name]
    torch.manual_seed(seed)
    backbone = SearchBackbone(space, 1 / 32, "small").double().eval()
    for m in backbone.modules():
        if isinstance(m, nn.BatchNorm2d):
            (
                nn.init.uniform_(m.weight, 0.5, 1.5),
                nn.init.normal_(m.running_mean),
                nn.init.uniform_(m.running_var, 0.5, 2),
            )
    option = st.integers(0, len(space.options) - 1)
    choice = data.draw(st.lists(option, min_size=len(space.stages), max_size=len(space.stages)))
    arch, x = space.arch(choice), torch.randn(2, 3, 16, 16, dtype=torch.double)
    assert space.choice(json.loads(json.dumps(arch))) == choice
    base, table = space.costs(1 / 32, "small", 16)
    assert macs(arch, 1 / 32, "small", 16) == base + sum(table[s, o].item() for s, o in enumerate(choice))
    backbone.choices.set(choice)
    for gate in backbone.choices.gates:
        gate.requires_grad_()  # so that it is masked
    cut = backbone.cut(choice).eval()
    torch.testing.assert_close(cut(x), backbone(x), rtol=1e-10, atol=1e-12)
    alone, _ = build_backbone(arch, "small", 1 / 32)
    alone.double().eval().load_state_dict(cut.state_dict())
    assert torch.equal(alone(x), cut(x))


# ---- heads ----------------------------------------------------------------------------------------------------------

widths = st.sampled_from([1, 3, 8, 17])


@given(st.lists(st.sampled_from(list(OPS)), min_size=1, max_size=5), widths, widths, widths, seeds)
def test_any_legal_head_builds_trains_and_is_what_one_hot_alphas_mix(tmp_path_factory, ops, i, hidden, o, seed):
    path = tmp_path_factory.getbasetemp() / "heads.json"
    path.write_text(json.dumps({"heads": {"projector": ops}}))
    assert load_heads(str(path), ["projector"]) == {"projector": ops}
    torch.manual_seed(seed)
    dims = head_dims(len(ops), i, hidden, o)
    head, x = build_head(ops, dims), torch.randn(4, i)
    y = head(x)
    assert y.shape == (4, o) and y.isfinite().all()
    if any(p.requires_grad for p in head.parameters()):
        y.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in head.parameters())
    searchable = SearchHead(dims)
    with torch.no_grad():
        for row, op in zip(searchable.alpha, ops):
            row[list(OPS).index(op)] = 200.0
    assert searchable.discretise() == ops and searchable(x).shape == (4, o)


@given(st.lists(st.sampled_from([*OPS, "linear_gelu", 3, None, ["identity"]]), max_size=3) | st.integers() | st.none())
def test_any_other_head_is_refused_in_one_line(tmp_path_factory, ops):
    assume(not isinstance(ops, list) or not ops or any(not isinstance(op, str) or op not in OPS for op in ops))
    path = tmp_path_factory.getbasetemp() / "wrong.json"
    path.write_text(json.dumps({"heads": {"projector": ops}}))
    with pytest.raises(ValueError, match=str(path)) as refusal:
        load_heads(str(path), ["projector"])
    assert "\n" not in str(refusal.value)


# ---- views ----------------------------------------------------------------------------------------------------------


@st.composite
def knobs(draw):
    def maybe(values):
        return draw(st.none() | values)

    share, size = st.floats(0.01, 1), st.integers(8, 40)
    scale = st.tuples(share, share).map(sorted)
    return {
        "n_globals": maybe(st.integers(1, 2)),
        "n_locals": maybe(st.integers(0, 3)),
        "global_scale": maybe(scale),
        "local_scale": maybe(scale),
        "global_size": maybe(size),
        "local_size": maybe(size),
        "blur": maybe(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 3)),
        "solarize": maybe(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 3)),
    }


@given(st.sampled_from(list(RECIPES)), knobs(), st.integers(8, 48), st.integers(8, 48), st.integers(2, 6), seeds)
def test_any_views_are_finite_repeatable_and_shared_out_by_rows(name, knobs, height, width, n, seed):
    views = MultiCrop(adjust(RECIPES[name], **knobs), min(height, width))
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, height, width), generator=g, dtype=torch.uint8)
    parameters = views.sample(n, height, width, np.random.default_rng(seed))
    whole = views.render(pixels, parameters)
    assert len(whole) == len(views.views) and views.n_globals in (1, 2)
    low, high = ((v - views.mean) / views.std for v in (0, 1))
    for view, x in zip(views.views, whole):
        assert x.shape == (n, 3, view.size, view.size) and x.dtype == torch.float32
        assert (x >= low - 1e-3).all() and (x <= high + 1e-3).all()
    for p, view in zip(map(named, parameters), views.views):
        top, left, h, w = p["box"].unbind(1)
        assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all() and view.size >= 8
    cut = n // 2
    for rows in slice(cut), slice(cut, n):
        part = views.render(pixels[rows], parameters[:, rows])
        for x, y in zip(whole, part):
            torch.testing.assert_close(y, x[rows], rtol=1e-4, atol=1e-4)


@given(st.sampled_from(list(RECIPES)), st.data())
def test_any_other_knob_is_refused_in_one_line(name, data):
    bad = data.draw(
        st.sampled_from(
            [
                {"global_scale": (0.5, 0.4)},
                {"local_scale": (0.0, 0.4)},
                {"global_scale": (0.5, 1.1)},
                {"boundary": 0.3, "local_scale": (0.1, 0.2)},
                {"boundary": 0.0},
                {"n_locals": -1},
                {"global_size": 7},
                {"local_size": 0},
                {"blur": (0.5, 1.5, 0)},
                {"solarize": (-0.1, 0, 0)},
                {"balance": (-1.0, 1.0)},
            ]
        )
    )
    with pytest.raises(ValueError) as refusal:
        adjust(RECIPES[name], **bad)
    assert "\n" not in str(refusal.value)


# ---- measures -------------------------------------------------------------------------------------------------------


@st.composite
def labelled(draw, least=1):
    """(features (N, F), labels (N,) of C classes, each of `least` images or more)"""
    counts = draw(st.lists(st.integers(least, 6), min_size=2, max_size=5))
    g = torch.Generator().manual_seed(draw(seeds))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=g)]
    return torch.randn(len(labels), draw(st.integers(2, 6)), generator=g), labels


@given(labelled(), st.integers(1, 40), st.floats(0.05, 1), st.integers(1, 7), st.data())
def test_knn_is_what_numpy_says_and_takes_no_notice_of_order_or_length(bank, k, temperature, chunk, data):
    h, labels = bank
    g = torch.Generator().manual_seed(data.draw(seeds))
    query, answers = torch.randn(9, h.shape[1], generator=g), torch.randint(0, 5, (9,), generator=g)
    got = knn_accuracy(h, labels, query, answers, k, temperature, chunk)
    a, b = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (query, h))
    right = 0
    for similarity, answer in zip(a @ b.T, answers.tolist()):
        votes = np.zeros(5)
        for i in np.argsort(-similarity)[: min(k, len(h))]:
            votes[labels[i]] += np.exp(similarity[i] / temperature)
        best = np.sort(votes)
        assume(best[-1] - best[-2] > 1e-4 * best[-1])  # no tie
        right += votes.argmax() == answer
    assert got == pytest.approx(right / 9)
    order = torch.randperm(len(h), generator=g)
    assert got == knn_accuracy(3 * h[order], labels[order], query / 7, answers, k, temperature, 1024)


@given(labelled(least=2), st.floats(0.01, 1), seeds)
def test_labels_are_drawn_evenly_and_the_same_way_again(data, fraction, seed):
    _, labels = data
    rows = balanced_rows(labels, fraction, seed)
    assert torch.equal(rows, balanced_rows(labels, fraction, seed)) and len(rows.unique()) == len(rows)
    counts, all_of = labels[rows].bincount(minlength=int(labels.max()) + 1), labels.bincount()
    full = counts == all_of
    assert (counts >= 1).all() and (counts <= all_of).all()
    assert full.all() or counts[~full].max() - counts[~full].min() <= 1
    assert [r.tolist() for r in rows_by_class(labels)] == [
        (labels == c).nonzero()[:, 0].tolist() for c in range(len(all_of))
    ]


@given(labelled(least=3), st.integers(1, 3), st.integers(1, 5), seeds)
def test_few_shot_is_a_share_and_perfect_where_classes_are_apart(data, shots, draws, seed):
    h, labels = data
    mean, half = few_shot(h, labels, h, labels, shots, draws, seed)
    assert 0 <= mean <= 1 and (math.isnan(half) if draws == 1 else half >= 0)
    apart = torch.eye(int(labels.max()) + 1)[labels] + 1e-3 * torch.nn.functional.normalize(h)[:, :1]
    assert few_shot(apart, labels, apart, labels, shots, draws, seed)[0] == 1
    with pytest.raises(ValueError, match="the smallest class has"):
        few_shot(h, labels, h, labels, 7, draws, seed)


@given(labelled(), seeds)
def test_a_grid_of_probes_is_each_probe_alone(data, seed):
    h, labels = data
    classes, grid = int(labels.max()) + 1, [(0.3, 0.0), (0.01, 1e-3), (1.0, 1e-4)]
    weight, bias = fit_probes(h, labels, classes, grid, 3, seed)
    assert weight.shape == (h.shape[1], 3, classes) and weight.isfinite().all()
    for k, point in enumerate(grid):
        w, b = fit_probes(h, labels, classes, [point], 3, seed)
        torch.testing.assert_close(weight[:, k], w[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias[k], b[0], rtol=1e-4, atol=1e-5)
    assert all(0 <= a <= 1 for a in probe_accuracy(weight, bias, h, labels))
