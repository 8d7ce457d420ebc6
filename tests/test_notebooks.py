"""Each notebook is a test: it runs top to bottom in a process of its own, without its slow and GPU cells, in an empty folder and
against the installed wheel, so that nothing of the checkout can help it. Figures that it draws must have their axes labelled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NBS = Path(__file__).parents[1] / "nbs"

RUN = """
import sys, warnings; warnings.simplefilter("ignore")
from pathlib import Path
import cmixtral_nb
from nbdev.test import test_nb

path, site = map(Path, sys.argv[1:])
assert Path(cmixtral_nb.__file__).is_relative_to(site), cmixtral_nb.__file__
faults = []

def names(axis):  # a label, or ticks that are words, or no ticks at all
    ticks = [t.get_text() for t in axis.get_ticklabels() if t.get_visible() and t.get_text()]
    return axis.get_label_text() or not ticks or any(c.isalpha() for t in ticks for c in t)

if "plot" in path.read_text() or "figure" in path.read_text():
    from matplotlib.backend_bases import FigureCanvasBase
    draw = FigureCanvasBase.print_figure
    def checked(self, *a, **kw):
        fig = self.figure; out = draw(self, *a, **kw)
        for i, ax in enumerate(ax for ax in fig.axes if ax.axison and ax.get_visible() and ax.has_data()):
            for k, axis, shared, all_of_it in (("x", ax.xaxis, ax.get_shared_x_axes(), fig.get_supxlabel()), ("y", ax.yaxis, ax.get_shared_y_axes(), fig.get_supylabel())):
                others = [getattr(o, k + "axis") for o in shared.get_siblings(ax)]
                if not (all_of_it or names(axis) or any(o.get_label_text() for o in others)): faults.append(f"a figure of {path.stem}: no label on {k} of panel {i}")
        return out
    FigureCanvasBase.print_figure = checked
ok, _ = test_nb(path, skip_flags=["notest", "slow", "gpu"])
if faults: print(*sorted(set(faults)), sep="\\n", file=sys.stderr)
sys.exit(not ok or bool(faults))
"""


def run(path, site, folder):
    shutil.copy(path, folder)
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", RUN, str(folder / path.name), str(site)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env,
    )


@pytest.mark.parametrize("path", sorted(NBS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook(path, wheel, tmp_path):
    out = run(path, wheel, tmp_path)
    assert out.returncode == 0, out.stderr[-3000:]


@pytest.mark.parametrize(
    "source, says",
    [
        ("1/0", "ZeroDivisionError"),
        (
            "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(); ax.plot([1, 2]); fig.savefig('a.png')",
            "no label on y",
        ),
    ],
)
def test_that_a_bad_notebook_fails(source, says, wheel, tmp_path):
    from cmixtral_nb.stages import write_json

    (tmp_path / "from").mkdir()
    write_json(
        tmp_path / "from" / "bad.ipynb",
        dict(
            nbformat=4,
            nbformat_minor=5,
            metadata={},
            cells=[
                dict(
                    cell_type="code",
                    id="a",
                    metadata={},
                    source=[source],
                    outputs=[],
                    execution_count=None,
                )
            ],
        ),
    )
    out = run(tmp_path / "from" / "bad.ipynb", wheel, tmp_path)
    assert out.returncode and says in out.stderr
