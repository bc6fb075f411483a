"""What a result depends on: the code that a program imports, and all that an object is made of."""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("torch", "builtins", "functools", "collections")  # whose code is not looked at


def imported_files(code: str, package: Path = PACKAGE) -> list[Path]:
    """A package's files that some Python code imports, those that these import, and so on."""
    found, todo = set(), [code]
    try:
        while todo:
            for name in _imported(todo.pop(), package.name):
                base = package.parent.joinpath(*name.split("."))
                for path in {base.with_suffix(".py"), base / "__init__.py"} - found:
                    if path.is_file():
                        found.add(path)
                        todo.append(path.read_text(encoding="utf-8"))
    except SyntaxError:  # such as a %magic, which may import anything
        found = set(package.rglob("*.py"))
    return sorted(found)


def _imported(code: str, package: str) -> Iterator[str]:
    """The modules of a package that are named in imports, and the packages that hold them."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                parts = f"{prefix}{alias.name}".split(".")
                if parts[0] == package:
                    yield from (".".join(parts[:i + 1]) for i in range(len(parts)))


def digest(*values: Any) -> str:
    """A hash of some values, the same in every process.

    It changes with numbers and tensors in them, a module's weights and buffers too, and with the
    source of every class and function in them, what these captured, and what of the package they
    use. What of other files of yours they import it does not see.
    """
    found = hashlib.sha256()
    texts: dict[str, None] = {}
    for part in _parts(values, texts, set()):
        found.update(part)
    for path in imported_files("\n".join(texts)):
        texts[path.read_text(encoding="utf-8")] = None
    for text in sorted(texts):
        found.update(text.encode())
    return found.hexdigest()


def _parts(value: Any, texts: dict[str, None], seen: set[int]) -> Iterator[bytes | np.ndarray]:
    """The bytes that tell a value from another one; `texts` gets the source that it needs."""
    def each(*parts: Any) -> Iterator[bytes]:
        for part in parts:
            yield from _parts(part, texts, seen)

    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    yield type(value).__qualname__.encode()
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().flatten().contiguous().view(torch.uint8)
        yield f"{value.dtype} {tuple(value.shape)} {value.requires_grad}".encode()
        yield raw.numpy()
    elif isinstance(value, dict):
        yield from each(len(value), *(part for item in value.items() for part in item))
    elif isinstance(value, list | tuple):
        yield from each(len(value), *value)
    elif isinstance(value, set | frozenset):
        yield from each(*sorted(value, key=repr))
    elif id(value) in seen or (type(value).__module__ == "builtins" and not callable(value)):
        yield b"" if id(value) in seen else repr(value).encode()
    elif inspect.ismethod(value):
        yield from each(value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from each(value.func, value.args, value.keywords)
    elif isinstance(value, type) or inspect.isroutine(value) or inspect.ismodule(value):
        seen.add(id(value))
        name = getattr(value, "__module__", None) or value.__name__
        yield getattr(value, "__qualname__", name).encode()  # its module may be __main__ elsewhere
        if name.split(".")[0] not in LIBRARIES:
            texts[_source(value)] = None
            yield from each(*getattr(value, "__bases__", ()))
        yield from each(*(cell.cell_contents for cell in getattr(value, "__closure__", None) or ()))
        yield from each(*(getattr(value, k, None) for k in ("__defaults__", "__kwdefaults__")))
    else:
        seen.add(id(value))
        yield from each(type(value), getattr(value, "__dict__", repr(value)))


def _source(value: Any) -> str:
    """The text of the file that a class or function is in; in a notebook its own."""
    try:
        module = inspect.getmodule(value)
        return inspect.getsource(module if getattr(module, "__file__", None) else value)
    except (OSError, TypeError):  # a class in a notebook: its methods
        parts = vars(value).values() if isinstance(value, type) else ()
        return "\n\n".join(textwrap.dedent(_source(part)) for part in parts
                           if inspect.isfunction(part))
