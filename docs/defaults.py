"""Signatures show the default of a `help_field(default, text)`, not the call. A griffe extension, see mkdocs.yml."""

import griffe


class PlainDefaults(griffe.Extension):
    """Takes the default out of `help_field` before griffe makes signatures of dataclasses."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        """Called for each attribute that griffe reads."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and value.function.canonical_name == "help_field":
            attr.value = value.arguments[0]
