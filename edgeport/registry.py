"""One door for built-ins and plugins: a package's modules, then the entry points of the same name."""

from __future__ import annotations

import difflib
import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, cast

from edgeport.errors import AmbiguousFormat, UnknownName
from edgeport.rounding import Rounding
from edgeport.seams import Codec, Converter, PatchKind, Peek


@cache
def members(package: str, attribute: str) -> dict[str, Any]:
    """Every module of `package` that holds `attribute`, then the entry points of group `edgeport.<package>`."""
    found = {}
    group = package if package.startswith("edgeport.") else f"edgeport.{package}"
    modules = pkgutil.iter_modules(import_module(package).__path__)
    objects = [getattr(import_module(f"{package}.{module.name}"), attribute, None) for module in modules]
    objects += [point.load() for point in entry_points(group=group)]
    for item in objects:
        if item is not None:
            found[item.name] = item
    return found


def codecs() -> dict[str, Codec]:
    return members("edgeport.codecs", "codec")


def converters() -> dict[str, Converter]:
    return members("converters", "converter")


def patch_kinds() -> dict[str, PatchKind]:
    return members("edgeport.patches", "patch_kind")


def codec(name: str) -> Codec:
    return cast(Codec, lookup(codecs(), name, "number format"))


def converter(name: str) -> Converter:
    return cast(Converter, lookup(converters(), name, "container"))


def codec_of(format: str) -> Codec:
    """The codec that owns a format name such as BF16 or Q4_K."""
    owners = {known: codec for codec in codecs().values() for known in codec.formats}
    return cast(Codec, lookup(owners, format, "number format"))


def roundings() -> dict[str, Rounding]:
    return members("edgeport.rounding", "rounding")


def lookup(known: dict[str, Any], name: str, what: str) -> Any:
    """`known[name]`, or UnknownName with the nearest name and all of them."""
    if name in known:
        return known[name]
    raise UnknownName(miss(list(known), name, what))


def miss(known: list[str], name: str, what: str) -> str:
    """The sentence for a name that is in no table: the nearest match, then all."""
    near = difflib.get_close_matches(name.lower(), [key.lower() for key in known], n=1, cutoff=0.5)
    hint = next((f"; did you mean {key!r}?" for key in known if near and key.lower() == near[0]), "")
    return f"no {what} is called {name!r}{hint} (known: {', '.join(sorted(known))})"


def claim(specs: dict[str, Any], config: dict[str, Any], peek: Peek) -> list[Any]:
    """Let the codecs group an HF folder's stored tensors into weights. Raises AmbiguousFormat for a leftover."""
    owned: dict[str, str] = {}
    weights = []
    # plain takes whatever no other codec spells, so it is asked last
    for candidate in sorted(codecs().values(), key=lambda codec: codec.name == "plain"):
        free = {name: spec for name, spec in specs.items() if name not in owned}
        for weight in candidate.claim(free, config, peek):
            weights.append(weight)
            owned.update({part.spec.name: candidate.name for part in weight.parts.values()})
    left = sorted(set(specs) - set(owned))
    if left:
        raise AmbiguousFormat(f"no codec can read {len(left)} stored tensors ({', '.join(left[:5])} ...)")
    order = {name: index for index, name in enumerate(specs)}
    return sorted(weights, key=lambda weight: min(order[part.spec.name] for part in weight.parts.values()))
