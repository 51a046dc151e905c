"""Files from strangers: whatever is in them, no code of theirs runs, nothing ends in a traceback, no file changes."""

import copy
import json
import os
import random

import pytest
import torch
from conftest import build, load, run

import pretrain
from checkpoint import Checkpoint, load_arch, load_backbone, load_heads, save_backbone
from models import PRESETS, SPACES, build_backbone

ODD = [None, True, -1, 0, 10**30, 1e308, float("nan"), "", "../../etc/passwd", "\x00", "ü\n", [], {}, [[]], {"": {}}]


class Payload:
    """What runs `touch` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def leaves(value, at=()):
    """Paths of all that is in nested dicts and lists, the inner nodes too."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*at, key)
        yield from leaves(part, (*at, key))


def mutated(value, rng):
    """A copy of nested dicts and lists with one thing replaced, taken out or added."""
    value = copy.deepcopy(value)
    *way, last = rng.choice(list(leaves(value)))
    parent = value
    for key in way:
        parent = parent[key]
    what = rng.choice(["replace", "replace", "remove", "add", "twice"])
    if what == "replace":
        parent[last] = rng.choice(ODD)
    elif what == "remove":
        del parent[last]
    elif isinstance(parent, dict):
        parent["another"] = rng.choice(ODD)
    else:
        parent.extend(copy.deepcopy(parent) if what == "twice" else [rng.choice(ODD)])
    return value


def damaged(data, rng):
    """Bytes with a few of them changed, some cut off, or some written over."""
    data = bytearray(data)
    what, place = rng.choice(["flip", "cut", "over", "insert"]), rng.randrange(len(data))
    if what == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del data[place:]
    elif what == "over":
        data[place : place + 16] = rng.randbytes(16)
    else:
        data[place:place] = rng.randbytes(rng.randint(1, 64))
    return bytes(data)


def accepted(act):
    """Whether it is; only what user_errors makes one line of may say no."""
    try:
        act()
    except (ValueError, OSError) as error:
        assert len(str(error)) < 500, error
        return False
    return True


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a search of heads and backbone leaves, as far as it is read again."""
    folder, space = tmp_path_factory.mktemp("found"), SPACES["resnet"]
    arch = space.arch([9 * stage for stage in range(len(space.stages))])
    facts = {"arch": arch, "width": 0.0625, "stem": "small", "mean": [0.5] * 3, "std": [0.2] * 3, "data": "shapes"}
    save_backbone(build_backbone(arch, "small", 0.0625)[0], facts, folder)
    found = {"space": ["heads", "resnet"], "heads": PRESETS["simsiam_cifar10_resnet18"], "backbone": facts}
    (folder / "arch.json").write_text(json.dumps(found))
    return folder


def read_arch(path):
    arch, heads = load_arch(str(path)), load_heads(str(path), ["projector", "predictor"])
    build_backbone(arch, "small", 0.0625)
    assert arch and heads


def read_weights(path):
    load_backbone(str(path.with_suffix(".pth")))


@pytest.mark.parametrize("name, read", [("arch.json", read_arch), ("backbone.json", read_weights)])
def test_malformed_json_is_refused(name, read, found, tmp_path):
    rng, path, refusals = random.Random(0), tmp_path / name, 0
    (tmp_path / "backbone.pth").write_bytes((found / "backbone.pth").read_bytes())
    facts = json.loads((found / name).read_text())
    for i in range(70):
        text = json.dumps(facts).encode()
        path.write_bytes(json.dumps(mutated(facts, rng)).encode() if i % 4 else damaged(text, rng))
        before = contents(tmp_path)
        refusals += not accepted(lambda: read(path))
        assert contents(tmp_path) == before
    assert refusals > 20
    path.write_text("[" * 100_000)
    assert not accepted(lambda: read(path))


def test_one_bit_of_a_weight_is_noticed(found, tmp_path):
    data, path = bytearray((found / "backbone.pth").read_bytes()), tmp_path / "backbone.pth"
    (tmp_path / "backbone.json").write_text((found / "backbone.json").read_text())
    weight = load(found / "backbone.pth")["layer4.0.conv1.weight"].numpy().tobytes()
    place = bytes(data).index(weight) + len(weight) // 2
    data[place] ^= 1  # still a number, and finite
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["layer4.0.conv1.weight"].isfinite().all()  # torch takes it
    with pytest.raises(ValueError, match="damaged"):
        load_backbone(str(path))


def test_a_malformed_checkpoint_is_refused_and_left_alone(found, tmp_path, capsys):
    """By bytes, by structure, and by a pickle that would run a command."""
    flags = ["--epochs", 2, "--method", "moco", "--output-dir", tmp_path]
    run(pretrain, tmp_path, *flags)
    path, rng, refusals = tmp_path / "checkpoint.pth", random.Random(0), 0
    whole, state = path.read_bytes(), load(path)
    things = build(pretrain, tmp_path / "other", *flags[:-2]).checkpoint.things
    facts = json.loads(state["facts"])["facts"]
    for i in range(40):
        if i % 2:
            path.write_bytes(damaged(whole, rng))
        else:
            torch.save(mutated(state, rng), path)
        before = contents(tmp_path)

        def go_on():
            checkpoint = Checkpoint(tmp_path, things, facts, "", torch.device("cpu"), 16)
            assert (checkpoint.step, len(checkpoint.history)) == (16, 2)

        refusals += not accepted(go_on)
        assert contents(tmp_path) == before
    assert refusals > 25
    other = state | {"facts": state["facts"].replace('"step": 16', '"step": 8')}
    for bad in (Payload(tmp_path / "run"), state | {"facts": Payload(tmp_path / "run")}, other, [1, 2], 7):
        for file, act in ((path, go_on), (tmp_path / "backbone.pth", lambda: read_weights(tmp_path / "backbone.pth"))):
            torch.save(bad, file)
            assert not accepted(act) and not (tmp_path / "run").exists()
