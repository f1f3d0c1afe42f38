"""Writes docstrings of Python's own standard library as rows of a JSONL file.

    python3.12 examples/extract_docstrings.py --limit 0 > all-3.12.jsonl
    python3.13 examples/extract_docstrings.py --limit 0 > all-3.13.jsonl
    python3.11 examples/extract_docstrings.py --same-in all-3.12.jsonl all-3.13.jsonl > rows.jsonl

Real text of real people, on every machine that has Python: that is where `data/docstrings.jsonl`
comes from. With `--same-in` every version of Python gives the same rows, without it nearly the
same. Sources are parsed, nothing is imported.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MODULES = """
abc ast bdb bisect bz2 calendar cmd code codecs codeop collections colorsys compileall
concurrent/futures/_base configparser contextlib contextvars copy copyreg csv ctypes/util
dataclasses datetime decimal difflib dis doctest email/message email/utils enum filecmp fileinput
fnmatch fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib
heapq hmac html/parser http/client http/cookiejar imaplib inspect io ipaddress json keyword
linecache locale logging logging/handlers lzma mailbox mimetypes modulefinder
multiprocessing/pool netrc ntpath numbers operator os pathlib pdb pickle pickletools pkgutil
platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr queue quopri random
reprlib runpy sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver
sre_parse ssl stat statistics string stringprep struct subprocess symtable sysconfig tabnanny
tarfile tempfile textwrap threading timeit token tokenize trace traceback types typing
unittest/case unittest/mock urllib/parse urllib/request uuid venv warnings wave weakref
webbrowser xml/dom/minidom xml/etree/ElementTree zipapp zipfile
"""

SHORTEST, LONGEST = 150, 1200


def docstrings(module: str) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted name, kind, docstring) of everything public in a module of the library."""
    path = Path(sysconfig.get_path("stdlib")) / module
    source = next(
        (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None
    )
    if source is not None:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        yield from _walk(tree, module.replace("/", "."))


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str, str]]:
    kinds = {ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}
    for child in ast.iter_child_nodes(node):
        kind = kinds.get(type(child))
        if kind is None or child.name.startswith("_"):
            continue
        dotted = f"{name}.{child.name}"
        text = ast.get_docstring(child, clean=False)
        if text and SHORTEST <= len(clean := inspect.cleandoc(text)) <= LONGEST:
            yield dotted, kind, clean
        if kind == "class":
            yield from _walk(child, dotted)


def rows() -> dict[str, str]:
    """The JSON line of every docstring, by dotted name."""
    found: dict[str, str] = {}
    for module in MODULES.split():
        for name, kind, text in docstrings(module):
            row = {"item_id": name, "kind": kind, "text": text}
            found.setdefault(name, json.dumps(row, ensure_ascii=False))
    return found


def choose(lines: dict[str, str], limit: int) -> list[str]:
    """`limit` lines of all modules by lot, which falls on the same names wherever it is drawn."""

    def lot(name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()

    return [lines[name] for name in sorted(sorted(lines, key=lot)[: limit or None])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=int, default=400, help="how many rows (400); 0: all")
    parser.add_argument("--same-in", nargs="*", default=[], type=Path, metavar="FILE")
    arguments = parser.parse_args()
    lines = rows()
    for file in arguments.same_in:
        others = set(file.read_text(encoding="utf-8").splitlines())
        lines = {name: line for name, line in lines.items() if line in others}
    for line in choose(lines, arguments.limit):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
