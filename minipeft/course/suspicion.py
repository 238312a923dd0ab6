"""What a teacher may want to look at: lines that reach behind an exercise, and submissions that are nearly the same.

Neither changes a score. Whoever means to can write such a line so that it is not found.
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import accumulate

from minipeft.course.exercises import exercises
from minipeft.course.mend import locked, name_of, released_of, source_of
from minipeft.course.replies import clean

CHECK = "minipeft.course.check"
MODULES = {
    *("gc", "ctypes", "inspect", "importlib", "builtins", "pickle", "marshal", "multiprocessing", "subprocess"),
    *("atexit", "signal", "threading", "traceback", "types", "weakref", "torch.library", "torch.overrides"),
}
OF_SYS = {"modules", "_getframe", "_current_frames", "settrace", "setprofile", "meta_path", "path_hooks"}
ATTRIBUTES = {
    *("f_back", "f_locals", "f_globals", "f_builtins", "tb_frame", "gi_frame", "cr_frame", "ag_frame"),
    *("__globals__", "__code__", "__closure__", "__builtins__", "__subclasses__", "__defaults__", "__dict__"),
}
CALLS = {"eval", "exec", "compile", "__import__", "globals", "vars", "get_ipython", "breakpoint"}
HARMLESS = ("%matplotlib", "%time", "%%time", "%%capture", "%config", "%pip")
MAGIC, HELP = re.compile(r"(?m)^([ \t]*+)(?:\w++ *= *)?[%!].*"), re.compile(r"(?m)^([ \t]*+)(?:\?.*|.*\?)$")
LONGEST = 200_000  # characters of a submission that are looked through; a solution has a tenth of it
SHOWN = 5  # remarks about lines; the rest is counted
GRAM = 8  # tokens of a piece
MOST = 2_000  # pieces that are kept of a submission: the smallest numbers, a fair sample
ENOUGH = 40  # pieces that a comparison needs
ALIKE = 0.9  # the share of the pieces that makes two "nearly the same"


def of_the_student(notebook) -> dict[int, str]:
    """{the cell's number: its code} of all that the student wrote or may have changed."""
    cells = ((i, cell) for i, cell in enumerate(notebook.cells, 1) if cell.cell_type == "code")
    return {i: cell.source for i, cell in cells if not (name_of(cell) and locked(cell))}


def looked_through(notebook) -> dict[int, str]:
    """As much of it as is looked through."""
    sources = of_the_student(notebook)
    sizes = accumulate(map(len, sources.values()))
    return {i: source for (i, source), size in zip(sources.items(), sizes, strict=True) if size <= LONGEST}


def python(source: str) -> str:
    """The cell without IPython's `%`, `!` and `?`, where it says so in their place; the lines keep their numbers."""
    before, first, rest = re.fullmatch(r"(\s*)([^\n]*)(.*)", source, re.DOTALL).groups()
    if first.startswith("%%") and not first.startswith(HARMLESS):
        return f"{before}get_ipython()"  # what follows is another language's
    return before + re.sub(MAGIC, r"\1get_ipython()", re.sub(HELP, r"\1pass", first + rest))


def parsed(source: str) -> ast.Module | None:
    """The code's tree; None for what does not even run."""
    for text in (source, python(source)):
        try:
            return ast.parse(text)
        except Exception:  # a SyntaxError, or what deep nesting and odd characters give
            continue
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------------
def lines_to_look_at(notebook, assignment: str) -> list[str]:
    """A remark for each line of the student's that touches what no exercise needs; the course's own lines are known."""
    ours, theirs, read = known_lines(assignment), of_the_student(notebook), looked_through(notebook)
    locked_ones = [c.source for i, c in enumerate(notebook.cells, 1) if c.cell_type == "code" and i not in theirs]
    trees = {i: tree for i, source in read.items() if (tree := parsed(source))}
    around = [tree for source in locked_ones if (tree := parsed(source))]
    modules = {name: module for tree in (*around, *trees.values()) for name, module in imported(tree)}
    found = []
    for i, tree in trees.items():
        lines = read[i].split("\n")
        for number in sorted({node.lineno for node in ast.walk(tree) if reaches(node, modules)}):
            line = lines[number - 1].strip() if number <= len(lines) else ""
            if line not in ours and not line.startswith(HARMLESS):
                found.append(f"To look at: cell {i}, line {number}: `{clean(line, 100)}`.")
    more = [f"To look at: {len(found) - SHOWN} more lines of this kind."] if len(found) > SHOWN else []
    left = next((i for i in theirs if i not in read), None)
    unread = [f"To look at: from cell {left} on, the code is too long to be looked through."] if left else []
    return found[:SHOWN] + more + unread


@cache
def known_lines(assignment: str) -> set[str]:
    """The course's own lines of an assignment."""
    cells = [*source_of(assignment).cells, *released_of(assignment).cells]
    return {line.strip() for cell in cells for line in cell.source.splitlines()}


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(the name in the notebook, the dotted name that it stands for) of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted(node: ast.AST, modules: dict[str, str]) -> str:
    """`torch.nn.Linear` for a chain of attributes that starts at an import; "" for any other."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    root = modules.get(node.id, "") if isinstance(node, ast.Name) else ""
    return ".".join([root, *reversed(parts)]) if root else ""


def reaches(node: ast.AST, modules: dict[str, str]) -> bool:
    """Whether this piece of code reaches behind an exercise."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        module = getattr(node, "module", None)
        names = [f"{module}.{a.name}" if module else a.name for a in node.names]
        return any(behind(name) for name in names)
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("getattr", "setattr", "delattr") and len(node.args) > 1:
            attribute = str(getattr(node.args[1], "value", "?"))
            of = dotted(ast.Attribute(node.args[0], attribute, ast.Load()), modules)
            return bool(of and name != "getattr" or behind(of) or attribute in ATTRIBUTES)
        return name in CALLS
    if isinstance(node, ast.Attribute):
        whole = dotted(node, modules)
        written = isinstance(node.ctx, ast.Store | ast.Del) and whole
        return bool(node.attr in ATTRIBUTES or written or behind(whole))
    return False


def behind(name: str) -> bool:
    """Whether a dotted name belongs to what no exercise needs: the interpreter's inside, or the package's."""
    top, _, rest = name.partition(".")
    if name.startswith(CHECK):
        asked = name.removeprefix(CHECK).removeprefix(".")
        return asked not in ("", "hint", "progress") and not any(asked in several for several in exercises().values())
    within = name in MODULES or any(name.startswith(f"{module}.") for module in MODULES)
    return within or top == "minipeft" or (top == "sys" and rest.split(".")[0] in OF_SYS)


# ---------------------------------------------------------------------------------------------------------------------
# Likeness
# ---------------------------------------------------------------------------------------------------------------------
def pieces(notebook, assignment: str) -> list[int]:
    """Numbers of all pieces of GRAM tokens in the student's code, whatever its names, spaces and comments; what was
    handed out does not count."""
    found = {piece for source in looked_through(notebook).values() for piece in cut_up(source)} - given(assignment)
    return sorted(found)[:MOST]


@cache
def given(assignment: str) -> set[int]:
    """The pieces of what was handed out."""
    return {p for cell in released_of(assignment).cells if cell.cell_type == "code" for p in cut_up(cell.source)}


def cut_up(source: str) -> set[int]:
    tokens = list(words(source))
    return {zlib.crc32(" ".join(tokens[i : i + GRAM]).encode()) for i in range(len(tokens) - GRAM + 1)}


def words(source: str) -> Iterator[str]:
    """The tokens but docstrings; names that the code makes itself all read the same, as renaming is the first
    disguise."""
    found, tree = [], parsed(source)
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING):
                found.append(token)
    except (tokenize.TokenError, SyntaxError):  # the beginning will do
        pass
    own, said = set(made_in(tree)), set(docstrings(tree))
    for token in found:
        name = token.type == tokenize.NAME and not keyword.iskeyword(token.string)
        if token.type != tokenize.STRING or token.start[0] not in said:
            yield "·" if name and token.string in own else token.string


def docstrings(tree: ast.Module | None) -> Iterator[int]:
    """The lines where a text begins that stands alone."""
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno


def made_in(tree: ast.Module | None) -> Iterator[str]:
    """The names that code gives: to arguments, variables, attributes, functions and classes."""
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def nearly_the_same(several: dict[str, list[int]]) -> dict[str, list[str]]:
    """{student: the others whose code is nearly the same}, from each one's `pieces`."""
    sets = {student: frozenset(found) for student, found in several.items() if len(found) >= ENOUGH}
    alike: dict[str, list[str]] = {}
    names = sorted(sets)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            a, b = sets[one], sets[other]
            if min(len(a), len(b)) >= ALIKE * max(len(a), len(b)) and len(a & b) >= ALIKE * len(a | b):
                alike.setdefault(one, []).append(other)
                alike.setdefault(other, []).append(one)
    return alike
