"""The REST reference, from the OpenAPI document."""

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]


def page(document: Json) -> str:
    """Every operation and every schema, in Markdown."""
    lines = ["# REST", "", "Made from the OpenAPI document, which the service has too:"]
    lines += ["`/openapi.json`. Errors are problems (RFC 9457), see [](../troubleshooting.md)."]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            lines += _operation(method.upper(), path, operation)
    lines += ["", "## Schemas"]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += _schema(name, schema)
    return "\n".join(lines) + "\n"


def _operation(method: str, path: str, operation: Json) -> Iterator[str]:
    yield from ("", f"## {method} {path}", "", f"**{operation['summary']}**", "")
    yield operation.get("description", "")
    if parameters := operation.get("parameters"):
        yield from ("", "| parameter | in | type | meaning |", "|---|---|---|---|")
        for each in parameters:
            name = f"`{each['name']}`" + (" (required)" if each.get("required") else "")
            meaning = each.get("description") or each["schema"].get("description", "")
            yield _row(name, each["in"], kind(each["schema"]), meaning)
    if body := operation.get("requestBody"):
        for media, content in body["content"].items():
            yield from ("", f"Body: {kind(content['schema'])} as `{media}`.")
    yield from ("", "| status | meaning | content |", "|---|---|---|")
    for status, response in operation["responses"].items():
        content = ", ".join(
            f"`{media}`" + (f": {kind(each['schema'])}" if each.get("schema") else "")
            for media, each in response.get("content", {}).items()
        )
        yield _row(status, response["description"], content)


def _schema(name: str, schema: Json) -> Iterator[str]:
    yield from ("", f"### {name}", "", schema.get("description", ""))
    if "enum" in schema:
        yield from ("", "One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + ".")
    if properties := schema.get("properties"):
        required = schema.get("required", ())
        yield from ("", "| field | type | default | meaning |", "|---|---|---|---|")
        for field, each in properties.items():
            default = "required" if field in required else _default(each)
            yield _row(f"`{field}`", kind(each), default, each.get("description", ""))


def kind(schema: Json) -> str:
    """A schema's type in a few words, with links to the named ones."""
    if reference := schema.get("$ref"):
        name = reference.rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for word, joint in (("anyOf", " or "), ("oneOf", " or "), ("allOf", " and ")):
        if word in schema:
            return joint.join(kind(each) for each in schema[word])
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    words = schema.get("type", "anything")
    if words == "array":
        words = f"list of {kind(schema.get('items', {}))}"
    limits = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "to {}",
        "minLength": "from {} characters",
        "maxLength": "to {} characters",
        "minItems": "from {} items",
        "maxItems": "to {} items",
    }
    said = [text.format(schema[limit]) for limit, text in limits.items() if limit in schema]
    return " ".join([words, *said])


def _default(schema: Json) -> str:
    if "default" not in schema:
        return ""
    return f"`{schema['default']!r}`" if schema["default"] is not None else "null"


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"
