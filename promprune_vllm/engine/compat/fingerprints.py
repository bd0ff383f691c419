"""Reads functions of a vLLM from its files, without importing it, and hashes what they do.

A hash covers the statements of a function or class, but not its comments, docstrings, annotations and log calls.
Only the lines of the wanted definition are parsed, since parsing whole files would take seconds.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = _Function | ast.ClassDef
_ENDS = 20  # ends of a definition that are tried; each text at its margin costs one
_LOGGERS = ("logger", "logging")
_NOT_CODE = ("annotation", "returns", "type_comment", "type_params", "kind", "ctx", "simple")
"""Fields of a syntax tree that do not change what it does, or that only newer Pythons have."""


@dataclass(frozen=True, slots=True)
class Found:
    """A name of vLLM as its files define it: several definitions if it is overloaded or conditional."""

    definitions: tuple[_Definition, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the last definition's parameters; of a class, those of its constructor or else its fields."""
        last = self.definitions[-1]
        if not isinstance(last, ast.ClassDef):
            return _parameters(last)
        fields = []
        for node in last.body:
            if isinstance(node, _Function) and node.name == "__init__":
                return _parameters(node)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields.append(node.target.id)
        return tuple(fields)

    def fingerprint(self, words: Collection[str] = ()) -> str:
        """Hash the code, or only the statements that use any of these names."""
        digest = hashlib.sha256()
        for definition in self.definitions:
            nodes = _statements(definition.body, frozenset(words)) if words else [definition]
            for node in nodes:
                digest.update(_normalized(node).encode())
        return digest.hexdigest()[:8]


def find(package: Path, name: str) -> Found | None:
    """Find a definition in a package's files.

    Args:
        package: Directory of the package vllm.
        name: ``"vllm.module:function"``, ``"vllm.module:Class"`` or ``"vllm.module:Class.method"``.
    """
    module, _, path = name.partition(":")
    text = _text(package, module)
    if text is None:
        return None
    *classes, last = path.split(".")
    inside, indent = text, ""
    for name_of_class in classes:
        inside = "".join(_inside_class(inside, indent, name_of_class))
        indent += "    "
    definitions = [_parse(inside, indent, start, end) for start, end in _spans(inside, indent, last)]
    if definitions:
        parsed = tuple(each for each in definitions if each is not None)
        return Found(parsed) if len(parsed) == len(definitions) else None
    home = _imported_from(text, path.partition(".")[0])
    return find(package, f"{home}:{path}") if home else None


def _imported_from(text: str, name: str) -> str | None:
    """Return the module of vLLM that a file imports a name from, if it does."""
    for match in re.finditer(r"^from (vllm[\w.]*) import (\([^)]*\)|.*)", text, re.MULTILINE):
        if re.search(rf"(?<!as )\b{re.escape(name)}\b(?! as )", match[2]):
            return match[1]
    return None


@lru_cache(maxsize=256)
def _text(package: Path, module: str) -> str | None:
    base = package.parent.joinpath(*module.split("."))
    for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def _inside_class(text: str, indent: str, name: str) -> Iterator[str]:
    """Yield the lines of each class with this name: up to the next definition or block that is no deeper."""
    block = re.compile(rf"^{indent}(?:class |def |async def |@|if |else:|try:|for |with )", re.MULTILINE)
    for match in re.finditer(rf"^{indent}class {re.escape(name)}\b", text, re.MULTILINE):
        end = block.search(text, match.end())
        yield text[match.start() : end.start() if end else len(text)]


def _spans(text: str, indent: str, name: str) -> Iterator[tuple[int, int]]:
    """Yield where each definition with this name and indentation starts, and where the next line as shallow is."""
    shallow = _shallow(indent)
    for match in re.finditer(rf"^{indent}(?:async def|def|class) {re.escape(name)}\b", text, re.MULTILINE):
        end = shallow.search(text, match.end())
        yield match.start(), end.start() if end else len(text)


def _shallow(indent: str) -> re.Pattern[str]:
    """Match the start of a line that is no deeper than an indentation: where a definition may end."""
    return re.compile(rf"^(?!{indent}[ )#]|#|\s*$)", re.MULTILINE)


def _parse(text: str, indent: str, start: int, end: int) -> _Definition | None:
    """Parse a definition with its decorators; return ``None`` if this Python cannot."""
    decorators: list[str] = []
    for line in reversed(text[max(0, start - 2000) : start].splitlines()):
        if not line.startswith((f"{indent}@", f"{indent} ", f"{indent})")):
            break
        decorators.insert(0, line)
    while decorators and not decorators[0].startswith(f"{indent}@"):
        decorators.pop(0)
    for _ in range(_ENDS):
        block = "\n".join((*decorators, text[start:end]))
        try:
            (node,) = ast.parse(f"if True:\n{block}" if indent else block).body
        except SyntaxError:  # the line may be inside a text of several lines: try the next one
            following = _shallow(indent).search(text, end + 1)
            if following is None:
                return None
            end = following.start()
            continue
        definition = node.body[0] if isinstance(node, ast.If) else node
        return definition if isinstance(definition, _Definition) else None
    return None


def _parameters(function: _Function) -> tuple[str, ...]:
    given = function.args
    named = (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg)
    return tuple(each.arg for each in named if each is not None)


def _statements(body: Sequence[ast.stmt], words: frozenset[str]) -> Iterator[ast.AST]:
    """Yield the simple statements, and the heads of compound ones, that use one of the names."""
    for statement in body:
        nested: list[ast.stmt] = []
        parts: list[ast.AST] = []
        for _, value in ast.iter_fields(statement):
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, ast.stmt):
                    nested.append(each)
                elif isinstance(each, ast.ExceptHandler | ast.match_case):
                    nested += each.body
                elif isinstance(each, ast.AST):
                    parts.append(each)
        whole = [statement] if not nested else parts
        yield from (part for part in whole if any(_names(node) & words for node in ast.walk(part)))
        yield from _statements(nested, words)


def _names(node: ast.AST) -> set[str]:
    values = (getattr(node, field, None) for field in ("id", "attr", "arg", "name"))
    return {value for value in values if isinstance(value, str)}


def _normalized(node: object) -> str:
    """Write a syntax tree as text, the same in every version of Python."""
    if isinstance(node, list):
        return "".join(_normalized(each) for each in node if not _is_ignored(each))
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign):
        return f"(Assign {_normalized(node.target)} {_normalized(node.value)})"
    if isinstance(node, ast.JoinedStr):
        return f"(JoinedStr {_joined(node)})"
    fields = (
        (name, value)
        for name, value in ast.iter_fields(node)
        if name not in _NOT_CODE and value is not None and value != []
    )
    inside = " ".join(f"{name}={_normalized(value)}" for name, value in fields)
    return f"({type(node).__name__} {inside})"


def _joined(node: ast.JoinedStr) -> str:
    """Write a formatted text; Pythons differ in how they cut its constant parts."""
    parts: list[str] = []
    for value in node.values:
        if not isinstance(value, ast.Constant):
            parts.append(_normalized(value))
        elif parts and parts[-1].startswith("'"):
            parts[-1] += str(value.value)
        else:
            parts.append(f"'{value.value!s}")
    return " ".join(part for part in parts if part != "'")


def _is_ignored(node: object) -> bool:
    """Whether a statement is a docstring, or a call of a logger."""
    if not isinstance(node, ast.Expr):
        return False
    if isinstance(node.value, ast.Constant):
        return True
    function = node.value.func if isinstance(node.value, ast.Call) else None
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id in _LOGGERS
    )
