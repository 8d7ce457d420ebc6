"Folders of stages: foreign, broken, busy, inside each other."

from hostile import Case, write

CASES = [
    Case(
        "a folder o.tmp that no stage wrote",
        "corpus --sources zh=builtin:zh --valid-share 0.2 --out o --force",
        make=lambda here, run: write(here / "o.tmp/precious", "x"),
        says="o.tmp",
    ),
]
