"""Runs one notebook as a test, for test_notebooks.py: python run_notebook.py NOTEBOOK SITE

SITE is the folder where the package is installed. Figures that are saved must have their axes
labelled, and commands must say what is stored in the notebook: the same words, whatever the
numbers, which differ from machine to machine. The status is 1 where a cell fails, a label is
missing, or a stored message is old.
"""

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import cmixtral_nb
from cmixtral_nb.recipes import MODULES

warnings.simplefilter("ignore")


def has_words(axis):
    "A label, or ticks that are words, or no ticks at all"
    ticks = [tick.get_text() for tick in axis.get_ticklabels() if tick.get_visible()]
    shown = [text for text in ticks if text]
    return axis.get_label_text() or not shown or any(c.isalpha() for c in "".join(shown))


def is_labelled(figure, panel, letter):
    "Whether axis x or y of a panel has a name, its own or one that it shares"
    if letter == "x":
        axis, shared, of_all = panel.xaxis, panel.get_shared_x_axes(), figure.get_supxlabel()
    else:
        axis, shared, of_all = panel.yaxis, panel.get_shared_y_axes(), figure.get_supylabel()
    siblings = [getattr(other, f"{letter}axis") for other in shared.get_siblings(panel)]
    return of_all or has_words(axis) or any(s.get_label_text() for s in siblings)


def watch_figures(faults):
    "Look at each figure that matplotlib writes, and add to `faults` what has no label"
    from matplotlib.backend_bases import FigureCanvasBase

    draw = FigureCanvasBase.print_figure

    def checked(self, *args, **kwargs):
        out = draw(self, *args, **kwargs)
        panels = [a for a in self.figure.axes if a.axison and a.get_visible() and a.has_data()]
        for number, panel in enumerate(panels):
            for letter in "xy":
                if not is_labelled(self.figure, panel, letter):
                    faults.add(f"a figure has no label on {letter} of panel {number}")
        return out

    setattr(FigureCanvasBase, draw.__name__, checked)


NUMBER = re.compile(r"[\d.,:+\-−–±e%]*\d[\d.,:+\-−–±e%]*")


def messages(outputs):
    "What the commands say in the outputs of a cell, such as 'search: append', each number as #"
    texts = ["".join(output.get("text", "")) for output in outputs]
    lines = NUMBER.sub("#", "".join(texts)).splitlines()
    return [line.strip() for line in lines if line.partition(": ")[0] in MODULES]


def watch_messages(faults):
    "Add to `faults` each cell whose commands say other words than the notebook holds"
    from execnb.shell import CaptureShell

    run = CaptureShell.cell

    def compared(self, cell, *args, **kwargs):
        stored = messages(cell.get("outputs", []))
        cell.outputs = []
        run(self, cell, *args, **kwargs)
        said = messages(cell.outputs)
        if said != stored and not self.exc:
            faults.add(f"cell {cell.id} says {said}, the notebook holds {stored}")

    CaptureShell.cell = compared


def main(notebook, site):
    from nbdev.test import test_nb

    source = Path(cmixtral_nb.__file__)
    assert source.is_relative_to(site), f"{source} is not the installed package"
    faults: set[str] = set()
    text = notebook.read_text(encoding="utf-8")
    if "plot" in text or "figure" in text:
        watch_figures(faults)
    watch_messages(faults)
    with tempfile.TemporaryDirectory() as folder:  # what the notebook leaves on disk goes with it
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        passed, _ = test_nb(notebook, skip_flags=["notest", "slow", "gpu"])
    print(*sorted(faults), sep="\n", file=sys.stderr)
    return int(not passed or bool(faults))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
