"""JSON schemas, made into the part of the language that constrains sampling exactly, or refused.

The grammar compiler reads some keywords, ignores others without a word and never looks at the siblings of `anyOf` or
`$ref`. A schema that passes here means the same to the compiler as to a validator, but for being stricter: what the
schema leaves open (further properties of a listed object, keywords for a type that is not named) is closed. So what
is generated always validates. What cannot be expressed is refused with the keyword's path; nothing is dropped in
silence but annotations.

    schema -> references resolved, siblings merged -> alternatives -> one plain schema for each type

The keywords and their meaning are those of JSON Schema draft 2020-12.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saddle.errors import InvalidRequest
from saddle.grammar.keywords import (
    APPLICATORS,
    FORMATS,
    MAX_ALTERNATIVES,
    MAX_DEPTH,
    MAX_NODES,
    NUMBERS,
    OF_TYPE,
    REFUSED,
    SILENT,
    TYPES,
    Budget,
    check_form,
    key_of,
    type_of,
    values_of,
)
from saddle.grammar.merge import Unsupported, check_pattern, merge, narrow_pattern
from saddle.parsing.tools import ALIASES, Parameter


def normalise(
    schema: Any, where: str, *, for_tools: bool = False, budget: Budget | None = None
) -> dict[str, Any]:
    """The schema as the compiler should see it.

    Args:
        schema: any JSON Schema of draft 2020-12; local references only.
        where: path of the schema in the request, for errors.
        for_tools: for arguments that M2 writes between tags: the root is an object of listed properties, strings
            cannot hold tags, and the type names that M2's clients use beside JSON's are understood.
        budget: shared by all schemas of a request.

    Raises:
        InvalidRequest: naming the keyword that is wrong or cannot be enforced.
    """
    if not isinstance(schema, (dict, bool)):
        raise InvalidRequest(f"{where} must be a JSON schema: an object, or true.", where)
    builder = _Builder(schema, where, for_tools, budget or Budget())
    try:
        return builder.root_of_tool() if for_tools else builder.root()
    except Unsupported as error:
        path = ".".join((where, *error.path))
        raise InvalidRequest(f"{path}: {error}", path) from None
    except RecursionError:  # a chain of references may be as long as it likes
        raise InvalidRequest(f"{where} is nested too deeply.", where) from None


@dataclass(frozen=True, slots=True)
class _Marks:
    """What tells the values of one schema from those of another: types, listed values, values of required members."""

    types: frozenset[str]
    values: frozenset[str] | None
    members: dict[str, frozenset[str]]

    def excludes(self, other: _Marks) -> bool:
        """Whether no value can match both."""
        common = self.types & other.types
        if not common:
            return True
        if self.values is not None and other.values is not None:
            return not self.values & other.values
        if common != {"object"}:
            return False
        both = self.members.keys() & other.members.keys()
        return any(not self.members[name] & other.members[name] for name in both)


def _keys(values: list[Any] | None) -> frozenset[str] | None:
    return None if values is None else frozenset(key_of(value) for value in values)


def _size(said: dict[str, Any]) -> int:
    """Entries that merging copies."""
    return sum(len(said.get(key, ())) for key in ("properties", "required", "enum"))


class _Builder:
    def __init__(self, root: Any, where: str, for_tools: bool, budget: Budget) -> None:
        self._root, self._where, self._for_tools = root, where, for_tools
        self._spend = budget.spend
        self._num_nodes = 0
        self._names: dict[str, str] = {}  # by JSON pointer
        self._defs: dict[str, Any] = {}

    def root(self) -> dict[str, Any]:
        return self._with_defs(self._schema(self._root, (), 0, ()))

    def root_of_tool(self) -> dict[str, Any]:
        """The arguments of a call: properties whose names are listed, and no others."""
        found = self._alternatives(self._root, (), ()) if self._root is not True else [{}]
        if len(found) != 1:
            raise Unsupported("the arguments of a tool must be one object, not alternatives", ("anyOf",))
        root = {"type": "object", **found[0]}
        if "object" not in self._types(root, ()):
            raise Unsupported('the arguments of a tool must be of type "object"', ("type",))
        for key in ("patternProperties", "propertyNames", "minProperties", "maxProperties", "enum", "const"):
            if key in root:
                raise Unsupported("not supported for the arguments of a tool; list them in properties", (key,))
        for name in root.get("properties", {}):
            if not name or any(char in name for char in "\"'<>\n"):
                raise Unsupported("names of arguments cannot hold quotes, angle brackets and newlines",
                                  ("properties", name))  # fmt: skip
        built = self._object({**root, "additionalProperties": False}, (), 0)
        for name, part in built.get("properties", {}).items():
            if "enum" in part:
                part["enum"] = self._readable(part["enum"], root["properties"][name], ("properties", name, "enum"))
        return self._with_defs(built)

    def _readable(self, values: list[Any], schema: Any, path: tuple[str, ...]) -> list[Any]:
        """The values that are read back from their text: with 1 allowed beside it, "1" would not be."""
        parameter = Parameter(schema, self._root)
        texts = ((value, value if isinstance(value, str) else json.dumps(value)) for value in values)
        found = [value for value, text in texts if key_of(parameter.value(text)) == key_of(value)]
        if not found:
            raise Unsupported("no value can be told from another one by its text", path)
        return found

    def _with_defs(self, schema: dict[str, Any]) -> dict[str, Any]:
        return {**schema, "$defs": self._defs} if self._defs else schema

    # one schema --------------------------------------------------------------------------------------------------

    def _schema(self, schema: Any, path: tuple[str, ...], depth: int, bare: tuple[str, ...]) -> dict[str, Any]:
        """Args: bare: references followed since the last property or item; meeting one again would never end."""
        self._num_nodes += 1
        if depth > MAX_DEPTH:
            raise Unsupported(f"nested deeper than {MAX_DEPTH} levels", path)
        if self._num_nodes > MAX_NODES:
            raise Unsupported(f"the schema has more than {MAX_NODES} parts", path)
        if schema is True:
            return {}
        said = self._said(schema, path)
        if set(said) == {"$ref"}:
            return self._reference(said["$ref"], path, bare)
        for key in ("anyOf", "oneOf"):
            if set(said) == {key}:
                if key == "oneOf":
                    self._check_disjoint(said[key], (*path, key))
                return self._any_of(said[key], (*path, key), depth, bare)
        found = self._alternatives(schema, path, bare)
        return _one_of([self._plain(each, path, depth) for each in found])

    def _any_of(self, branches: list[Any], path: tuple[str, ...], depth: int, bare: tuple[str, ...]) -> dict[str, Any]:
        built = [
            self._schema(branch, (*path, str(number)), depth + 1, bare)
            for number, branch in enumerate(branches) if branch is not False
        ]  # fmt: skip
        if not built:
            raise Unsupported("no value can match", path)
        return _one_of(built)

    def _reference(self, pointer: Any, path: tuple[str, ...], bare: tuple[str, ...]) -> dict[str, Any]:
        target = self._resolve(pointer, path)
        if pointer in bare:
            raise Unsupported("the reference leads to itself without anything between", (*path, "$ref"))
        if pointer not in self._names:
            name = self._names[pointer] = f"r{len(self._names)}"
            # The depth counts anew: a reference costs the compiler nothing.
            self._defs[name] = self._schema(target, ("$ref", str(pointer)), 0, (*bare, pointer))
        return {"$ref": f"#/$defs/{self._names[pointer]}"}

    def _resolve(self, pointer: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise Unsupported(f'must be a reference inside the schema, such as "#/$defs/name", got {pointer!r}',
                              (*path, "$ref"))  # fmt: skip
        found: Any = self._root
        for step in pointer[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and step in found:
                found = found[step]
            elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
                found = found[int(step)]
            else:
                raise Unsupported(f"{pointer!r} leads nowhere", (*path, "$ref"))
        if not isinstance(found, (dict, bool)):
            raise Unsupported(f"{pointer!r} is no schema", (*path, "$ref"))
        return found

    def _said(self, schema: Any, path: tuple[str, ...]) -> dict[str, Any]:
        """The keywords that constrain, checked for their form."""
        if schema is True:
            return {}
        if schema is False:
            raise Unsupported("no value can match", path)
        if not isinstance(schema, dict):
            raise Unsupported("must be a JSON schema: an object, or true", path)
        self._spend(1 + sum(len(part) for part in schema.values() if isinstance(part, (dict, list))) // 10, path)
        known = {*APPLICATORS, "type", "enum", "const", *(key for keys in OF_TYPE.values() for key in keys)}
        said: dict[str, Any] = {}
        for key, value in schema.items():
            inside = (*path, key)
            if key in REFUSED or (key in ("$id", "$anchor", "$dynamicAnchor") and (path or key != "$id")):
                raise Unsupported("this keyword cannot be enforced while sampling; leave it out", inside)
            if key == "uniqueItems" and value is True:
                raise Unsupported("unique items cannot be enforced while sampling; leave it out", inside)
            if key in known:
                check_form(key, value, inside)
                said[key] = value
        if isinstance(said.get("items"), list):  # the older spelling of tuples
            said["prefixItems"] = said.pop("items")
        if schema.get("nullable") is True and isinstance(said.get("type"), str):  # OpenAPI 3.0
            said["type"] = [said["type"], "null"]
        return said

    # alternatives ------------------------------------------------------------------------------------------------

    def _alternatives(self, schema: Any, path: tuple[str, ...], bare: tuple[str, ...]) -> list[dict[str, Any]]:
        """The schema without any applicator: one of these must match."""
        said = self._said(schema, path)
        parts: list[list[dict[str, Any]]] = [[{k: v for k, v in said.items() if k not in APPLICATORS}]]
        if "$ref" in said:
            pointer = said["$ref"]
            target = self._resolve(pointer, path)
            if pointer in bare:
                raise Unsupported("the reference leads to itself without anything between", (*path, "$ref"))
            parts.append(self._alternatives(target, (*path, "$ref"), (*bare, pointer)))
        for number, part in enumerate(said.get("allOf", ())):
            parts.append(self._alternatives(part, (*path, "allOf", str(number)), bare))
        for key in ("anyOf", "oneOf"):
            if key not in said:
                continue
            if key == "oneOf":
                self._check_disjoint(said[key], (*path, key))
            parts.append([
                each
                for number, part in enumerate(said[key]) if part is not False
                for each in self._alternatives(part, (*path, key, str(number)), bare)
            ])  # fmt: skip
        found: list[dict[str, Any]] = [{}]
        for choices in parts:
            if len(found) * len(choices) > MAX_ALTERNATIVES:
                raise Unsupported(f"more than {MAX_ALTERNATIVES} combinations of alternatives", path)
            self._spend(len(choices) * sum(1 + _size(one) // 20 for one in found), path)
            found = [both for one in found for other in choices if (both := merge(one, other, path)) is not None]
        if not found:
            raise Unsupported("no value can match", path)
        return found

    def _check_disjoint(self, branches: list[Any], path: tuple[str, ...]) -> None:
        """`oneOf` asks that no second branch matches: shown by types, or by a property that tells them apart."""
        flat = [
            [self._marks(each, path) for each in self._alternatives(branch, (*path, str(number)), ())]
            if branch is not False else []
            for number, branch in enumerate(branches)
        ]  # fmt: skip
        for number, ones in enumerate(flat):
            for others in flat[:number]:
                self._spend(1 + len(ones) * len(others) // 10, path)
                if not all(one.excludes(other) for one in ones for other in others):
                    raise Unsupported("more than one branch might match, which sampling cannot rule out; use anyOf",
                                      path)  # fmt: skip

    def _marks(self, said: dict[str, Any], path: tuple[str, ...]) -> _Marks:
        values = values_of(said)
        types = frozenset(self._types(said, path) if "type" in said or values is not None else TYPES)
        properties = said.get("properties", {})
        told = {name: keys for name in said.get("required", ()) if isinstance(properties.get(name), dict)
                and (keys := _keys(values_of(properties[name]))) is not None}  # fmt: skip
        return _Marks(types | ({"integer"} if "number" in types else set()), _keys(values), told)

    # plain schemas -----------------------------------------------------------------------------------------------

    def _types(self, said: dict[str, Any], path: tuple[str, ...]) -> list[str]:
        """The types that a schema names, or else those that its keywords are about; none if it is about nothing."""
        named = said.get("type")
        if named is None:
            values = values_of(said)
            if values is not None:
                return sorted({type_of(value) for value in values})
            return [kind for kind, keys in OF_TYPE.items() if any(key in said for key in keys)]
        kinds = [named] if isinstance(named, str) else list(named)
        if self._for_tools:
            kinds = [ALIASES.get(kind.lower(), kind) for kind in kinds]
            kinds = ["array" if kind == "tuple" else kind for kind in kinds]
            if "any" in kinds:
                return []
        for kind in kinds:
            if kind not in TYPES:
                raise Unsupported(f"must be one of {', '.join(TYPES)}, got {kind!r}", (*path, "type"))
        return [kind for kind in kinds if kind != "integer" or "number" not in kinds]

    def _plain(self, said: dict[str, Any], path: tuple[str, ...], depth: int) -> dict[str, Any]:
        kinds = self._types(said, path)
        values = values_of(said)
        if values is not None:
            return self._listed(said, values, kinds if "type" in said else [], path)
        if not kinds:
            return {}
        builders = {"object": self._object, "array": self._array, "string": self._string, "number": _number,
                    "integer": _number}  # fmt: skip
        return _one_of([
            builders[kind]({**said, "type": kind}, path, depth) if kind in builders else {"type": kind}
            for kind in kinds
        ])  # fmt: skip

    def _listed(
        self, said: dict[str, Any], values: list[Any], kinds: list[str], path: tuple[str, ...]
    ) -> dict[str, Any]:
        others = [key for keys in OF_TYPE.values() for key in keys if key in said and key != "format"]
        if others:
            raise Unsupported("this keyword cannot be combined with enum or const", (*path, others[0]))
        if kinds:
            allowed = {*kinds, *(("integer",) if "number" in kinds else ())}
            values = [value for value in values if type_of(value) in allowed]
        if not values:
            raise Unsupported("no value of enum is of the type that is asked for", (*path, "enum"))
        if self._for_tools and any(isinstance(value, str) and "</" in value for value in values):
            raise Unsupported('"</" inside a value would end it', (*path, "enum"))
        return {"enum": values}

    def _object(self, said: dict[str, Any], path: tuple[str, ...], depth: int) -> dict[str, Any]:
        built: dict[str, Any] = {"type": "object"}
        given = said.get("properties", {})
        required = list(dict.fromkeys(said.get("required", ())))
        properties = {
            name: self._schema(part, (*path, "properties", name), depth + 1, ())
            for name, part in given.items() if part is not False
        }  # fmt: skip
        forbidden = {name for name, part in given.items() if part is False}
        extra = said.get("additionalProperties")
        unevaluated = said.get("unevaluatedProperties", False)
        patterns = said.get("patternProperties")
        is_free = not given and patterns is None and unevaluated is not False
        if extra is None:
            # A listed object is closed; one without any list is free.
            extra = not given and patterns is None and "unevaluatedProperties" not in said
        if unevaluated not in (False, True) or is_free:
            raise Unsupported("only true or false beside properties is supported", (*path, "unevaluatedProperties"))
        if extra is not False and (forbidden or patterns):
            raise Unsupported("cannot be combined with patternProperties or forbidden properties",
                              (*path, "additionalProperties"))  # fmt: skip
        if patterns and (given or required):
            raise Unsupported("cannot be combined with properties or required", (*path, "patternProperties"))
        if "propertyNames" in said and (given or patterns or required):
            raise Unsupported("cannot be combined with properties or required", (*path, "propertyNames"))
        for name in required:
            if name in forbidden:
                raise Unsupported(f"{name!r} is required and forbidden", (*path, "required"))
            if name not in properties:
                if extra is False:
                    raise Unsupported(f"{name!r} is required but is not among properties", (*path, "required"))
                properties[name] = {} if extra is True else self._schema(extra, (*path, "additionalProperties"),
                                                                         depth + 1, ())  # fmt: skip
        if properties:
            built["properties"] = properties
        if required:
            built["required"] = required
        self._add_extras(built, said, extra, path, depth)
        return built

    def _add_extras(
        self, built: dict[str, Any], said: dict[str, Any], extra: Any, path: tuple[str, ...], depth: int
    ) -> None:
        inside = (*path, "additionalProperties")
        built["additionalProperties"] = extra if isinstance(extra, bool) else self._schema(extra, inside, depth + 1, ())
        patterns = said.get("patternProperties")
        if patterns:
            within = (*path, "patternProperties")
            if len(patterns) > 1:
                raise Unsupported("more than one pattern is not supported: a name may match several", within)
            built["patternProperties"] = {
                self._pattern(pattern, within): self._schema(part, (*within, pattern), depth + 1, ())
                for pattern, part in patterns.items() if part is not False
            }  # fmt: skip
        if "propertyNames" in said:
            names = said["propertyNames"]
            if not isinstance(extra, bool):
                raise Unsupported("cannot be combined with a schema for additionalProperties",
                                  (*path, "propertyNames"))  # fmt: skip
            if names is False:
                raise Unsupported("no name can match", (*path, "propertyNames"))
            only = names is True or (isinstance(names, dict) and set(names) <= {"pattern", "type", *SILENT})
            if not only:
                raise Unsupported("only pattern is supported here", (*path, "propertyNames"))
            if isinstance(names, dict) and "pattern" in names:
                pattern = self._pattern(names["pattern"], (*path, "propertyNames", "pattern"))
                built["propertyNames"] = {"pattern": pattern}
        least, most = said.get("minProperties", 0), said.get("maxProperties")
        if least > max(len(built.get("required", ())), 1 if extra is not False and not built.get("properties") else 0):
            raise Unsupported("more than the required properties cannot be enforced: a name might repeat",
                              (*path, "minProperties"))  # fmt: skip
        if least > len(built.get("required", ())):
            built["minProperties"] = least
        if most is not None:
            if most < len(built.get("required", ())):
                raise Unsupported("below the number of required properties", (*path, "maxProperties"))
            built["maxProperties"] = most

    def _array(self, said: dict[str, Any], path: tuple[str, ...], depth: int) -> dict[str, Any]:
        built: dict[str, Any] = {"type": "array"}
        if said.get("unevaluatedItems", False) is not False and "items" not in said:
            raise Unsupported("only false is supported", (*path, "unevaluatedItems"))
        heads = said.get("prefixItems", [])
        least, most = int(said.get("minItems", 0)), said.get("maxItems")
        items = said.get("items", not heads and "unevaluatedItems" not in said)
        stop = next((number for number, head in enumerate(heads) if head is False), None)
        if stop is not None:
            heads, items = heads[:stop], False
        if heads:
            built["prefixItems"] = [
                self._schema(head, (*path, "prefixItems", str(number)), depth + 1, ())
                for number, head in enumerate(heads)
            ]
            if most is not None and most < len(heads):
                built["prefixItems"], items = built["prefixItems"][: int(most)], False
        if items is False:
            most = len(built.get("prefixItems", ())) if most is None else min(most, len(built.get("prefixItems", ())))
            built["items"] = False
        else:
            built["items"] = self._schema(items, (*path, "items"), depth + 1, ())
        if most is not None and least > most:
            raise Unsupported("no array is long enough and short enough", (*path, "minItems"))
        if least:
            built["minItems"] = least
        if most is not None:
            built["maxItems"] = int(most)
        if most == 0:
            return {"enum": [[]]}
        return built

    def _string(self, said: dict[str, Any], path: tuple[str, ...], depth: int) -> dict[str, Any]:
        least, most = int(said.get("minLength", 0)), said.get("maxLength")
        pattern = said.get("pattern")
        if most is not None and least > most:
            raise Unsupported("no string is long enough and short enough", (*path, "minLength"))
        if pattern is not None:
            if least or most is not None:
                raise Unsupported("cannot be combined with minLength or maxLength", (*path, "pattern"))
            return {"type": "string", "pattern": self._pattern(pattern, (*path, "pattern"))}
        if least or most is not None:
            # As a pattern, because the compiler's own lengths let raw control characters into JSON, and do not go
            # together with excluded tags.
            wide = "[^<]" if self._for_tools else "."
            return {"type": "string", "pattern": f"{wide}{{{least},{'' if most is None else int(most)}}}"}
        return {"type": "string", "format": said["format"]} if said.get("format") in FORMATS else {"type": "string"}

    def _pattern(self, pattern: str, path: tuple[str, ...]) -> str:
        check_pattern(pattern, path)
        return narrow_pattern(pattern) if self._for_tools else pattern


def _number(said: dict[str, Any], path: tuple[str, ...], depth: int) -> dict[str, Any]:
    if "multipleOf" in said:
        if any(key in said for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")):
            raise Unsupported("cannot be combined with bounds", (*path, "multipleOf"))
        if said["type"] != "integer" or not float(said["multipleOf"]).is_integer():
            raise Unsupported("only a whole number for integers is supported", (*path, "multipleOf"))
    return {key: value for key, value in said.items() if key in NUMBERS or key == "type"}


def _one_of(built: list[dict[str, Any]]) -> dict[str, Any]:
    return built[0] if len(built) == 1 else {"anyOf": built}
