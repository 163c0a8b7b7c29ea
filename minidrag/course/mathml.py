"""Formulas: a small part of LaTeX to MathML, which a browser sets without a network."""

import re
from html import escape
from html.entities import html5

TOKEN = re.compile(r"\\text\{[^}]*\}|\\[a-zA-Z]+|\\.|[a-zA-Z]|\d+(?:\.\d+)?|\S")
WORDS = {"\\argmin": "arg min", "\\softmax": "softmax", "\\sg": "sg", "\\E": "𝔼"}
# Characters that HTML calls otherwise than LaTeX, if at all.
SYMBOLS = {"\\cdot": "·", "\\partial": "∂", "\\|": "‖", "-": "−"}
LIMITS = ("\\sum", "\\argmin", "\\E")  # their subscript stands below
ACCENTS = {"\\hat": "ˆ", "\\bar": "¯"}


def mathml(tex: str) -> str:
    """A displayed formula. Raises ValueError for a command that is not known."""
    return f'<math display="block">{row(TOKEN.findall(tex))}</math>'


def row(tokens: list[str]) -> str:
    """Take everything up to the closing brace, or the end, off the tokens."""
    parts = []
    while tokens and tokens[0] != "}":
        parts.append(scripted(tokens))
    del tokens[:1]
    return f"<mrow>{''.join(parts)}</mrow>"


def scripted(tokens: list[str]) -> str:
    """Take one atom and its subscript and superscript off the tokens."""
    under = tokens[0] in LIMITS
    base = atom(tokens)
    scripts = {}
    while tokens and tokens[0] in ("_", "^"):
        kind = tokens.pop(0)
        scripts[kind] = atom(tokens)
    if not scripts:
        return base
    names = ("munder", "mover", "munderover") if under else ("msub", "msup", "msubsup")
    name = names[2] if len(scripts) == 2 else names["^" in scripts]
    return f"<{name}>{base}{scripts.get('_', '')}{scripts.get('^', '')}</{name}>"


def atom(tokens: list[str]) -> str:
    """Take a letter, number, operator, or group off the tokens."""
    token = tokens.pop(0)
    if token == "{":
        return row(tokens)
    if token == "\\frac":
        return f"<mfrac>{atom(tokens)}{atom(tokens)}</mfrac>"
    if token == "\\sqrt":
        return f"<msqrt>{atom(tokens)}</msqrt>"
    if token in ACCENTS:
        return f'<mover accent="true">{atom(tokens)}<mo>{ACCENTS[token]}</mo></mover>'
    if token.startswith("\\text{"):
        text = token[6:-1].replace(" ", "\u00a0")  # MathML drops spaces at the ends
        return f"<mtext>{escape(text)}</mtext>"
    if token == "\\,":
        return '<mspace width="0.5em"></mspace>'
    if token in WORDS:
        return f"<mi>{WORDS[token]}</mi>"
    if token[0].isdigit():
        return f"<mn>{token}</mn>"
    text = symbol(token)
    kind = "mi" if text.isalpha() else "mo"
    return f"<{kind}>{escape(text)}</{kind}>"


def symbol(token: str) -> str:
    """The character of a command; most have the same name in HTML."""
    if token in SYMBOLS:
        return SYMBOLS[token]
    text = html5.get(f"{token[1:]};") if token.startswith("\\") else token
    if text is None:
        raise ValueError(f"unknown command {token} in a formula")
    return text
