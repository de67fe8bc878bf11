"""Digests of the code that computes a model: they tell an edited block from the one that was measured or trained.

A digest of a class covers its methods, every function of the project that they call, and the constants that these
read. It is taken of their tokens, so comments, docstrings and blank lines don't count. PyTorch's code is not covered.
"""

import functools
import hashlib
import linecache
import sys
import tokenize
import types

CONSTANTS = (bool, int, float, str, tuple, type(None))


class NoSource(Exception):
    """The source of a function can't be read."""


def digests(model):
    """{"model.Block": digest, ...} of the project's classes among a model's modules. Raises NoSource."""
    return {full_name(cls): digest(cls) for cls in {type(module) for module in model.modules()} if is_ours(cls)}


def code_of(model):
    """`digests`, as a checkpoint stores them; {} where the source can't be read."""
    try:
        return digests(model)
    except NoSource:
        return {}


def full_name(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def digest(cls):
    """The first 16 digits of a SHA-256 over the code of a class and all that it calls. Raises NoSource."""
    found, todo = {}, [cls]
    while todo:
        thing = todo.pop()
        if thing not in found:
            found[thing], more = described(thing)
            todo += more
    return hashlib.sha256("\n".join(sorted(found.values())).encode()).hexdigest()[:16]


def described(thing):
    """(a class or function in words, the project's classes and functions that it uses)."""
    if isinstance(thing, type):
        members = {name: unwrapped(value) for base in thing.__mro__[::-1] if is_ours(base)
                   for name, value in vars(base).items() if not name.startswith("__") or callable(value)}
        words = f"class {thing.__qualname__}"
    else:
        members = dict(used(thing))
        words = source_tokens(thing.__code__)
    constants = [f"{name} = {value!r}" for name, value in members.items() if isinstance(value, CONSTANTS)]
    code = [value for value in members.values() if isinstance(value, types.FunctionType | type) and is_ours(value)]
    return "\n".join([words, *constants]), code


def unwrapped(member):
    """The function inside a method of any kind, or inside a decorator."""
    for name in ("__func__", "fget", "__wrapped__"):
        member = getattr(member, name, None) or member
    return member


def used(function):
    """Yields (name, value) of the globals, the closure and the defaults that a function reads."""
    for name in sorted(names_in(function.__code__)):
        if name in function.__globals__:
            yield name, unwrapped(function.__globals__[name])
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        yield name, unwrapped(cell.cell_contents)
    for number, value in enumerate((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())):
        yield f"default {number}", unwrapped(value)


@functools.cache
def names_in(code):
    """The names that a code object looks up, those of the functions inside it too."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def is_ours(thing):
    """Whether a class or function belongs neither to Python nor to an installed package."""
    return is_our_module(getattr(thing, "__module__", None) or "")


@functools.cache
def is_our_module(name):
    package = name.partition(".")[0]
    if package in sys.stdlib_module_names and package != "__main__" or package == "torch":
        return False
    path = getattr(sys.modules.get(name), "__file__", None) or ""
    return "site-packages" not in path and "dist-packages" not in path


@functools.cache
def source_tokens(code):
    """The tokens of a function's source, without comments and docstrings. Raises NoSource."""
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1:]
    if not lines:
        raise NoSource(f"{code.co_name} in {code.co_filename}")
    margin = len(lines[0]) - len(lines[0].lstrip())
    unindented = (line[margin:] if not line[:margin].strip() and len(line) > margin else line.lstrip(" ")
                  for line in lines)
    layout = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    words, fresh, depth = [], False, 0  # fresh: a statement begins
    for token in whole_strings(unindented):
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type == tokenize.DEDENT and depth == 0:
            break  # the function's end
        if token.type in (tokenize.COMMENT, tokenize.NL) or fresh and token.type == tokenize.STRING:
            continue
        words.append(tokenize.tok_name[token.type] if token.type in layout else token.string)
        fresh = token.type in layout
    return " ".join(words)


def whole_strings(lines):
    """The tokens of some lines, each f-string as one: from Python 3.12 on it is several."""
    seen, opened = [], []  # opened: the first tokens of f-strings, one inside the other
    for token in tokenize.generate_tokens(lambda: seen.append(next(lines, "")) or seen[-1]):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            opened.append(token)
        elif kind == "FSTRING_END":
            start = opened.pop()
            if not opened:
                (row, column), (last, end) = start.start, token.end
                text = "".join(seen[row - 1:last])
                yield token._replace(type=tokenize.STRING, string=text[column:len(text) - len(seen[last - 1]) + end])
        elif not opened:
            yield token
