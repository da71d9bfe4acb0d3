"""Rules for the words of the code: names, first lines of docstrings, and US spelling."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("dype/**/*.py"), *ROOT.glob("tests/**/*.py"), ROOT / "run_dype.py"])


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


PRONOUNS = word_set(
    "one own some other others more less most found made given known wanted asked drawn shown "
    "named held taken there here where it this that these those which what whose something "
    "thing things same such of at"
)
NOT_PARTICIPLES = word_set(  # verbs, nouns and numbers in "ed"
    "bed bleed breed embed exceed feed heed hundred need proceed red seed shed shred speed succeed"
)
# "cut", "put", "read" and "split" are missing because they are verbs too
IRREGULAR_PARTICIPLES = word_set(
    "begun bought broken brought built caught chosen done drawn driven eaten fallen felt forgotten "
    "fought found frozen given gone gotten grown heard held hidden kept known laid lent "
    "lost made meant met paid ridden risen said seen sent shown sold sought spent spoken stolen "
    "stuck swept taken taught thought thrown told understood won worn woven written"
)
# participles that may stand before a noun, because `paired_shares` names the shares
ADJECTIVES = word_set(
    "batched cached compiled finished implied normalized paired rendered requested scaled"
)
NOUN_CLAUSE = re.compile(r"What|Whether|The same|As |Where|How|Those|That")
BRITISH = re.compile(  # each in brackets once, so that this line does not match itself
    r"colo[u]r|gr[e]y|cent[r]e|licen[c]e|normali[s]|behavio[u]r|neighbo[u]r", re.IGNORECASE
)
METHOD_ARGUMENTS = ["axis", "kappa", "u", "config"]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def iter_bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of every variable, parameter, attribute and alias that gets a value."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.alias(asname=str(name)):
                yield node.lineno, name


def is_participle_name(name: str) -> bool:
    """Return whether a function's name is a past participle or begins with one."""
    word, *rest = name.strip("_").lower().split("_")
    if rest and word in ADJECTIVES:
        return False
    return word in IRREGULAR_PARTICIPLES or (word.endswith("ed") and word not in NOT_PARTICIPLES)


def check_docstring(node: Function | ast.ClassDef) -> Iterator[str]:
    """Yield the broken rules about the docstring of a function or class."""
    docstring = ast.get_docstring(node) or ""
    if NOUN_CLAUSE.match(docstring):
        yield f"the docstring of {node.name} begins with {docstring[:20]!r}, expected a verb"
    if isinstance(node, ast.ClassDef):
        return
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
    if names == METHOD_ARGUMENTS:  # the head of rope.py explains them once for all methods
        return
    if len(names) > 2 and "\n\n" in docstring and "Args:" not in docstring:
        yield f"the docstring of {node.name} has no Args: for {len(names)} parameters"


def check_tree(tree: ast.Module, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield line and rule of every fault in the syntax tree; docstrings only for dype/."""
    for line, name in iter_bindings(tree):
        if name.strip("_").lower() in PRONOUNS:
            yield line, f"the variable {name} is a pronoun, expected a noun"
    for node in ast.walk(tree):
        if isinstance(node, Function) and is_participle_name(node.name):
            yield node.lineno, f"the function {node.name} is a participle, expected a verb"
        if is_package and isinstance(node, Function | ast.ClassDef):
            yield from ((node.lineno, rule) for rule in check_docstring(node))
    for node in tree.body if is_package else ():
        is_public = isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
        if is_public and not ast.get_docstring(node):
            yield node.lineno, f"{node.name} is public and has no docstring"


def find_faults(source: str, is_package: bool) -> list[tuple[int, str]]:
    """Return line and rule of every fault, in the order of the lines."""
    faults = list(check_tree(ast.parse(source), is_package))
    for line, text in enumerate(source.splitlines(), 1):
        faults += [(line, f"{word} is British spelling") for word in BRITISH.findall(text)]
    return sorted(faults)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_docstrings_and_spelling(path):
    name = path.relative_to(ROOT)
    faults = find_faults(path.read_text(), is_package=name.parts[0] == "dype")
    assert not faults, "\n" + "\n".join(f"{name}:{line}: {rule}" for line, rule in faults)


EXAMPLES = [  # source and words of its only fault, None without a fault
    ("for _, own in rows: pass", "variable own"),
    ("(lambda *, at: at)(at=1)", "variable at"),
    ("self.most = 1", "variable most"),
    ("import os as other", "variable other"),
    ("def settled():\n    'Settle.'", "function settled"),
    ("class Row:\n    'A row.'\n    def _shown_size(self): pass", "function _shown_size"),
    ("hue = 'colo" + "ur'", "British"),
    ("# at the cent" + "re", "British"),
    ("def read():\n    'What is read.'", "begins with 'What"),
    ("def _read(a, *, b, c):\n    '''Read.\n\n    a: file.\n    '''", "no Args:"),
    ("class Table: pass", "no docstring"),
    ("def seed():\n    'Seed.'", None),
    ("def cached_latents():\n    'Latents.'", None),
    ("def read(a, b, c):\n    '''Read.\n\n    Args:\n        a: a file.\n    '''", None),
    ("class A:\n    'Row.'\n    def f(self, a, b):\n        '''Read.\n\n        a: file.'''", None),
]


@pytest.mark.parametrize(("source", "words"), EXAMPLES)
def test_rules_see_faults(source, words):
    rules = [rule for _, rule in find_faults(source, is_package=True)]
    assert len(rules) == (words is not None)
    assert words is None or words in rules[0]
