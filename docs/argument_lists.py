"""Docstrings whose arguments are lines `name: meaning` → the same with a list of them, for the site."""

import re

import griffe

ARGUMENT = re.compile(r"((?:[a-z_]\w*, )*[a-z_]\w*): ")


class ArgumentLists(griffe.Extension):
    def on_instance(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text):
    lines, within = [], False
    for line in text.splitlines():
        found = ARGUMENT.match(line)
        starts, ends = bool(found) and not within, within and not found and not line.startswith(" ")
        lines += [""] * (starts or ends)
        within = bool(found) or (within and not ends)
        lines.append(f"- **{found[1]}**: {line[found.end() :]}" if found else line)
    return "\n".join(lines)
