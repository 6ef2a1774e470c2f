"""For the site: a field of `Config` is told by the help that it is declared with, and by its default."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class SettingsHelp(griffe.Extension):
    """Turns `budget: int = _setting(4096, "Tokens carried …")` into a default and a docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Called for each attribute that is found."""
        text = str(attr.value or "")
        if not text.startswith("_setting("):
            return
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        default, told = call.args[:2]
        attr.value = ast.unparse(default)
        attr.docstring = griffe.Docstring(ast.literal_eval(told), parent=attr)
