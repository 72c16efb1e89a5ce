"""Every message that a person may see when something goes wrong, read off the source: no module is imported.

A message is text that an error is made of: an argument of an error class's call, or what leads to it inside the
packages (a list of mistakes, the result of a function, a constant). The values in it are shown as {name}.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data", "trainer", "sampling", "tune", "cluster")
OF_PYTHON = ("ValueError", "TypeError", "RuntimeError")  # wrapped by a line that names the file or key
NOT_PEOPLE = ("unreachable", "is for reading")  # what only a bug can show
LISTS = ("mistakes", "problem", "problems", "_describe")  # functions of these names return messages
TEXT_AT = {"Finding": 2, "Refused": 1}  # of which argument is the text; of all others the first
OF_INTEREST = (ast.Raise, ast.Call, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.Return,
               ast.Yield, ast.YieldFrom, ast.ImportFrom, ast.ClassDef)  # fmt: skip
SAME = ("str", "len", "list", "sorted", "max", "min", "sum", "repr", "abs", "tuple", "printable", "shortened", "listed",
        "type")  # fmt: skip
"""Functions whose value is called as what they are given."""
DEEPEST = 6  # calls that text is followed through


@dataclass(frozen=True, order=True)
class Message:
    """`words`: the text, each value as {name}.  `module`: where it arises."""

    module: str
    words: str
    line: int = field(compare=False)


def value_name(node: ast.AST) -> str:
    """What a value in a message is called: its variable's, attribute's or function's name."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            if name == "__name__":
                return "type"
            return name.strip("_")
        case ast.Call(func=ast.Attribute(value=value, attr="join" | "strip" | "split" | "replace"), args=args):
            constant = isinstance(value, ast.Constant)
            return value_name(args[0]) if constant and args else value_name(value)
        case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in SAME:
            return value_name(first)
        case ast.Call(func=function):
            return value_name(function)
        case (
            ast.GeneratorExp(generators=[one, *_])
            | ast.ListComp(generators=[one, *_])
            | ast.SetComp(generators=[one, *_])
        ):
            return value_name(one.iter)
        case ast.Subscript(value=value) | ast.BinOp(left=value) | ast.Starred(value=value):
            return value_name(value)
    return "..."


def template(node: ast.AST) -> str | None:
    """Text that stands in the source, each value in it as {name}; None of what is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(
                str(one.value) if isinstance(one, ast.Constant) else f"{{{value_name(getattr(one, 'value', one))}}}"
                for one in values
            )
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            parts = [template(part) for part in (left, right)]
            if parts == [None, None]:
                return None
            return "".join(
                f"{{{value_name(n)}}}" if t is None else t for n, t in zip((left, right), parts, strict=True)
            )
    return None


def is_text(words: str, least: int = 2) -> bool:
    """Whether a template has words of its own, not values alone."""
    plain = re.sub(r"\{[^{}]*\}", "", words).split()
    return sum(bool(re.search("[A-Za-z]{2}", word)) for word in plain) >= least


class Module:
    """One file: its functions, constants and imports by name."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(ROOT).as_posix()
        self.tree = ast.parse(path.read_text())
        self.functions: dict[str, ast.FunctionDef] = {}
        self.constants: dict[str, ast.expr] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        self.bases: dict[str, list[str]] = {}
        self.scopes = self._scopes()
        for scope, nodes in self.scopes.items():
            if isinstance(scope, ast.FunctionDef):
                self.functions.setdefault(scope.name, scope)
            for node in nodes:
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scoreray."):
                    home = node.module.removeprefix("scoreray.").replace(".", "/")  # type: ignore[union-attr]
                    self.imports |= {alias.asname or alias.name: (home, alias.name) for alias in node.names}
                elif isinstance(node, ast.ClassDef):
                    self.bases[node.name] = [value_name(base) for base in node.bases]
        for node in self.tree.body:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    names = target.elts if isinstance(target, ast.Tuple) else [target]
                    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(names)
                    self.constants |= {value_name(n): v for n, v in zip(names, values, strict=False)}

    def _scopes(self) -> dict[ast.AST, list[ast.AST]]:
        """The module and each function, with those nodes of its own that text may come from."""
        found: dict[ast.AST, list[ast.AST]] = {self.tree: []}
        waiting: list[tuple[ast.AST, ast.AST]] = [(self.tree, self.tree)]
        while waiting:
            scope, parent = waiting.pop()
            for child in ast.iter_child_nodes(parent):
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    found[child] = []
                    waiting.append((child, child))
                    continue
                if isinstance(child, OF_INTEREST):
                    found[scope].append(child)
                if not isinstance(child, ast.Name | ast.Constant | ast.expr_context | ast.operator):
                    waiting.append((scope, child))
        return found


