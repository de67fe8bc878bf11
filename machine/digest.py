"""Digests of the code that computes a model. They show whether a block was edited after it was tested or trained.

The digest of a class covers its methods, all functions and classes of the project that they use, and the constants
that all this code reads. It is computed from tokens, without comments, docstrings and blank lines.
"""

import functools
import hashlib
import io
import linecache
import sys
import tokenize
import types

CONSTANTS = (bool, int, float, str, tuple, type(None))


class NoSource(Exception):
    """The source of a function can't be read."""


def digests(model):
    """{"model.Block": `digest` of that class, ...} for our own classes among the model's modules. Raises NoSource."""
    describe = functools.cache(described)  # classes share code; it is described anew in each call
    classes = {type(module) for module in model.modules()}
    return {full_name(cls): digest(cls, describe) for cls in classes if is_ours(cls)}


def code_of(model):
    """`digests(model)`, or {} if some source can't be read."""
    try:
        return digests(model)
    except NoSource:
        return {}


def full_name(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def digest(cls, describe):
    """The first 16 hex digits of the SHA-256 of the code of a class and of all that it uses. Raises NoSource.

    describe: `described`, or a cache of it.
    """
    found, todo = {}, [cls]
    while todo:
        thing = todo.pop()
        if thing not in found:
            found[thing], more = describe(thing)
            todo += more
    return hashlib.sha256("\n".join(sorted(found.values())).encode()).hexdigest()[:16]


def described(thing):
    """Returns (text, code) of a function or a class.

    text: the function's tokens or the class's name, then a line "name = value" for each constant that the function
    reads or the class has as an attribute. code: a list of the project's own functions and classes among what the
    function reads, or among the attributes of the class, such as its methods.
    """
    if isinstance(thing, type):
        attributes = [item for base in thing.__mro__[::-1] if is_ours(base) for item in vars(base).items()]
        members = {name: unwrapped(value) for name, value in attributes if not name.startswith("__") or callable(value)}
        text = f"class {thing.__qualname__}"
    else:
        members = dict(used(thing))
        text = source_tokens(thing.__code__)
    constants = [f"{name} = {value!r}" for name, value in members.items() if isinstance(value, CONSTANTS)]
    code = [value for value in members.values() if isinstance(value, types.FunctionType | type) and is_ours(value)]
    return "\n".join([text, *constants]), code


def unwrapped(member):
    """The function inside a classmethod, staticmethod, property or decorated function. Other members unchanged."""
    for name in ("__func__", "fget", "__wrapped__"):
        member = getattr(member, name, None) or member
    return member


def used(function):
    """Yields (name, value) for the globals, closure variables and defaults that a function reads."""
    for name in sorted(names_in(function.__code__)):
        if name in function.__globals__:
            yield name, unwrapped(function.__globals__[name])
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        yield name, unwrapped(cell.cell_contents)
    for number, value in enumerate((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())):
        yield f"default {number}", unwrapped(value)


@functools.cache
def names_in(code):
    """The set of names of globals and attributes, not of local variables, in a code object and the functions inside."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def is_ours(thing):
    """Whether a class or function belongs to the project, not to Python or an installed package."""
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
    """The tokens of a code object's source, joined by spaces, without comments and docstrings. Raises NoSource."""
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1:]
    if not lines:
        raise NoSource(f"{code.co_name} in {code.co_filename}")
    margin = len(lines[0]) - len(lines[0].lstrip())
    unindented = (line[margin:] if not line[:margin].strip() and len(line) > margin else line.lstrip(" ")
                  for line in lines)
    return " ".join(plain_tokens(unindented))


@functools.cache
def file_tokens(text):
    """The tokens of a Python file's text, as those of `source_tokens`; the text itself if Python can't read it."""
    try:
        return " ".join(plain_tokens(io.StringIO(text), whole=True))
    except (SyntaxError, tokenize.TokenError):
        return text


def plain_tokens(lines, whole=False):
    """Yields the tokens of a function's source lines, or of a whole file's, without comments and docstrings."""
    layout = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    at_start, depth = whole, 0  # at_start: of a statement
    for token in whole_strings(lines):
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type == tokenize.DEDENT and depth == 0 and not whole:
            break  # the function's end
        if token.type in (tokenize.COMMENT, tokenize.NL) or at_start and token.type == tokenize.STRING:
            continue
        if whole and at_start and token.type == tokenize.NEWLINE:
            continue  # of a docstring
        yield tokenize.tok_name[token.type] if token.type in layout else token.string
        at_start = token.type in layout


def whole_strings(lines):
    """Yields the tokens of source lines, each f-string as one token. From Python 3.12 on, tokenize splits f-strings."""
    seen, opened = [], []  # the lines read so far; the first tokens of the f-strings that we are in
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
