"""An extension of griffe, which reads the docstrings for mkdocstrings; mkdocs.yml names it."""

import re
from typing import Any

from griffe import Alias, Extension, Module, NameResolutionError, Object

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")


class Docstrings(Extension):
    """Rewrites a package once it is read."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        _link_roles(pkg)
        for package in [pkg, *pkg.modules.values()]:
            _show_functions(package)


def _link_roles(item: Object) -> None:
    """Roles such as :func:`load_cfg` become links: to Markdown they are plain text."""
    if item.docstring:
        item.docstring.value = _ROLE.sub(lambda role: _link(item, role[1]), item.docstring.value)
    for member in item.members.values():
        if not member.is_alias:
            _link_roles(member)


def _link(item: Object, name: str) -> str:
    """A link where the reference has this name, else the name alone."""
    first, *rest = name.split(".")
    try:
        path = ".".join([item.resolve(first), *rest])
    except NameResolutionError:
        path = name
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


def _show_functions(package: Module) -> None:
    """A public name of a function and of its module means the function, as it does in Python."""
    for name in package.exports or ():
        module = package.members.get(name)
        if isinstance(module, Module) and name in module.members:
            package.members[name] = Alias(name, module.members[name], parent=package)
