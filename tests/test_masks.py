"""Zeros that stay zeros: through optimizers, averages, copies and files; and lottery tickets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rarefy as rf
from rarefy.errors import InputError
from rarefy.pruning.sparsity.masks import Masks, hold, rewind, sparsity
from rarefy.pruning.sparsity.sparsify import sparsify
from rarefy.types import Budget

torch.set_num_threads(1)
with torch.random.fork_rng():
    torch.manual_seed(0)
    DENSE = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    DENSE[2].weight.requires_grad_(False)
    DENSE.append(nn.Linear(2, 2, bias=False))
    DENSE.append(DENSE[-1])  # shared
    X, Y = torch.randn(32, 6), torch.randint(2, (32,))

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
}


def zero_places(model: nn.Module) -> dict[str, torch.Tensor]:
    return {path: p.detach() == 0 for path, p in model.named_parameters() if p.ndim > 1}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def loss(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(X), Y)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", ["called", "attached"])
def test_zeros_are_exact_after_every_step(name, way) -> None:
    model = sparsify(DENSE, Budget(sparsity=0.7)).train()
    before, start = zero_places(model), copy.deepcopy(model.state_dict())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = OPTIMIZERS[name](p for p in model.parameters() if p.requires_grad)
    again = hold(model)
    if way == "attached":
        again.attach(optimizer)
    for _ in range(50):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        if way == "called":
            again()
        assert same(zero_places(model), before)
        average.update_parameters(model)
    assert same(zero_places(average.module), before)
    assert not torch.equal(model[0].weight, start["0.weight"])
    assert model[0].weight.grad[before["0.weight"]].any()  # gradients flow, for regrowth
    assert model.state_dict().keys() == DENSE.state_dict().keys()


def test_detached_optimizers_are_as_they_were() -> None:
    model = sparsify(DENSE, Budget(sparsity=0.7)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with hold(model).attach(optimizer):
        assert optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_post_hooks
    loss(model).backward()
    optimizer.step()
    assert sparsity(model) < 0.6


def test_zeros_survive_rarefys_loop_and_files(tmp_path) -> None:
    sparse = sparsify(DENSE, Budget(sparsity=0.7))
    tuned = rf.train(sparse, [(X, Y)], epochs=3, progress=False, after_step=hold(sparse))
    assert same(zero_places(tuned), zero_places(sparse))
    assert not torch.equal(tuned[0].weight, sparse[0].weight)
    assert same(zero_places(copy.deepcopy(tuned)), zero_places(sparse))
    loaded = rf.load(rf.save(tuned, tmp_path / "m.safetensors"), copy.deepcopy(DENSE))
    assert same(zero_places(loaded), zero_places(sparse))
    fresh = copy.deepcopy(DENSE)
    fresh.load_state_dict(tuned.state_dict())
    assert same(zero_places(fresh), zero_places(sparse))


def test_only_what_was_pruned_is_held() -> None:
    model = copy.deepcopy(DENSE)
    nn.init.zeros_(model[4].weight)  # an adapter that starts at zero
    sparse = sparsify(model, Budget(sparsity=0.5), exclude=["4"])
    assert set(Masks.of(sparse)) == {"0.weight", "2.weight", "5.weight"}
    assert "4.weight" in Masks.of(copy.deepcopy(model))


def test_masks_of_another_network_are_refused() -> None:
    masks = Masks.of(sparsify(DENSE, Budget(sparsity=0.5)))
    with pytest.raises(InputError, match=r"no parameter of Wrapper.*did you mean net\.0\.weight"):
        masks.apply(Wrapper(copy.deepcopy(DENSE)))
    with pytest.raises(InputError, match="shape"):
        masks.apply(nn.Sequential(nn.Linear(3, 3)))


def test_masks_may_be_a_mapping_of_numbers() -> None:
    model = sparsify(DENSE, Budget(sparsity=0.5))
    kept = {path: (mask * 1.0) for path, mask in Masks.of(model).items()}
    dense = copy.deepcopy(DENSE)
    hold(dense, kept)()
    assert same(zero_places(dense), zero_places(model))
    assert same(zero_places(rewind(DENSE, DENSE.state_dict(), kept)), zero_places(model))
    with pytest.raises(InputError, match="a list was given"):
        hold(dense, [kept])
    with pytest.raises(InputError, match="a float was given"):
        hold(dense, {"0.weight": 0.5})


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "average": AveragedModel,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_networks_are_held_within_wrappers(name) -> None:
    sparse = sparsify(DENSE, Budget(sparsity=0.5))
    wrapped, before = WRAPPERS[name](sparse), zero_places(sparse)
    assert set(Masks.of(wrapped)) == set(Masks.of(sparse))
    for again in (hold(wrapped), hold(sparse)):
        for parameter in wrapped.parameters():
            parameter.data.add_(1)
        again(wrapped)
        zeros = zero_places(wrapped)
        assert all(zeros[next(p for p in zeros if p.endswith(k))].equal(before[k]) for k in before)


@pytest.mark.parametrize("name", WRAPPERS)
def test_networks_made_sparse_within_wrappers_are_held(name) -> None:
    model = copy.deepcopy(DENSE)
    nn.init.zeros_(model[4].weight)
    wrapped = WRAPPERS[name](model)
    within = [path for path, _ in wrapped.named_parameters() if path.endswith("4.weight")]
    sparse = sparsify(wrapped, Budget(sparsity=0.5), exclude=within)
    assert set(Masks.of(sparse)) == {"0.weight", "2.weight", "5.weight"}


def test_what_is_held_goes_on_with_the_masks_of_a_checkpoint() -> None:
    sparse = sparsify(DENSE, Budget(sparsity=0.5))
    before, other = zero_places(sparse), sparsify(DENSE, Budget(sparsity=0.3))
    by_state, by_zeros, given = hold(other), hold(other), hold(other, Masks.of(other))
    by_state.load_state_dict(copy.deepcopy(hold(sparse).state_dict()))
    other.load_state_dict(sparse.state_dict())
    by_zeros.resume(other, 100)
    given.resume(other, 100)
    assert set(given.masks) == set(by_state.masks) == set(by_zeros.masks)
    for again in (by_state, by_zeros):
        for parameter in other.parameters():
            parameter.data.add_(1)
        again()
        assert same(zero_places(other), before)
    assert not same({path: ~mask for path, mask in given.masks.items()}, before)


def test_optimizers_that_take_no_hooks_are_refused() -> None:
    class Prepared(torch.optim.Optimizer):
        def __init__(self) -> None:
            pass

    with pytest.raises(InputError, match=r"attach\(Prepared\): it takes no hooks.*call what hold"):
        hold(sparsify(DENSE, Budget(sparsity=0.5))).attach(Prepared())


class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def test_a_ticket_has_the_first_weights_and_the_last_zeros() -> None:
    start = copy.deepcopy(DENSE.state_dict())
    trained = rf.train(DENSE, [(X, Y)], epochs=5, progress=False)
    sparse = sparsify(trained, Budget(sparsity=0.6))
    ticket = rewind(sparse, start)
    assert same(zero_places(ticket), zero_places(sparse))
    for path, parameter in ticket.named_parameters():
        gone = zero_places(sparse).get(path, torch.zeros(parameter.shape, dtype=torch.bool))
        assert torch.equal(parameter[~gone], start[path][~gone])
    assert not torch.equal(sparse[0].weight, ticket[0].weight)
    with pytest.raises(InputError, match="not a state of this network"):
        rewind(sparse, {})
    with pytest.raises(InputError, match="not a state of this network"):
        rewind(sparse, trained)


def test_a_wrapped_network_is_rewound_to_a_state_of_the_network_within() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    start = copy.deepcopy(net.state_dict())
    sparse = rf.prune(net, torch.zeros(1, 4), Budget(sparsity=0.5), structure="weight")
    for state in (start, nn.DataParallel(net).state_dict()):
        found = rewind(nn.DataParallel(sparse), state)
        for path, mask in Masks.of(sparse).items():
            assert torch.equal(found.module.state_dict()[path], start[path] * mask)
