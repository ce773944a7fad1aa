"""Every public name says what it is, and no module needs itself to be loaded. Read from the source, so nothing is imported."""
import ast
import io
import tokenize
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT, LIB = Path(__file__).parents[1], "fine_tune_llm"
Def = ast.FunctionDef | ast.AsyncFunctionDef

def modules(root: Path) -> dict[str, Path]:
    "The modules of a package, by dotted name."
    files = sorted(f for f in (root/LIB).glob("**/*.py") if f.name != "_modidx.py")
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}

def exported(tree: ast.Module) -> set[str]:
    "What a module lists in __all__, as nbdev writes it."
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and [ast.unparse(t) for t in n.targets] == ["__all__"]]
    return {e.value for v in lists if isinstance(v, ast.List) for e in v.elts if isinstance(e, ast.Constant)}

def public(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    "The exported functions and classes, and the public methods of the classes and what makes them; an overload is no symbol of its own."
    found: list[tuple[str, ast.AST]] = []
    for node in tree.body:
        if not isinstance(node, Def | ast.ClassDef) or node.name not in exported(tree): continue
        found.append((node.name, node))
        if isinstance(node, ast.ClassDef):
            found += [(f"{node.name}.{m.name}", m) for m in node.body if isinstance(m, Def) and (m.name[0] != "_" or m.name == "__init__")
                      and not any(ast.unparse(d).endswith((".setter", "overload")) for d in m.decorator_list)]
    return found

def undocumented(root: Path) -> tuple[int, list[str]]:
    "How many public symbols there are, and those without a sentence that says what they do; the class speaks for its __init__."
    symbols = [(f"{name}.{symbol}", node) for name, path in modules(root).items()
               for symbol, node in public(ast.parse(path.read_text(encoding="utf-8"))) if not symbol.endswith(".__init__")]
    return len(symbols), [name for name, node in symbols if "." not in (ast.get_docstring(node) or "")]

def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    "What a caller passes."
    args = (*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg)
    return [a for a in args if a and a.arg not in ("self", "cls")]

def signature_end(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    "The line of the colon, where a comment is about what comes back."
    if node.name == "__init__" or node.returns and ast.unparse(node.returns) == "None": return 10**9
    last = [node.returns] if node.returns else [a.annotation or a for a in arguments(node)] + [d for d in (*node.args.defaults, *node.args.kw_defaults) if d]
    return max([node.lineno, *(x.end_lineno or 0 for x in last)])

def helped(root: Path) -> set[str]:
    "Names of types that carry the help of a command's option."
    return {ast.unparse(n.targets[0]) for path in modules(root).values() for n in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(n, ast.Assign) and "help=" in ast.unparse(n.value)}

def uncommented(root: Path) -> tuple[int, list[str]]:
    """How many parameters public functions and methods have, and fields public classes, and those without a comment on their lines.

    A comment behind the colon of a signature is about what comes back, and speaks for no parameter unless that is None; a docstring
    that names a parameter in backticks speaks for it, and so does the help of a command's option."""
    count, bad, types = 0, [], helped(root)
    told_by_type = lambda a: bool(a.annotation) and ("help=" in ast.unparse(a.annotation) or ast.unparse(a.annotation) in types)
    for name, path in modules(root).items():
        text = path.read_text(encoding="utf-8")
        noted = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
        for symbol, node in public(ast.parse(text)):
            if isinstance(node, Def):
                told, end = [(f"({a.arg})", a) for a in arguments(node) if f"`{a.arg}`" not in (ast.get_docstring(node) or "") and not told_by_type(a)], signature_end(node)
            else: told, end = [(f".{ast.unparse(f.target)}", f) for f in getattr(node, "body", []) if isinstance(f, ast.AnnAssign)], 10**9
            count += len(told)
            bad += [f"{name}.{symbol}{what}" for what, a in told if not noted & set(range(a.lineno, min(a.end_lineno or a.lineno, end - 1) + 1))]
    return count, bad

def graph(root: Path) -> dict[str, set[str]]:
    "Which modules of the package each module loads when it is loaded; what a function imports comes later and does not count."
    names, found = modules(root), {}
    for name, path in names.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        wanted, todo = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
        while todo:
            node = todo.pop()
            if isinstance(node, ast.Import): wanted |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                up = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join(filter(None, [*up, node.module]))
                wanted |= {sub if (sub := f"{base}.{a.name}") in names else base for a in node.names}
            elif not isinstance(node, Def | ast.Lambda) and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                todo += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.ExceptHandler)]
        found[name] = (wanted & names.keys()) - {name}
    return found

def cycle(root: Path) -> list[str]:
    "A ring of modules that need each other to be loaded, or nothing."
    try: TopologicalSorter(graph(root)).prepare()
    except CycleError as e: return list(e.args[1])
    return []

@pytest.fixture
def house(tmp_path):
    "Write a small package, file by file."
    def build(**files: str) -> Path:
        for name, text in {"__init__": "", **files}.items(): (tmp_path/LIB).mkdir(exist_ok=True); (tmp_path/LIB/f"{name}.py").write_text(text)
        return tmp_path
    return build


def test_every_public_symbol_has_a_docstring():
    count, bad = undocumented(ROOT)
    assert count > 1500 and not bad, f"{len(bad)} of {count} public symbols without a docstring"


def test_every_parameter_and_field_has_a_comment():
    "Its meaning, shape or unit, beside its type."
    count, bad = uncommented(ROOT)
    assert count > 4000 and not bad, f"{len(bad)} of {count} without a comment"


def test_the_counts_see_what_is_missing(house):
    root = house(a='__all__ = ["f", "g", "C"]\ndef f(x,\n      y: int = 0,  # a count\n     ) -> int: return x\ndef g(x) -> int:  # bytes\n    "Give"\n'
                   'class C:\n    "Hold."\n    a: int\n    b: int  # a count\n    def __init__(self, q): pass\n    def m(self, z): return 1\n    def _n(self): return 2\n')
    assert undocumented(root) == (4, [f"{LIB}.a.f", f"{LIB}.a.g", f"{LIB}.a.C.m"])  # a word is no sentence
    assert uncommented(root) == (7, [f"{LIB}.a.f(x)", f"{LIB}.a.g(x)", f"{LIB}.a.C.a", f"{LIB}.a.C.__init__(q)", f"{LIB}.a.C.m(z)"])


def test_no_import_cycle():
    assert len(graph(ROOT)) > 100 and sum(map(len, graph(ROOT).values())) > 300
    assert cycle(ROOT) == []


@pytest.mark.parametrize("back", ["from .a import x", f"from {LIB} import a", f"import {LIB}.a", f"try: from {LIB}.a import x\nexcept ImportError: x = 1"])
def test_a_cycle_is_found(house, back):
    assert set(cycle(house(a="from .b import y", b=back))) == {f"{LIB}.a", f"{LIB}.b"}
    assert cycle(house(a="from .b import y", b="def f():\n    from .a import x\n")) == []


def test_the_citation_says_what_the_package_says():
    citation, settings = yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8")), ConfigParser(delimiters="=")
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    package = settings["DEFAULT"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["cff-version"] == "1.2.0"  # what the format asks for
    assert citation["version"] == package["version"] and citation["repository-code"] == package["git_url"]
    assert citation["title"] == f"{package['title']}: {package['description'][0].lower()}{package['description'][1:]}"
    assert citation["authors"] == [{"name": package["author"]}] and citation["license"] == "Apache-2.0"
