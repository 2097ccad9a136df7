"""What is saved comes back: outputs, state, widths, sharing, and in a small file."""

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.errors import FormatError, InputError, OutputError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref, Spec, substitute
from rarefy.pruning.prune import prune
from rarefy.pruning.structure.attributes import refresh
from rarefy.storage.contents import inspect
from rarefy.storage.format import load, load_tensor, save
from rarefy.types import Budget


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.deep = nn.Conv2d(width, width, 3, groups=width)
        self.head = nn.Linear(width, 5)
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(torch.relu(self.norm(self.conv(x))))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.sizes = heads, [heads, 2]
        self.mix = nn.Linear(8, 2 * heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x).unflatten(-1, (self.num_heads, 2)).sum(-2)  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 4), nn.Linear(4, 16, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))  # type: ignore[no-any-return]


def seeded(build: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 10, 10, generator=torch.Generator().manual_seed(7))


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert ours[name].stride() == tensor.stride()
        same = ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        assert torch.equal(*same), name


def sliced(net: Net, keep: list[int]) -> Net:
    """What surgery does: the channels ``keep`` of the inner width."""
    small = copy.deepcopy(net)
    rows = {"conv": ["weight"], "deep": ["weight", "bias"]}
    rows["norm"] = ["weight", "bias", "running_mean", "running_var"]
    for name, tensors in rows.items():
        for tensor in tensors:
            held = getattr(getattr(small, name), tensor)
            held.data = held.data[keep].clone()
    small.head.weight.data = small.head.weight.data[:, keep].clone()
    small.deep.groups = len(keep)
    refresh(small)
    return small


# --- modules -----------------------------------------------------------------------------------


def test_a_module_comes_back_bit_by_bit(tmp_path: Path) -> None:
    net = seeded(Net)
    net.conv.weight.requires_grad_(False)
    fresh = seeded(Net, 1).train()
    before = copy.deepcopy(fresh.state_dict())
    found = load(save(net, tmp_path / "net.safetensors"), fresh)
    assert torch.equal(found(images()), net(images()))
    assert_same_state(found, net)
    assert not found.training
    assert not found.conv.weight.requires_grad
    assert found.head.weight.requires_grad
    assert isinstance(found.head.weight, nn.Parameter)
    assert fresh.training
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_a_sliced_network_loads_into_a_fresh_instance(tmp_path: Path) -> None:
    small = sliced(seeded(Net), [0, 2, 3, 5, 7])
    found = load(save(small, tmp_path / "small.safetensors"), Net())
    assert torch.equal(found(images()), small(images()))
    assert_same_state(found, small)
    assert (found.deep.groups, found.norm.num_features, found.head.in_features) == (5, 5, 5)
    assert found.scratch.shape == (3,)


def test_custom_attributes_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(seeded(Attention))
    model[0].mix = nn.Linear(8, 6)
    model[0].num_heads, model[0].sizes = 3, [3, 2]
    model._rarefy_attributes = {"0": {"num_heads": 3, "sizes": (3, 2)}}  # type: ignore[assignment]
    found = load(save(model, tmp_path / "a.safetensors"), nn.Sequential(Attention()))
    x = torch.ones(2, 8)
    assert torch.equal(found(x), model(x))
    assert found[0].sizes == [3, 2]  # type: ignore[index]
    assert found._rarefy_attributes == model._rarefy_attributes
    again = load(save(found, tmp_path / "b.safetensors"), nn.Sequential(Attention()))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(again(x), model(x))


