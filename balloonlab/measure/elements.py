"""HTML made of elements and not of text, so that no text can become markup.

Pure. Used by the parts of the HTML report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias
from xml.etree.ElementTree import Element, SubElement, tostring

Content: TypeAlias = "str | Element"

REPLACEMENT = "\ufffd"


def element(tag: str, *content: Content, **attributes: str) -> Element:
    """Return an element. Attributes are written as Python has them: class_ is class, data_x is data-x."""
    names = {name.rstrip("_").replace("_", "-"): clean(value) for name, value in attributes.items()}
    made = Element(tag, names)
    add(made, *content)
    return made


def add(parent: Element, *content: Content) -> None:
    """Append texts and elements to an element."""
    for piece in content:
        if isinstance(piece, Element):
            parent.append(piece)
        elif len(parent):
            parent[-1].tail = (parent[-1].tail or "") + clean(piece)
        else:
            parent.text = (parent.text or "") + clean(piece)


def clean(text: str) -> str:
    """Return text without what is neither printable nor a line feed: nothing that moves, hides or reverses text."""
    return "".join(letter if letter == "\n" or letter.isprintable() else REPLACEMENT for letter in text)


def raw(tag: str, text: str, **attributes: str) -> Element:
    """Return a <script> or <style>, whose text HTML takes as it is: our own, or escaped for it."""
    made = element(tag, **attributes)
    made.text = text
    return made


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]], **attributes: str) -> Element:
    """Return a table that may be wider than the page, each cell's first column as its row's head."""
    made = element("table", **attributes)
    top = SubElement(SubElement(made, "thead"), "tr")
    for cell in head:
        top.append(element("th", cell, scope="col"))
    body = SubElement(made, "tbody")
    for first, *rest in rows:
        row = SubElement(body, "tr")
        row.append(element("th", first, scope="row"))
        for cell in rest:
            row.append(element("td", cell))
    return element("div", made, class_="wide")


def document(root: Element) -> str:
    """Return the text of a page."""
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
