"""Formulas: a small part of LaTeX to MathML, which a browser sets without a network."""

import re
from html import escape

TOKEN = re.compile(r"\\text\{[^}]*\}|\\[a-zA-Z]+|\\.|[a-zA-Z]|\d+(?:\.\d+)?|\S")
LETTERS = {
    "\\alpha": "α",
    "\\epsilon": "ε",
    "\\theta": "θ",
    "\\Delta": "Δ",
    "\\lambda": "λ",
    "\\eta": "η",
    "\\Omega": "Ω",
    "\\sigma": "σ",
    "\\ell": "ℓ",
    "\\partial": "∂",
    "\\top": "⊤",
    "\\infty": "∞",
}
OPERATORS = {
    "\\sum": "∑",
    "\\in": "∈",
    "\\odot": "⊙",
    "\\cdot": "·",
    "\\times": "×",
    "\\leftarrow": "←",
    "\\le": "≤",
    "\\ge": "≥",
    "\\approx": "≈",
    "\\|": "‖",
    "\\{": "{",
    "\\}": "}",
    "-": "−",
}
WORDS = {"\\argmin": "arg min", "\\softmax": "softmax", "\\sg": "sg", "\\Adam": "Adam", "\\E": "𝔼"}
LIMITS = ("\\sum", "\\argmin", "\\E")  # their subscript stands below
ACCENTS = {"\\hat": "ˆ", "\\bar": "¯", "\\tilde": "~"}


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
    base, scripts = atom(tokens), {}
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
    if token in LETTERS or token.isalpha():
        return f"<mi>{LETTERS.get(token, token)}</mi>"
    if token in WORDS:
        return f"<mi>{WORDS[token]}</mi>"
    if token[0].isdigit():
        return f"<mn>{token}</mn>"
    if token not in OPERATORS and token.startswith("\\"):
        raise ValueError(f"unknown command {token} in a formula")
    return f"<mo>{escape(OPERATORS.get(token, token))}</mo>"