class Rotary(nn.Module):
    """A buffer that no state dict holds, of the size of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("frequencies", torch.rand(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.sin(self.first(x) * self.frequencies))
        return found


def test_a_non_persistent_buffer_that_surgery_changed_comes_back(tmp_path: Path) -> None:
    small = prune(seeded(Rotary), torch.rand(3, 4), Budget(sparsity=0.5), criterion="random")
    x = torch.rand(3, 4)
    found = load(save(small, tmp_path / "a.safetensors"), Rotary())
    assert torch.equal(found(x), small(x))
    assert found.state_dict().keys() == Rotary().state_dict().keys()
    again = load(save(found, tmp_path / "b.safetensors"), Rotary())
    assert torch.equal(again(x), small(x))
    save(Rotary(), tmp_path / "c.safetensors")
    assert "frequencies" not in {t.path for t in inspect(tmp_path / "c.safetensors").tensors}


@pytest.mark.parametrize("value", [{"nothing": 3}, {"training": 1}, {"_x": 1}, {"num_heads": -1}])
def test_custom_attributes_that_could_not_be_restored_are_refused(
    tmp_path: Path, value: dict[str, int]
) -> None:
    model = Attention()
    model._rarefy_attributes = {"": value}  # type: ignore[assignment]
    with pytest.raises(InputError, match="may not set"):
        save(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_sharing_is_as_it_was_saved(tmp_path: Path, saved: bool, fresh: bool) -> None:
    model = seeded(lambda: Tied(saved))
    path = save(model, tmp_path / "tied.safetensors")
    found: Any = load(path, Tied(fresh))
    assert (found.head.weight is found.embed.weight) == saved
    assert_same_state(found, model)
    entry = inspect(path).tensors[-1]
    assert entry.encoding.startswith("same as") == saved
    assert torch.equal(load_tensor(path, "head.weight"), model.head.weight)


def test_recurrent_networks_keep_their_flat_weights(tmp_path: Path) -> None:
    model = seeded(lambda: nn.LSTM(4, 6, 2))
    found = load(save(model, tmp_path / "l.safetensors"), nn.LSTM(4, 6, 2))
    x = torch.randn(3, 2, 4)
    assert torch.equal(found(x)[0], model(x)[0])


def test_a_bias_that_surgery_added_comes_back(tmp_path: Path) -> None:
    net = seeded(Net)
    net.conv.bias = nn.Parameter(torch.randn(8))
    found = load(save(net, tmp_path / "net.safetensors"), Net())
    assert torch.equal(found(images()), net(images()))


def test_channels_last_comes_back(tmp_path: Path) -> None:
    net = seeded(Net).to(memory_format=torch.channels_last)
    found = load(save(net, tmp_path / "net.safetensors"), Net())
    assert_same_state(found, net)
    x = images().to(memory_format=torch.channels_last)
    assert torch.equal(found(x), net(x))


def test_a_skeleton_on_the_meta_device_is_enough(tmp_path: Path) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = load(save(net, tmp_path / "net.safetensors"), skeleton)
    assert_same_state(found, net)


DTYPES = [
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn),
]


class Bag(nn.Module):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and name.startswith("p"):
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_buffer("none", None)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_save_then_load_is_the_identity(tmp_path_factory: Any, data: st.DataObject) -> None:
    tensors, empty = {}, {}
    for place in range(data.draw(st.integers(0, 4))):
        dtype = data.draw(st.sampled_from(DTYPES))
        shape = data.draw(st.lists(st.integers(0, 7), max_size=4))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
        values = torch.randint(0, 2**8, (*shape, dtype.itemsize), generator=generator)
        kept = torch.rand(*shape, 1, generator=generator) < data.draw(st.sampled_from([0.1, 1]))
        values = (values * kept).to(torch.uint8)
        values = values % 2 if dtype == torch.bool else values
        name = f"{data.draw(st.sampled_from('pb'))}{place}"
        tensors[name] = values.reshape(-1).view(dtype).reshape(shape)
        empty[name] = torch.zeros(3).to(dtype)
    model = Bag(tensors)
    path = tmp_path_factory.mktemp("bag") / "bag.safetensors"
    found = load(save(model, path), Bag(empty))
    assert_same_state(found, model)
    for name, tensor in tensors.items():
        read = load_tensor(path, name)
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_larger_dtype_of_the_file_takes_the_place_of_the_models(tmp_path: Path) -> None:
    net = seeded(Net).double()
    assert_same_state(load(save(net, tmp_path / "net.safetensors"), Net()), net)


def test_a_huge_tensor_of_zeros_is_small_and_loads(tmp_path: Path) -> None:
    path = save(Bag({"b": torch.zeros(1 << 22)}), tmp_path / "zeros.safetensors")
    assert path.stat().st_size < 5_000
    assert load_tensor(path, "b").count_nonzero() == 0


# --- errors ------------------------------------------------------------------------------------


def test_a_module_file_needs_a_model(tmp_path: Path) -> None:
    path = save(Net(), tmp_path / "net.safetensors")
    with pytest.raises(InputError, match=r"Net.*Give an instance"):
        load(path)


def test_another_class_is_named_with_the_nearest_path(tmp_path: Path) -> None:
    path = save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "net.safetensors")
    with pytest.raises(FormatError) as caught:
        load(path, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert "nearest is '0." in str(caught.value)
    assert "saved from class torch.nn.modules.container.Sequential" in str(caught.value)


def test_a_parameter_is_not_taken_for_a_buffer(tmp_path: Path) -> None:
    path = save(Bag({"p": torch.ones(3)}), tmp_path / "p.safetensors")
    other = nn.Module()
    other.register_buffer("p", torch.ones(3))
    with pytest.raises(FormatError, match="parameter in one"):
        load(path, other)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2, device="meta"),
        nn.LazyLinear(2),
        Bag({"b": torch.ones(2, 2).to_sparse()}),
        type("Extra", (nn.Linear,), {"get_extra_state": lambda self: 1})(2, 2),
    ],
    ids=["meta", "lazy", "sparse", "extra state"],
)
def test_models_that_cannot_be_stored_are_refused(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(InputError):
        save(model, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="directory"):
        save(nn.Linear(1, 1), tmp_path)
    with pytest.raises(OutputError, match="Create it"):
        save(nn.Linear(1, 1), tmp_path / "none" / "a.safetensors")


@pytest.mark.skipif(os.name == "nt" or not os.path.exists("/proc/self"), reason="needs procfs")  # noqa: PTH110
def test_a_folder_without_write_access_is_named() -> None:
    with pytest.raises(OutputError, match="rights"):
        save(nn.Linear(1, 1), "/proc/a.safetensors")


@pytest.mark.parametrize("step", ["rarefy.storage.container.save_file", "os.fsync"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = save(nn.Linear(2, 2), tmp_path / "a.safetensors")
    old = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OutputError, match="No space"):
        save(nn.Linear(3, 3), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_none_of_ours_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="not a file"):
        inspect(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match="load_file"):
        load(tmp_path / "plain.safetensors", Net())
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(FormatError, match=r"it is an archive, as .* torch\.save write"):
        load(tmp_path / "pickle.safetensors", Net())


def test_a_tensor_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = save(Net(), tmp_path / "net.safetensors")
    with pytest.raises(FormatError, match=r"nearest is 'head\.weight'"):
        load_tensor(path, "head.weights")


# --- bytes -------------------------------------------------------------------------------------


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    first = save(seeded(Net), tmp_path / "a.safetensors")
    second = save(seeded(Net), tmp_path / "b.safetensors")
    assert first.read_bytes() == second.read_bytes()


def test_large_raw_tensors_are_ordinary_entries(tmp_path: Path) -> None:
    noise = torch.randint(-(2**31), 2**31 - 1, (100, 100), dtype=torch.int32)
    path = save(Bag({"b": noise}), tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("b"), noise)
        assert set(file.metadata()) == {"rarefy"}


def test_reserved_names_can_be_paths(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.add_module("rarefy", Bag({"index": torch.randn(9000), "packed": torch.randn(9000)}))
        return model

    model = build()
    assert_same_state(load(save(model, tmp_path / "a.safetensors"), build()), model)


def test_contents_are_a_table(tmp_path: Path) -> None:
    contents = inspect(save(seeded(Net), tmp_path / "a.safetensors"))
    assert (contents.kind, contents.version) == ("module", 1)
    assert contents.class_name.endswith("test_format.Net")
    entry = next(e for e in contents.tensors if e.path == "head.weight")
    assert (entry.shape, entry.dtype) == ((5, 8), "float32")
    assert entry.bits_per_weight == pytest.approx(8 * entry.bytes / 40)
    lines = str(contents).splitlines()
    assert len(lines) == 2 + len(contents.tensors)
    assert "head.weight" in lines[-2]
    assert "5x8" in lines[-2]


# --- graphs ------------------------------------------------------------------------------------


def captured(net: nn.Module) -> GraphModel:
    return graph_model(net, capture(net, images()))


def quantized(net: nn.Module, low: int, high: int, per_channel: bool = True) -> GraphModel:
    """The network with a quantizer on every weight of two dimensions and more."""
    source = captured(net)
    buffers, nodes, renamed = dict(source.named_buffers()), [], {}
    for node in source.graph.nodes:
        nodes.append(replace(node, args=substitute(node.args, lambda r: renamed.get(r.name, r))))
        if node.op != "tensor" or source.tensor(node.path).ndim < 2:
            continue
        weight = source.tensor(node.path).detach()
        scale = weight.flatten(1).abs().amax(1) / max(high, -low)
        if per_channel:
            zero = torch.arange(len(scale), dtype=torch.int32) % 3
            args: list[Any] = []
            for name, tensor in (("scale", scale), ("zero", zero)):
                path, title = f"{node.path}_{name}", f"{node.name}_{name}"
                buffers[path] = tensor
                spec = Spec(tuple(tensor.shape), tensor.dtype)
                nodes.append(Node(title, "tensor", (path,), {}, spec))
                args.append(Ref(title))
            op, args = "aten.fake_quantize_per_channel_affine.default", [*args, 0]
        else:
            op, args = "aten.fake_quantize_per_tensor_affine.default", [float(scale.max()), 1]
        name = f"{node.name}_quantized"
        nodes.append(Node(name, op, (Ref(node.name), *args, low, high), {}, node.value))
        renamed[node.name] = Ref(name)
    graph = Graph(tuple(nodes), source.graph.in_spec, source.graph.out_spec)
    return GraphModel(graph, dict(source.named_parameters()), buffers)


def test_a_captured_graph_needs_no_model(tmp_path: Path) -> None:
    model = captured(seeded(Net))
    found = load(save(model, tmp_path / "g.safetensors"))
    assert isinstance(found, GraphModel)
    assert found.graph == model.graph
    assert_same_state(found, model)
    assert torch.equal(found(images(5)), model(images(5)))
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 255), (-8, 7), (-127, 127)])
def test_quantized_weights_are_codes_with_the_same_outputs(
    tmp_path: Path, low: int, high: int, per_channel: bool
) -> None:
    model = quantized(seeded(Net), low, high, per_channel)
    path = save(model, tmp_path / "q.safetensors")
    found = load(path)
    assert torch.equal(found(images()), model(images()))
    encodings = {e.path: e.encoding.split("+")[0] for e in inspect(path).tensors}
    assert encodings["head.weight"] == ("int4" if high - low < 16 else "int8")
    assert encodings["conv.weight"] == encodings["head.weight"]
    weight = found.get_parameter("head.weight")
    assert weight.requires_grad
    assert (weight - model.get_parameter("head.weight")).abs().max() < 1
    assert torch.equal(load_tensor(path, "head.weight"), weight)
    again = save(found, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_a_weight_that_others_read_too_is_stored_without_loss(tmp_path: Path) -> None:
    model = quantized(seeded(Net), -128, 127)
    nodes = list(model.graph.nodes)
    weight = next(n for n in nodes if n.op == "tensor" and n.path == "head.weight")
    nodes.insert(-1, Node("more", "aten.sum.default", (Ref(weight.name),), {}, None))
    nodes[-1] = Node("output", "output", ([Ref("more")],))
    other = GraphModel(
        model.graph.with_nodes(nodes), dict(model.named_parameters()), dict(model.named_buffers())
    )
    path = save(other, tmp_path / "q.safetensors")
    found = load(path)
    assert torch.equal(found.get_parameter("head.weight"), model.get_parameter("head.weight"))
    encodings = {e.path: e.encoding for e in inspect(path).tensors}
    assert not encodings["head.weight"].startswith("int")
    assert encodings["conv.weight"].startswith("int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_quantized_weight_that_is_not_finite_is_stored_without_loss(
    tmp_path: Path, value: float
) -> None:
    model = quantized(seeded(Net), -128, 127)
    model.get_parameter("head.weight").data[0, 0] = value
    path = save(model, tmp_path / "q.safetensors")
    found = load(path).get_parameter("head.weight")
    assert torch.equal(
        found.view(torch.int32), model.get_parameter("head.weight").view(torch.int32)
    )


def test_overhead_of_a_quantized_file_is_small(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 20, 3, padding=1), nn.ReLU()]
        for _ in range(19):
            layers += [nn.Conv2d(20, 20, 3, padding=1), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Flatten(2)).eval()
    model = quantized(net, -128, 127)
    path = save(model, tmp_path / "q.safetensors")
    needed = sum(p.numel() * (1 if p.ndim > 1 else 4) for p in model.parameters())
    needed += sum(b.numel() * 4 for n, b in model.named_buffers() if n.endswith("scale"))
    assert len(inspect(path).tensors) == 80
    assert path.stat().st_size - needed < 5_000


@pytest.mark.slow
def test_resnet18_and_its_graph(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    net, x = seeded(resnet18), torch.randn(2, 3, 64, 64)
    found = load(save(net, tmp_path / "r.safetensors"), resnet18())
    assert torch.equal(found(x), net(x))
    assert_same_state(found, net)
    graph = graph_model(net, capture(net, x))
    again = load(save(graph, tmp_path / "g.safetensors"))
    assert torch.equal(again(x), graph(x))


def test_an_archive_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(FormatError, match=r"an archive.*torch\.export\.load"):
        load(path)
