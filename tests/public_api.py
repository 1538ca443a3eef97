#!/usr/bin/env python3
"""Compares all that is public, with its signatures, with `public-api.txt` beside this file, so that no change of it goes by
unseen.

    python3 tests/public_api.py            # prints the difference and fails if there is one
    python3 tests/public_api.py --write    # writes the list again

The list is read from the documentation that docs.rs shows (features `nn` and `cuda`, without nvcc), which this builds: of
each item its declaration, its methods, and the traits that it implements.
"""

import difflib
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).resolve().parent / "public-api.txt"
# Elements without an end.
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """The declaration of an item, and headers below it with the list that each stands in."""

    def __init__(self, html):
        super().__init__()
        self.open = []
        self.declaration = ""
        self.headers = []
        self.links = []
        self.reexports = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append((tag, attributes))
        if tag == "a" and self.within(lambda _, a: "all-items" in a.get("class", "")):
            self.links.append(attributes["href"])
        if attributes.get("id", "").startswith("reexport."):
            self.reexports.append("")
        if tag in ("h3", "h4") and attributes.get("class") == "code-header":
            lists = [a["id"] for _, a in self.open if a.get("id", "").endswith("-list")]
            self.headers.append([lists[0] if lists else "", tag, ""])

    def handle_endtag(self, tag):
        if self.within(lambda _, a: a.get("class") == "code-attribute") and tag == "div":
            self.declaration += "\n"
        while self.open and self.open.pop()[0] != tag:
            pass

    def within(self, holds):
        return any(holds(tag, attributes) for tag, attributes in self.open)

    def handle_data(self, text):
        # "Show 9 fields" of what can be folded.
        if self.within(lambda tag, a: tag == "summary" and a.get("class") == "hideme"):
            return
        if self.within(lambda tag, a: tag == "pre" and "item-decl" in a.get("class", "")):
            self.declaration += text
        elif self.within(lambda _, a: a.get("class") == "code-header"):
            self.headers[-1][2] += text
        elif self.within(lambda tag, a: a.get("id", "").startswith("reexport.")):
            self.reexports[-1] += text


def one_line(text):
    return " ".join(text.split()).replace("( ", "(").replace(", )", ")").replace(",)", ")")


def described(path, page):
    yield f"## {path}"
    yield from page.declaration.strip().splitlines()
    # Sorted, so that the order in which they are written does not matter.
    methods, traits, block = {}, set(), None
    for where, tag, text in page.headers:
        text = one_line(text)
        if where == "implementations-list" and tag == "h3":
            block = methods.setdefault(text, [])
        elif where == "implementations-list":
            block.append(f"    {text}")
        elif where == "trait-implementations-list" and tag == "h3" and "StructuralPartialEq" not in text:
            traits.add(text)
        elif where == "synthetic-implementations-list" and text.split(" for ")[0].endswith(("Send", "Sync")):
            traits.add(text)
    for text, block in sorted(methods.items()):
        yield text
        yield from sorted(block)
    yield from sorted(traits)


def public_items():
    command = ["cargo", "doc", "--quiet", "--no-deps", "--locked", "--profile", "test", "--features", "nn,cuda"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "DOCS_RS": "1"}, check=True)
    metadata = subprocess.run(["cargo", "metadata", "--format-version", "1", "--no-deps", "--locked"], cwd=ROOT,
                              capture_output=True, text=True, check=True)
    folder = Path(json.loads(metadata.stdout)["target_directory"], "doc/selective_scan")
    read = lambda name: Page((folder / name).read_text())
    lines = [f"# {LIST.name}: made by `python3 tests/public_api.py --write`", ""]
    lines += [one_line(text) for text in read("index.html").reexports]
    links = read("all.html").links
    assert links, "the page of all items has none"
    for link in sorted(links, key=lambda link: (link.rsplit("/", 1)[0] if "/" in link else "", link)):
        *modules, name = link.removesuffix(".html").split("/")
        path = "::".join([*modules, name.split(".", 1)[1]])
        page = read(link)
        assert page.declaration, f"{path} has no declaration"
        lines += ["", *described(path, page)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main():
    now = public_items()
    if sys.argv[1:] == ["--write"]:
        LIST.write_text(now)
        return
    before = LIST.read_text() if LIST.exists() else ""
    difference = list(difflib.unified_diff(before.splitlines(), now.splitlines(), "listed", "public", lineterm=""))
    print("\n".join(difference) or f"{now.count('## ')} public items, as listed")
    if difference:
        sys.exit("what is public has changed: if that is meant, `python3 tests/public_api.py --write`")


if __name__ == "__main__":
    main()
