"""For the site: a field of `Config` is told by the help that it is declared with, and by its default."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class SettingsHelp(griffe.Extension):
    """Turns `budget: int = _About("Tokens carried …")(4096, …)` into a default and a docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Called for each attribute that is found."""
        text = str(attr.value or "")
        if not text.startswith("_About("):
            return
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Call)
        attr.value = ast.unparse(call.args[0])
        attr.docstring = griffe.Docstring(ast.literal_eval(call.func.args[0]), parent=attr)