class Source:
    """All modules of the packages, and the flow of text between them."""

    def __init__(self) -> None:
        paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
        self.modules = {path.relative_to(ROOT).with_suffix("").as_posix(): Module(path) for path in paths}
        self.errors = self._errors()
        self.found: dict[tuple[str, str], Message] = {}

    @cached_property
    def calls(self) -> dict[tuple[str, str], list[tuple[Module, ast.AST, ast.Call]]]:
        """Calls of each function of the packages, by its module and name."""
        found: dict[tuple[str, str], list[tuple[Module, ast.AST, ast.Call]]] = {}
        for module in self.modules.values():
            for scope, nodes in module.scopes.items():
                for node in nodes:
                    if isinstance(node, ast.Call):
                        found.setdefault(self._callee(module, node.func), []).append((module, scope, node))
        return found

    def _callee(self, module: Module, function: ast.AST) -> tuple[str, str]:
        """Module (without .py) and name of the function that an expression calls, where they can be seen."""
        match function:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in module.imports:
                return "/".join(module.imports[owner]), name
            case ast.Attribute(value=ast.Name(id="self"), attr=name) | ast.Name(id=name):
                home, original = module.imports.get(name, (module.name.removesuffix(".py"), name))
                return home, original
        return "", ""

    def _errors(self) -> set[str]:
        """Names of classes whose text a person sees: all subclasses of ScorerayError, and those in TEXT_AT."""
        bases = {name: of for module in self.modules.values() for name, of in module.bases.items()}
        errors = {"ScorerayError", "_Wrong", *TEXT_AT}
        while more := {name for name, of in bases.items() if errors & set(of)} - errors:
            errors |= more
        return errors

    def messages(self) -> list[Message]:
        for module in self.modules.values():
            for scope, nodes in module.scopes.items():
                if getattr(scope, "name", "").endswith(LISTS):
                    self._function(module, scope.name, 0, frozenset())  # type: ignore[attr-defined]
                for node in nodes:
                    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                        self._call(module, scope, node.exc, raised=True)
                    elif isinstance(node, ast.Call):
                        self._call(module, scope, node, raised=False)
        return sorted(self.found.values())

    def _call(self, module: Module, scope: ast.AST, call: ast.Call, *, raised: bool) -> None:
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        variable = name.islower() and name not in module.functions and name not in module.imports
        variable = variable and (raised or self._is_class_of_error(module, scope, name))
        if name not in self.errors and not (raised and name in OF_PYTHON) and not variable:
            return
        if name == "Finding" and isinstance(call.args[1], ast.Constant) and call.args[1].value == "good":
            return
        at = TEXT_AT.get(name, 0)
        if len(call.args) > at:
            self._text(module, scope, call.args[at], 0, frozenset())

    def _is_class_of_error(self, module: Module, scope: ast.AST, name: str) -> bool:
        """Whether a variable is one of several error classes: kind = StorageError if ... else MachineError."""
        values = [
            one.value
            for one in module.scopes[scope]
            if isinstance(one, ast.Assign) and name == value_name(one.targets[0])
        ]
        return any(isinstance(one, ast.IfExp) and getattr(one.body, "id", "") in self.errors for one in values)

    def _text(self, module: Module, scope: ast.AST, node: ast.AST, depth: int, seen: frozenset[str]) -> None:
        """Notes the text that an expression may be."""
        text = template(node)
        if text is not None:
            self._note(module, text, getattr(node, "lineno", 0), 1 if depth == 0 and "{" in text else 2)
            if is_text(text):
                return
        if depth > DEEPEST:
            return
        match node:
            case ast.JoinedStr(values=values):
                parts: list[ast.AST] = [one.value for one in values if isinstance(one, ast.FormattedValue)]
            case ast.IfExp(body=body, orelse=other):
                parts = [body, other]
            case ast.BoolOp(values=values) | ast.List(elts=values) | ast.Tuple(elts=values):
                parts = list(values)
            case ast.BinOp(left=left, right=right):
                parts = [left, right]
            case ast.Starred(value=value) | ast.Subscript(value=value) | ast.NamedExpr(value=value):
                parts = [value]
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
                parts = [element]
            case ast.Dict(values=values):
                parts = list(values)
            case ast.Name(id=name):
                self._name(module, scope, name, depth, seen)
                return
            case ast.Call(func=ast.Attribute(value=value, attr="join" | "format" | "get" | "strip"), args=arguments):
                parts = [*arguments[:1], value] if isinstance(value, ast.Constant) else [value]
                if isinstance(value, ast.Constant) and "{" not in str(value.value):
                    parts = list(arguments[:1])
            case ast.Call(func=ast.Name(id="str" | "list" | "sorted" | "printable" | "shortened"), args=[first, *_]):
                parts = [first]
            case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
                self._function(module, name, depth, seen)
                return
            case _:
                return
        for part in parts:
            self._text(module, scope, part, depth + 1, seen)

    def _name(self, module: Module, scope: ast.AST, name: str, depth: int, seen: frozenset[str]) -> None:
        key = f"{module.name}:{getattr(scope, 'lineno', 0)}:{name}"
        if key in seen:
            return
        local = False
        for node in module.scopes[scope]:
            match node:
                case ast.Assign(targets=[ast.Name(id=found)], value=value) | ast.AugAssign(
                    target=ast.Name(id=found), value=value
                ) | ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value) | ast.NamedExpr(
                    target=ast.Name(id=found), value=value
                ) | ast.For(target=ast.Name(id=found), iter=value) if found == name:  # fmt: skip
                    pass
                case ast.Call(func=ast.Attribute(value=ast.Name(id=found), attr="append" | "extend"), args=[value]) if (
                    found == name
                ):
                    pass
                case _:
                    continue
            local = True
            self._text(module, scope, value, depth + 1, seen | {key})
        if not local and isinstance(scope, ast.FunctionDef):
            names = [one.arg for one in (*scope.args.posonlyargs, *scope.args.args)]
            if f"{module.name}:{scope.name}()" in seen:  # its call was followed: the others are of other messages
                return
            if name in names:
                self._argument(module, scope.name, names.index(name) - (names[0] == "self"), name, depth, seen | {key})
                return
        if not local and name in module.constants:
            self._text(module, module.tree, module.constants[name], depth + 1, seen | {key})

    def _argument(self, home: Module, function: str, at: int, name: str, depth: int, seen: frozenset[str]) -> None:
        """What the callers of a function give as one of its parameters."""
        for module, scope, call in self.calls.get((home.name.removesuffix(".py"), function), ()):
            given = [word.value for word in call.keywords if word.arg == name] or call.args[at : at + 1]
            for value in given:
                self._text(module, scope, value, depth + 1, seen)

    def _function(self, module: Module, name: str, depth: int, seen: frozenset[str]) -> None:
        """What a function of the packages returns or yields."""
        home, name = self._callee(module, ast.Name(name))
        if home not in self.modules:
            return
        module = self.modules[home]
        key = f"{module.name}:{name}()"
        if key in seen or name not in module.functions or name in self.errors:
            return
        function = module.functions[name]
        for node in module.scopes[function]:
            if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) and node.value is not None:
                self._text(module, function, node.value, depth + 1, seen | {key})

    def _note(self, module: Module, text: str, line: int, least: int) -> None:
        words = " ".join(text.split())
        if is_text(words, least) and not words.startswith(NOT_PEOPLE):
            self.found.setdefault((module.name, words), Message(module.name, words, line))


def messages() -> list[Message]:
    """Sorted by module and words; raises nothing on sources that Python compiles."""
    return Source().messages()


if __name__ == "__main__":
    for one in messages():
        print(f"{one.module}:{one.line}: {one.words}")
