"""Changes of an exported program: its graph, its signature and its tensors together."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.utils import _pytree as pytree


class Editor:
    """A program that is changed in place.

    Args:
        program: what ``torch.export`` made.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program, self.graph = program, program.graph
        self.signature = program.graph_signature
        self.nodes = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}

    def tensors(self) -> list[tuple[Node, str]]:
        """Inputs of the graph that are the network's parameters and buffers, with their paths."""
        named = {**self.signature.inputs_to_parameters, **self.signature.inputs_to_buffers}
        kept = set(self.signature.buffers_to_mutate.values())
        return [
            (self.nodes[name], path)
            for name, path in named.items()
            if path not in kept and path in self.program.state_dict
        ]

    def value(self, node: Node) -> Tensor | None:
        """The tensor that an input of the graph is; None for what is computed or given."""
        found = next((path for other, path in self.tensors() if other is node), None)
        return None if found is None else self.program.state_dict[found]

    def add_input(self, before: Node, path: str, tensor: Tensor) -> Node:
        """A new buffer, in front of an input of the graph."""
        while path in self.program.state_dict:
            path += "_"
        with self.graph.inserting_before(before):
            node: Node = self.graph.placeholder(f"b_{path.replace('.', '_')}")
        node.meta["val"] = before.meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(node.name), path, persistent=True)
        place = next(i for i, s in enumerate(self.signature.input_specs) if _name(s) == before.name)
        self.signature.input_specs.insert(place, spec)
        self.program.state_dict[path], self.nodes[node.name] = tensor, node
        return node

    def call(self, op: Any, *args: Any) -> Node:
        """A new call, with what PyTorch wants to know of its result."""
        node: Node = self.graph.call_function(op, args)
        known = pytree.tree_map_only(Node, lambda n: n.meta["val"], args)
        first = next(v for v in pytree.tree_leaves(known) if isinstance(v, Tensor))
        fake: Any = first
        with fake.fake_mode:
            node.meta["val"] = op(*known)
        return node

    def erase(self, node: Node) -> None:
        """Take out a call that nothing reads, and the tensors that only it read."""
        sources = node.all_input_nodes
        self.graph.erase_node(node)
        known = {held for held, _ in self.tensors()}
        for source in sources:
            if source in known and not source.users:
                self.forget(source)

    def forget(self, node: Node) -> None:
        """Take an input that nothing reads out of the program."""
        specs = self.signature.input_specs
        spec = next(s for s in specs if _name(s) == node.name)
        specs.remove(spec)
        if all(other.target != spec.target for other in specs):
            self.program.state_dict.pop(str(spec.target))
        self.graph.erase_node(node)

    def finish(self) -> None:
        """Check the graph, and make code of it."""
        self.graph.lint()
        self.program.graph_module.recompile()


def _name(spec: InputSpec) -> str:
    return str(getattr(spec.arg, "name", ""))
