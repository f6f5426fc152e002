"""Which parameter goes to which optimizer, at which rate and decay, as the sources group them."""

import json

import pytest
from recordings import GOLDEN, turning

from recurgolf import importers, optim
from recurgolf.importers.settings import read_settings

RECORDED = [
    (path.parents[1].name, number, recorded)
    for path in sorted(GOLDEN.glob("*/optimizer/groups.json"))
    for number, recorded in enumerate(json.loads(path.read_text()))
]


@pytest.mark.parametrize(
    ("system", "number", "recorded"), RECORDED, ids=[f"{s}-{n}" for s, n, _ in RECORDED]
)
def test_every_parameter_has_the_recorded_optimizer_rate_and_decay(system, number, recorded):
    known = importers.SYSTEMS[system]
    values = read_settings(known, turning(recorded["hyperparameters"]))
    run = importers.run_of(known, values)
    transformer = run.build_model()
    groups = optim.build(run.optimizer, transformer)
    group_of = {name: group for group in groups for name in group.parameters}
    sources = {}
    for place in known.places(transformer, values, {}):
        sources.setdefault(place.source, set()).add(place.ours)
    listed = set()
    for group in recorded["groups"]:
        options = group["options"]
        for name in group["params"]:
            listed.add(name)
            for ours in sources[name]:
                assert group_of[ours].muon == (group["optimizer"] == "Muon"), name
                assert group_of[ours].lr == pytest.approx(options["base_lr"]), name
                decay = options.get("weight_decay", 0.0)
                assert group_of[ours].weight_decay == pytest.approx(decay), name
        if group["optimizer"] == "Muon":
            assert run.optimizer.row_normalize == options.get("row_normalize", False)
            assert run.optimizer.momentum == options["momentum"]
        else:
            assert [run.optimizer.beta1, run.optimizer.beta2] == options["betas"]
            assert run.optimizer.eps == options["eps"]
    # The sources train some parameters not at all; here every one that has entries is trained.
    assert set(sources) - listed <= set(recorded["in_no_group"])
    assert set(group_of) == {name for name, _ in transformer.named_parameters()}
